"""What training carries from step to step."""

from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, Int, UInt32

from avd_jax.typing import Params


class TrainState(NamedTuple):
  """Attributes:
  step: steps taken, over all stages.
  params: float32 weights.
  ema: their exponential moving average, what sampling uses.
  optimizer: the optimizer's state; made anew at each stage.
  memory: what objectives keep from step to step (an error bank, a frozen
    teacher), by name; made anew at each stage. Mostly empty.
  seed: of the run. It is data, not a constant of the compiled step, so that
    runs which differ in it alone share one program.
  """

  step: Int[Array, ""]
  params: Params
  ema: Params
  optimizer: Any
  memory: dict[str, Any]
  seed: UInt32[Array, ""]


def create(
  params: Params,
  tx: optax.GradientTransformation,
  memory: dict[str, Any],
  seed: UInt32[Array, ""],
) -> TrainState:
  """The state before the first step."""
  zero = jax.numpy.zeros((), jax.numpy.int32)
  # Copies, not aliases: every leaf of the state is donated to the step.
  ema = jax.tree.map(jax.numpy.copy, params)
  return TrainState(zero, params, ema, tx.init(params), memory, seed)
