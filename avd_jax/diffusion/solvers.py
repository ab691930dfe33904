"""Solvers of dx/dt = v from a level down to clean, carrying a cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avd_jax.diffusion.flow_matching import interpolate
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


def euler(velocity: Velocity, x, t, t_next, cache, key):
  """One Euler step from level t [b] to t_next [b]."""
  del key
  v, cache = velocity(x, t, cache)
  return _step(x, t_next - t, v), cache


def heun(velocity: Velocity, x, t, t_next, cache, key):
  """One Heun step: Euler, then the mean of the slopes at both ends."""
  del key
  v, cache = velocity(x, t, cache)
  ahead = _step(x, t_next - t, v)
  v_ahead, cache = velocity(ahead, t_next, cache)
  return _step(x, t_next - t, (v + v_ahead) / 2), cache


def consistency(velocity: Velocity, x, t, t_next, cache, key):
  """Straight to clean, x - t v, and back up to t_next with fresh noise.

  For models that `algorithms/consistency.py` trained: there every level
  points at the end of its path. The last step adds no noise.
  """
  v, cache = velocity(x, t, cache)
  clean = _step(x, -t, v)
  noise = jax.random.normal(key, x.shape, x.dtype)
  return interpolate(clean, noise, t_next), cache


SOLVERS = {"euler": euler, "heun": heun, "consistency": consistency}


def solve(
  velocity: Velocity,
  x: Float[Array, "b *s"],
  t_start: Float[Array, "b"],
  grid: Float[Array, "g"],
  cache: Any,
  solver: str = "euler",
  key: Array | None = None,
) -> tuple[Float[Array, "b *s"], Any]:
  """Integrates from t_start down to 0 along grid * t_start.

  Args:
    velocity: the field.
    x: where to start.
    t_start: the level of `x`.
    grid: levels from 1 to 0, as fractions of t_start.
    cache: handed through `velocity`.
    solver: one of SOLVERS.
    key: of the noise that the consistency solver adds.

  Raises:
    UserError: an unknown solver, or one that needs a key and has none.

  [RF Eq. 2]
  """
  if solver not in SOLVERS:
    raise UserError(
      f"solver {solver!r} is not one of {', '.join(sorted(SOLVERS))}"
    )
  if key is None:
    if solver == "consistency":
      raise UserError("solver 'consistency' adds noise: give a key")
    key = jax.random.key(0)  # drawn from by nobody

  def body(carry, inputs):
    x, cache = carry
    level, key = inputs
    t, t_next = level[0] * t_start, level[1] * t_start
    return SOLVERS[solver](velocity, x, t, t_next, cache, key), None

  levels = jnp.stack([grid[:-1], grid[1:]], 1)
  keys = jax.random.split(key, len(levels))
  if len(levels) == 1:  # the paper's proxy: no loop to pay for
    return body((x, cache), (levels[0], keys[0]))[0]
  return jax.lax.scan(body, (x, cache), (levels, keys))[0]
