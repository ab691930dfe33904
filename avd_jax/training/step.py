"""One training step: a pure function of state and batch, then a program."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from avd_jax import parallel
from avd_jax.training.state import TrainState
from avd_jax.typing import Batch, LossFn, Metrics, StepContext


class Schedule(NamedTuple):
  """What the host decides step by step, as data: no program depends on it.

  Attributes:
    learning_rate: see optim.learning_rate.
    ramp: how far a stage's curriculum has come, in [0, 1].
  """

  learning_rate: Any
  ramp: Any


# (state, batch, schedule) -> (state, metrics)
Step = Callable[[TrainState, Batch, Schedule], tuple[TrainState, Metrics]]


def make_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  *,
  ema_decay: float,
  accumulation: int = 1,
) -> Step:
  """Builds `(state, batch, schedule) -> (state, metrics)`.

  The step's randomness is the seed folded with the step, so that a resumed
  run draws what an uninterrupted one would have drawn.

  Args:
    loss_fn: the objective.
    tx: the optimizer, at learning rate 1.
    ema_decay: of the averaged weights.
    accumulation: microbatches whose gradients are averaged.
  """

  def gradients(state, batch, key, ramp, memory):
    context = StepContext(state.ema, memory, ramp)
    (_, (metrics, memory)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      state.params, batch, key, context
    )
    return (grads, metrics), memory

  def accumulate(state, batch, key, ramp):
    # Strided, so that a microbatch still spans every device of the batch axis.
    split = jax.tree.map(
      lambda x: jnp.moveaxis(x.reshape(-1, accumulation, *x.shape[1:]), 1, 0),
      batch,
    )
    keys = jax.random.split(key, accumulation)
    first, _ = jax.eval_shape(
      gradients,
      state,
      jax.tree.map(lambda x: x[0], split),
      keys[0],
      ramp,
      state.memory,
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)

    def body(carry, inputs):
      total, memory = carry
      made, memory = gradients(state, *inputs, ramp, memory)
      return (jax.tree.map(jnp.add, total, made), memory), None

    carry, _ = jax.lax.scan(body, (zeros, state.memory), (split, keys))
    total, memory = carry
    return jax.tree.map(lambda x: x / accumulation, total), memory

  def step(state, batch, schedule):
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    if accumulation > 1:
      made, memory = accumulate(state, batch, key, schedule.ramp)
    else:
      made, memory = gradients(state, batch, key, schedule.ramp, state.memory)
    grads, metrics = made
    updates, optimizer = tx.update(grads, state.optimizer, state.params)
    updates = jax.tree.map(lambda u: schedule.learning_rate * u, updates)
    params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update(params, state.ema, 1 - ema_decay)
    metrics = metrics | {
      "grad_norm": optax.global_norm(grads),
      "learning_rate": schedule.learning_rate,
    }
    state = TrainState(
      state.step + 1, params, ema, optimizer, memory, state.seed
    )
    return state, metrics

  return step


def compiled(step: Step, shardings: TrainState, mesh: Mesh) -> Step:
  """A step as a program for a mesh; it donates the state.

  Args:
    step: the pure function.
    shardings: where every leaf of the state lives.
    mesh: its batch axes cut the batch; schedule and metrics are whole.
  """
  everywhere = parallel.replicated(mesh)
  return jax.jit(
    step,
    in_shardings=(shardings, parallel.batch_sharding(mesh), everywhere),
    out_shardings=(shardings, everywhere),
    donate_argnums=0,
  )
