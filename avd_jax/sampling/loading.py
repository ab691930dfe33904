"""Trained runs and imported checkpoints, as samplers."""

import functools
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
from avd_jax.models import denoiser as denoiser_lib
from avd_jax.models.dit_config import DiTConfig
from avd_jax.sampling.sampler import Sampler

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
  checkpoints, step = checkpoint.open_existing(workdir)
  try:
    return _config(checkpoints.record(step), overrides, frames)
  finally:
    checkpoints.close()


def _config(record: Any, overrides: Sequence[str], frames: int) -> ConfigDict:
  if "model" not in record["config"]:
    raise UserError(
      "this run trained a VAE, which makes no videos by itself; give one that"
      " trained a model"
    )
  config = config_lib.from_json(record["config"])
  config.mesh.update(dict.fromkeys(parallel.AXES, 1))  # not that of training
  config_lib.override(config, list(overrides), CHANGEABLE)
  if overrides:
    config_lib.check(config, frames, trains=False)
  return config


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
  checkpoints, step = checkpoint.open_existing(workdir)
  try:
    config = _config(checkpoints.record(step), overrides, frames)
    model = config_lib.typed(DiTConfig, config.model)
    data = config_lib.typed(DataConfig, config.data)
    shape = (1, model.chunk_frames, data.height, data.width, model.channels)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    text = model.text_struct(1, data.text_length)
    target = denoiser_lib.abstract_params(model, x, text, mesh)
    params = checkpoints.restore(step, {"ema": target})["ema"]
    make = functools.partial(denoiser_lib.make, place=mesh)
    return Sampler(config, params, make)
  finally:
    checkpoints.close()
