"""A training step, and its parts, as calls that can race (`race`)."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from avd_jax import config as config_lib
from avd_jax import parallel
from avd_jax.data import pipeline
from avd_jax.training.program import Program
from avd_jax.training.step import Schedule
from avd_jax.typing import Batch, StepContext


def prepare(config: ConfigDict, mesh: Mesh) -> tuple[Program, Batch]:
  """A config's program, and a batch of its data to run it on."""
  data = config_lib.typed(pipeline.DataConfig, config.data)
  batches = pipeline.batches(data, pipeline.make_source(data))
  batch = parallel.put_batch(next(batches), mesh)
  batches.close()
  return Program(config, mesh), batch


def step(
  program: Program, batch: Batch, name: str, local: int = 0
) -> Callable[[], Any]:
  """A call that takes one training step of a stage.

  At learning rate 0: the weights, and so the work, stay what they are.

  Args:
    program: of a run.
    batch: trained on, again and again.
    name: of the stage.
    local: steps already taken in it.
  """
  compiled = program.step(name, local)
  holder = [program.init()]
  still = Schedule(np.float32(0.0), np.float32(1.0))

  def call():
    holder[0], metrics = compiled(holder[0], batch, still)
    return metrics

  return call


def history(program: Program, batch: Batch, name: str) -> Callable[[], Any]:
  """A call that makes a batch's history as a stage does, and nothing else."""
  state = program.init()
  context = StepContext(state.ema, state.memory)
  make, key = jax.jit(program.history(name)), jax.random.key(0)
  return lambda: make(state.params, batch.x, batch.text, key, context)
