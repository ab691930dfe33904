"""One trained run, rolled out from real first frames and measured."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from avd_jax import config as config_lib
from avd_jax.data import pipeline
from avd_jax.errors import UserError
from avd_jax.evaluation import drift, physics
from avd_jax.sampling import Sampler
from avd_jax.typing import Batch


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Held-out videos to roll out from.

  Attributes:
    truth: videos and texts, [b f h w c] in [-1, 1].
    state: a world's truth, None for real video.
    given: first frames that a rollout is given.
    data: what they were drawn with.
  """

  truth: Batch
  state: dict[str, np.ndarray] | None
  given: int
  data: pipeline.DataConfig


def held_out(config: ConfigDict) -> Prompts:
  """The evaluation videos of a config; the same ones every time.

  Raises:
    UserError: fewer held-out videos than asked for, or too short ones.
  """
  wanted = config.evaluation
  data = dataclasses.replace(
    config_lib.typed(pipeline.DataConfig, config.data),
    frames=wanted.frames,
    seed=wanted.seed,
    num_workers=0,
  )
  if not 0 < wanted.given <= wanted.frames - 3:
    raise UserError(
      f"evaluation.given {wanted.given} of evaluation.frames {wanted.frames}:"
      " a frame or more must be given, and three or more made"
    )
  source = pipeline.make_source(data, "eval")
  count = min(wanted.videos, len(source))
  truth, state = pipeline.fixed_batch(data, source, range(count))
  return Prompts(truth, state, wanted.given, data)


def roll_out(
  sampler: Sampler, prompts: Prompts, label: str, seed: int = 0
) -> np.ndarray:
  """Continues every prompt to its truth's length, under a progress bar.

  Returns:
    [b f h w c], the given frames first, clipped to [-1, 1].
  """
  truth = prompts.truth
  total = truth.x.shape[1] - prompts.given
  with tqdm(desc=f"{label}: roll out", total=total, unit="frame") as bar:
    video = sampler.extend(
      truth.x[:, : prompts.given],
      truth.text,
      truth.x.shape[1],
      seed,
      bar.update,
    )
  return np.clip(video, -1.0, 1.0)


def measure(video: np.ndarray, prompts: Prompts) -> drift.FrameMetrics:
  """Frame by frame: by a world's truth and law, or by the video's own start."""
  if prompts.state is None:
    return drift.frame_metrics_real(video, prompts.truth.x)
  return physics.frame_metrics(
    video, prompts.truth.x, prompts.state, prompts.data.world
  )


def summarize(metrics: drift.FrameMetrics, prompts: Prompts) -> dict[str, Any]:
  """The summary that belongs to `measure`."""
  if prompts.state is None:
    return drift.summarize_real(metrics, prompts.given)
  return drift.summarize(metrics, prompts.given)


def label_of(workdir: str | Path) -> str:
  """A run's name in tables and bars: its directory's."""
  return Path(workdir).resolve().name
