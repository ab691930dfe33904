"""A long video, chunk after chunk: does a chunk's cost stay what it was?

An untrained network generates hundreds of chunks through the very sampler that
users call, once for each way of attending to history. Time is measured for
each segment, memory as what the process holds.
"""

import dataclasses
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from avd_jax import config as config_lib
from avd_jax.errors import UserError
from avd_jax.models import denoiser as denoiser_lib
from avd_jax.models.dit_config import DiTConfig
from avd_jax.sampling import Sampler

# Ways of attending to history, as settings of model.attention.
KINDS = {
  "dense": {},
  "window 8, sink 1": dict(window=8, sink=1),
  "routed, top 5": dict(routing_top_k=5),
}


def _config(kind: str, segment: int) -> Any:
  """64 tokens a chunk, two layers: enough for attention to dominate."""
  config = config_lib.default()
  config.data.update(height=32, width=32)
  config.model.update(
    dim=64, ffn_dim=64, num_heads=2, num_layers=2, patch=4, text="none"
  )
  config.model.attention.update(KINDS[kind])
  config.sampling.update(steps=1, segment=segment)
  return config


def _sampler(kind: str, segment: int) -> Sampler:
  config = _config(kind, segment)
  model = config_lib.typed(DiTConfig, config.model)
  x = jax.ShapeDtypeStruct((1, 1, 32, 32, 3), "float32")
  text = jax.ShapeDtypeStruct((1, config.data.text_length), "int32")
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda s: np.asarray(
      rng.normal(size=s.shape) / max(s.shape[-1], 4) ** 0.5, s.dtype
    ),
    denoiser_lib.abstract_params(model, x, text),
  )
  return Sampler(config, jax.device_put(params))


def _memory_mb() -> float:
  """Bytes that arrays hold on devices, in megabytes."""
  return sum(x.nbytes for x in jax.live_arrays()) / 1e6


@dataclasses.dataclass(frozen=True)
class Curve:
  """What a long video cost.

  Attributes:
    chunk: index of each segment's last chunk.
    ms: time of a chunk in the segment.
    memory_mb: what arrays hold after it, the KV cache among them, which is
      allocated up front: a ring where there is a window, room for all chunks
      of the video else.
  """

  chunk: list[int]
  ms: list[float]
  memory_mb: list[float]


def generate(kind: str, chunks: int, segment: int, bar: tqdm) -> Curve:
  """One video of `chunks` chunks."""
  gc.collect()
  before = _memory_mb()  # others' arrays
  sampler = _sampler(kind, segment)
  given = np.zeros((1, 0, 32, 32, 3), np.float32)
  text = np.zeros((1, sampler.config.data.text_length), np.int32)
  # The first segment of another video compiles; lengths share the program.
  next(sampler.stream(given, text, chunks))
  curve = Curve([], [], [])
  start = time.perf_counter()
  for made in sampler.stream(given, text, chunks, seed=1):
    now = time.perf_counter()
    curve.chunk.append((curve.chunk or [0])[-1] + made.shape[1])
    curve.ms.append(1e3 * (now - start) / made.shape[1])
    curve.memory_mb.append(_memory_mb() - before)
    bar.update(made.shape[1])
    start = time.perf_counter()
  return curve


def growth(curve: Curve) -> dict[str, float]:
  """Last fifth over first fifth: of time, and of memory held."""
  fifth = max(1, len(curve.chunk) // 5)
  ends = lambda values: float(
    np.median(values[-fifth:]) / np.median(values[:fifth])
  )
  return {"time": ends(curve.ms), "memory": ends(curve.memory_mb)}


def measure(
  chunks: int = 500,
  segment: int = 20,
  kinds: Sequence[str] = tuple(KINDS),
  progress: bool = True,
) -> dict[str, Any]:
  """Curves and growth of every way of attending.

  Raises:
    UserError: too short a video to speak of growth.
  """
  if segment < 1 or chunks < 5 * segment:
    raise UserError(
      f"--chunks {chunks}: at least five segments of {segment} chunks"
    )
  out: dict[str, Any] = {"chunks": chunks, "segment": segment, "kinds": {}}
  for kind in kinds:
    with tqdm(
      desc=kind, total=chunks, unit="chunk", disable=not progress
    ) as bar:
      curve = generate(kind, chunks, segment, bar)
    out["kinds"][kind] = dataclasses.asdict(curve) | {"growth": growth(curve)}
  return out


def draw(path: str | Path, numbers: dict[str, Any], where: str) -> None:
  """The chart of `measure`'s numbers."""
  from avd_jax.evaluation import cost_charts

  title = f"{numbers['chunks']} chunks of 64 tokens, {where}"
  cost_charts.long_rollout(path, numbers["kinds"], title)
