"""What a training step costs, method against method, on this machine.

What is reported are ratios between contenders that ran in turn (`race`). MFU is
measured against a matrix product timed in the same rounds, not against a data
sheet.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from avd_jax import config as config_lib
from avd_jax.errors import UserError
from avd_jax.models import denoiser as denoiser_lib
from avd_jax.studies import race, steps

MATMUL = 2048  # side of the product that stands for the machine's peak


def _matmul(dtype: str) -> Callable[[], Any]:
  a = jax.random.normal(jax.random.key(0), (MATMUL, MATMUL), dtype)
  product = jax.jit(jnp.matmul)
  return lambda: product(a, a)


def measure(
  config: ConfigDict, mesh: Mesh, rounds: int = 20, progress: bool = True
) -> dict[str, float]:
  """Times teacher forcing, resampling forcing and its parts, interleaved.

  Args:
    config: has the stages teacher_forcing and resampling_forcing.
    mesh: what to run on.
    rounds: of every contender in turn.
    progress: show a bar.

  Returns:
    rf_over_tf, rf_detached_over_tf and rollout_share (of the resampling step):
    medians of ratios within a round; tokens_per_second of the noisy stream and
    mfu, both of teacher forcing; milliseconds of each contender.

  Raises:
    UserError: a stage is missing, or no rounds.
  """
  wanted = ("teacher_forcing", "resampling_forcing")
  missing = [name for name in wanted if name not in config.stage]
  if missing or rounds < 1:
    raise UserError(
      f"bench step needs the stages {', '.join(wanted)} and at least 1 round"
    )
  config = config_lib.from_json(config_lib.to_json(config))
  detached = config_lib.from_json(
    config_lib.to_json(config.stage.resampling_forcing)
  )
  detached.degradation.detached = True
  config.stage.detached = detached
  program, batch = steps.prepare(config, mesh)
  contenders = {
    "tf": steps.step(program, batch, "teacher_forcing"),
    "rf": steps.step(program, batch, "resampling_forcing"),
    "rf_detached": steps.step(program, batch, "detached"),
    "rollout": steps.history(program, batch, "resampling_forcing"),
    "matmul": _matmul(program.model.dtype),
  }
  times = race.run(contenders, rounds, progress)
  return _summary(times, program)


def _summary(times, program) -> dict[str, float]:
  ratio = functools.partial(race.ratio, times)
  model, data = program.model, program.config.data
  flops = (
    3
    * data.batch_size
    * denoiser_lib.forward_flops(
      model, data.frames, data.height, data.width, streams=2
    )
  )
  work = flops / (2 * MATMUL**3)  # of a step, in matrix products
  rows, columns = model.grid(data.height, data.width)
  tokens = data.batch_size * data.frames * rows * columns
  return {
    "rf_over_tf": ratio("rf", "tf"),
    "rf_detached_over_tf": ratio("rf_detached", "tf"),
    "rollout_share": ratio("rollout", "rf"),
    "tokens_per_second": tokens / race.median(times["tf"]),
    "mfu": work * ratio("matmul", "tf"),
    **{f"{name}_ms": 1e3 * race.median(t) for name, t in times.items()},
    "rounds": len(times["tf"]),
  }
