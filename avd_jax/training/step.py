"""One training step: a pure function of state and batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from avd_jax.training.state import TrainState
from avd_jax.typing import Batch, LossFn, Metrics

# (state, batch, learning rate) -> (state, metrics)
Step = Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]]


def make_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  *,
  ema_decay: float,
  accumulation: int = 1,
  resampler: str = "online",
) -> Step:
  """Builds `(state, batch, learning_rate) -> (state, metrics)`.

  The step's randomness is the seed folded with the step, so that a resumed
  run draws what an uninterrupted one would have drawn.

  Args:
    loss_fn: the objective.
    tx: the optimizer, at learning rate 1.
    ema_decay: of the averaged weights.
    accumulation: microbatches whose gradients are averaged.
    resampler: "online" or "ema", the weights that re-make the history.
  """

  def gradients(state, batch, key):
    frozen = state.ema if resampler == "ema" else None
    (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params, batch, key, frozen
    )
    return grads, metrics

  def accumulate(state, batch, key):
    # Strided, so that a microbatch still spans every device of the batch axis.
    split = jax.tree.map(
      lambda x: jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0),
      batch,
    )
    keys = jax.random.split(key, accumulation)
    first = jax.eval_shape(
      gradients, state, jax.tree.map(lambda x: x[0], split), keys[0]
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)

    def body(total, inputs):
      made = gradients(state, *inputs)
      return jax.tree.map(jnp.add, total, made), None

    total, _ = jax.lax.scan(body, zeros, (split, keys))
    return jax.tree.map(lambda x: x / accumulation, total)

  def step(state, batch, learning_rate):
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    if accumulation > 1:
      grads, metrics = accumulate(state, batch, key)
    else:
      grads, metrics = gradients(state, batch, key)
    updates, optimizer = tx.update(grads, state.optimizer, state.params)
    updates = jax.tree.map(lambda u: learning_rate * u, updates)
    params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update(params, state.ema, 1 - ema_decay)
    metrics = metrics | {
      "grad_norm": optax.global_norm(grads),
      "learning_rate": learning_rate,
    }
    state = TrainState(state.step + 1, params, ema, optimizer, state.seed)
    return state, metrics

  return step
