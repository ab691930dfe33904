"""Trained runs and imported checkpoints, as samplers."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from avd_jax import checkpoint, parallel
from avd_jax import config as config_lib
from avd_jax.data.pipeline import DataConfig
from avd_jax.errors import UserError
from avd_jax.models import attention
from avd_jax.models import denoiser as denoiser_lib
from avd_jax.models.dit_config import DiTConfig
from avd_jax.sampling.sampler import Sampler
from avd_jax.typing import Params
from avd_jax.wan import importing

CHANGEABLE = (
  *config_lib.WEIGHTLESS,
  "sampling.",
  "evaluation.",
  # A video alone is cut by its tokens and heads.
  "mesh.context",
  "mesh.tensor",
)


def read_config(
  workdir: str | Path, overrides: Sequence[str] = (), frames: int = 0
) -> ConfigDict:
  """The config that `load` would sample with; no weights are read.

  Arguments and errors as `load`.
  """
  checkpoints, step = _opened(workdir)
  try:
    return _config(checkpoints.record(step), overrides, frames)
  finally:
    checkpoints.close()


def _opened(workdir: str | Path) -> tuple[checkpoint.Checkpoints, int]:
  """The checkpoints to sample from, and the newest step."""
  try:
    return checkpoint.open_existing(workdir)
  except UserError:
    remedy = importing.remedy(workdir)
    if remedy:
      raise UserError(remedy) from None
    raise


def _config(record: Any, overrides: Sequence[str], frames: int) -> ConfigDict:
  if "model" not in record["config"]:
    raise UserError(
      "this run trained a VAE, which makes no videos by itself; give one that"
      " trained a model"
    )
  config = config_lib.from_json(config_lib.complete(record["config"]))
  config.mesh.update(dict.fromkeys(parallel.AXES, 1))  # not that of training
  config_lib.override(config, list(overrides), CHANGEABLE)
  for axis, size in config.mesh.items():
    if size < 1:
      raise UserError(f"mesh.{axis} {size}: say how many devices, 1 or more")
  if overrides:
    config_lib.check(config, frames, trains=False)
  return config


def check(
  config: ConfigDict,
  grid: tuple[int, int],
  chunks: int,
  mesh: Mesh | None,
  memory: int | None = None,
  videos: int = 1,
) -> None:
  """Refuses what a run cannot be sampled with; no weights are read.

  Args:
    config: as `read_config` gives it.
    grid: height and width of a (latent) frame.
    chunks: that a cache has room for; see `Sampler.room`.
    mesh: what to run on; None is the default device.
    memory: bytes that a device has; None is not known.
    videos: made at once.

  Raises:
    UserError: what the mesh does not cut evenly, a cache that is larger than
      the memory it would lie in, or an attention implementation that cannot do
      its part.
  """
  model = config_lib.typed(DiTConfig, config.model)
  rows, columns = model.grid(*grid)
  tokens = model.chunk_frames * rows * columns
  if mesh is not None:
    parallel.check_divides(mesh, tokens=tokens, heads=model.num_heads)
    _params(model, config_lib.typed(DataConfig, config.data), mesh)
  if memory is not None:
    needed = videos * _cache_bytes(config, model, grid, chunks, mesh)
    _check_memory(needed, memory, chunks, videos)
  attention.check(
    model.attention,
    chunks=chunks,
    tokens=tokens,
    heads=model.num_heads,
    head_dim=model.head_dim,
    dtype=model.dtype,
    place=mesh,
    trains=False,
  )


def _cache_bytes(
  config: ConfigDict,
  model: DiTConfig,
  grid: tuple[int, int],
  chunks: int,
  mesh: Mesh | None,
) -> float:
  """What a device holds of a video's keys and values, guidance's too."""
  like = jax.ShapeDtypeStruct(
    (1, model.chunk_frames, *grid, model.channels), jnp.float32
  )
  denoiser = Sampler(config, None).denoiser()
  cache = jax.eval_shape(lambda: denoiser.init_cache(like, chunks))
  whole = sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(cache)
  )
  if mesh is None:
    return whole
  return whole / (mesh.shape["context"] * mesh.shape["tensor"])


def _check_memory(needed: float, there: int, chunks: int, videos: int) -> None:
  """Weights and what is computed come on top: this much is sure."""
  if needed > there:
    many = f"{videos:,} videos of " if videos > 1 else ""
    fewer = "make fewer (evaluation.videos), " if videos > 1 else ""
    raise UserError(
      f"keys and values of {many}{chunks:,} chunks take"
      f" {needed / 2**30:,.1f} GiB on a device, which has"
      f" {there / 2**30:,.1f}: {fewer}make a shorter video, or let it forget:"
      " --config.model.attention.window=20, or"
      " --config.sampling.recompute=20"
    )


def _params(model: DiTConfig, data: DataConfig, mesh: Mesh | None) -> Params:
  """Shapes of the weights, and where they go."""
  shape = (1, model.chunk_frames, data.height, data.width, model.channels)
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  text = model.text_struct(1, data.text_length)
  return denoiser_lib.abstract_params(model, x, text, mesh)


def load(
  workdir: str | Path,
  overrides: Sequence[str] = (),
  frames: int = 0,
  mesh: Mesh | None = None,
) -> Sampler:
  """The newest EMA weights of a run, as a sampler.

  Args:
    workdir: the run's.
    overrides: `--config.field=value` arguments for what weights do not depend
      on: how attention sees the history, and how to sample and evaluate.
    frames: of the videos to be made, where longer than the run's own.
    mesh: what to run on, each device with its share of the weights and of the
      cache; None is the default device.

  Raises:
    UserError: no such run, a torn checkpoint, a field that may not change, or
      a mesh that does not cut the model evenly.
  """
  checkpoints, step = _opened(workdir)
  try:
    config = _config(checkpoints.record(step), overrides, frames)
    if mesh is None and max(config.mesh.values()) > 1:
      raise UserError(
        "mesh.context and mesh.tensor: one device is used here, leave them at 1"
        " (avd sample and avd evaluate use several)"
      )
    model = config_lib.typed(DiTConfig, config.model)
    data = config_lib.typed(DataConfig, config.data)
    target = _params(model, data, mesh)
    params = checkpoints.restore(step, {"ema": target})["ema"]
    make = functools.partial(denoiser_lib.make, place=mesh)
    return Sampler(config, params, make)
  finally:
    checkpoints.close()
