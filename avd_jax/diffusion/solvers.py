"""Solvers of dx/dt = v from a level down to clean, carrying a cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avd_jax.diffusion.flow_matching import shift as shift_levels
from avd_jax.errors import UserError

# (x, t [b], cache) -> (v, cache)
Velocity = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def time_grid(steps: int, shift: float = 1.0) -> Float[Array, "{steps+1}"]:
  """Levels from 1 to 0, uniform and then shifted (method: 32 steps, 5.0)."""
  if steps < 1:
    raise UserError(f"sampling steps {steps}: at least 1 is needed")
  return shift_levels(jnp.linspace(1.0, 0.0, steps + 1), shift)


def _step(x, dt, v):
  return x + dt.reshape(-1, *(1,) * (x.ndim - 1)) * v


def euler(velocity: Velocity, x, t, t_next, cache):
  """One Euler step from level t [b] to t_next [b]."""
  v, cache = velocity(x, t, cache)
  return _step(x, t_next - t, v), cache


def heun(velocity: Velocity, x, t, t_next, cache):
  """One Heun step: Euler, then the mean of the slopes at both ends."""
  v, cache = velocity(x, t, cache)
  ahead = _step(x, t_next - t, v)
  v_ahead, cache = velocity(ahead, t_next, cache)
  return _step(x, t_next - t, (v + v_ahead) / 2), cache


SOLVERS = {"euler": euler, "heun": heun}


def solve(
  velocity: Velocity,
  x: Float[Array, "b *s"],
  t_start: Float[Array, "b"],
  grid: Float[Array, "g"],
  cache: Any,
  solver: str = "euler",
) -> tuple[Float[Array, "b *s"], Any]:
  """Integrates from t_start down to 0 along grid * t_start.

  Raises:
    UserError: an unknown solver.

  [RF Eq. 2]
  """
  if solver not in SOLVERS:
    raise UserError(
      f"solver {solver!r} is not one of {', '.join(sorted(SOLVERS))}"
    )

  def body(carry, level):
    x, cache = carry
    t, t_next = level[0] * t_start, level[1] * t_start
    return SOLVERS[solver](velocity, x, t, t_next, cache), None

  levels = jnp.stack([grid[:-1], grid[1:]], 1)
  if len(levels) == 1:  # the paper's proxy: no loop to pay for
    return body((x, cache), levels[0])[0]
  return jax.lax.scan(body, (x, cache), levels)[0]
