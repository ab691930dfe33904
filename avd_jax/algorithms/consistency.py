"""Few-step sampling without a bigger teacher: causal consistency training.

A trained causal model needs many solver steps because the path from noise to a
chunk is curved. Here the same network learns to point from any level straight
at the path's end, given the same histories as before; what a solver would do
comes from the model itself, frozen as the stage began. Two to four steps of
`solvers.consistency` then stand in for the many of the ODE.
"""

import dataclasses

import jax
import jax.numpy as jnp

from avd_jax.algorithms.flow_loss import chunk_mean, drop_text, scored
from avd_jax.diffusion import flow_matching, solvers
from avd_jax.errors import UserError
from avd_jax.typing import (
  Denoiser,
  HistoryFn,
  LossFn,
  NullText,
  StepContext,
)

NAME = "teacher"  # of the frozen weights in a step's memory


@dataclasses.dataclass(frozen=True)
class ConsistencyConfig:
  """The path that is cut short.

  Attributes:
    steps: of the solver that the model replaces; its grid is trained.
    shift: s of that grid; as sampling's.
    min_t: where the loss stops growing towards low levels.
  """

  steps: int = 16
  shift: float = 1.0
  min_t: float = 0.05

  def __post_init__(self):
    if self.steps < 2 or self.shift <= 0 or self.min_t <= 0:
      raise UserError(
        f"consistency: steps {self.steps} must be at least 2, shift"
        f" {self.shift} and min_t {self.min_t} positive"
      )


def consistency(
  denoiser: Denoiser,
  history: HistoryFn,
  config: ConsistencyConfig = ConsistencyConfig(),
  *,
  null_text: NullText,
  text_dropout: float = 0.1,
  skip_chunks: int = 0,
  resampler: str = "online",
) -> LossFn:
  """|| f(x_t) - f_ema(x_t + (t' - t) v_teacher(x_t)) ||^2 / t^2.

  f(x_t) = x_t - t v(x_t, h, t, c) is where a model says that the path through
  x_t ends, t' the grid's next level, and f(x_0) = x_0. Teacher and student see
  the same history. No gradient reaches the target.

  Args:
    denoiser: the model.
    history: makes h; see algorithms/histories.
    config: the grid.
    null_text: [m] or [m d], stands in for dropped text.
    text_dropout: rate of dropped text.
    skip_chunks: first chunks without loss.
    resampler: "online" or "ema", the weights that re-make the history.

  The context must hold `ema` and, in its memory, the frozen weights.
  """

  def loss_fn(params, batch, key, context=StepContext()):
    key_text, key_history, key_level, key_noise = jax.random.split(key, 4)
    x, teacher = batch.x, context.memory[NAME]
    text = drop_text(batch.text, null_text, key_text, text_dropout)
    maker = context.ema if resampler == "ema" else params
    context = context._replace(given=batch.given)
    h = history(maker, x, text, key_history, context)
    n = x.shape[1] // denoiser.chunk_frames
    grid = solvers.time_grid(config.steps, config.shift)
    place = jax.random.randint(key_level, (x.shape[0], n), 0, config.steps)
    t, t_next = grid[place], grid[place + 1]
    per_frame = lambda t: flow_matching.per_frame(t, denoiser.chunk_frames)
    spread = lambda t: per_frame(t)[..., None, None, None]
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    x_t = flow_matching.interpolate(x, noise, per_frame(t))

    def end(weights, x, t):
      v = denoiser.parallel(weights, x, t, text, h)
      return x - spread(t) * v

    v = denoiser.parallel(teacher, x_t, t, text, h)
    ahead = x_t + spread(t_next - t) * v
    target = jnp.where(
      spread(t_next) > 0, end(context.ema, ahead, t_next), ahead
    )
    off = end(params, x_t, t) - jax.lax.stop_gradient(target)
    error = (off / jnp.maximum(spread(t), config.min_t)) ** 2
    loss = chunk_mean(error, scored(batch, n, skip_chunks), skip_chunks)
    return loss, ({"loss": loss}, dict(context.memory))

  return loss_fn
