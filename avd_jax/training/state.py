"""What training carries from step to step."""

from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, Int

from avd_jax.typing import Params


class TrainState(NamedTuple):
  """Attributes:
    step: steps taken, over all stages.
    params: float32 weights.
    ema: their exponential moving average, what sampling uses.
    optimizer: the optimizer's state; made anew at each stage.
  """

  step: Int[Array, ""]
  params: Params
  ema: Params
  optimizer: Any


def create(params: Params, tx: optax.GradientTransformation) -> TrainState:
  """The state before the first step."""
  zero = jax.numpy.zeros((), jax.numpy.int32)
  # Copies, not aliases: every leaf of the state is donated to the step.
  ema = jax.tree.map(jax.numpy.copy, params)
  return TrainState(zero, params, ema, tx.init(params))
