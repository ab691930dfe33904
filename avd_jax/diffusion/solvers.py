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
_TINY = 1e-6  # keeps logarithms finite at the two ends of the path
_NEAR = 1e-4  # levels that are one and the same: a video that starts clean


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


def _by_steps(step: Callable) -> Callable:
  """A solver whose steps know nothing of each other."""

  def integrate(velocity, x, levels, cache, key):
    def body(carry, inputs):
      (t, t_next), key = inputs
      return step(velocity, carry[0], t, t_next, carry[1], key), None

    pairs = jnp.stack([levels[:-1], levels[1:]], 1)
    keys = jax.random.split(key, len(pairs))
    if len(pairs) == 1:  # the paper's proxy: no loop to pay for
      return body((x, cache), (pairs[0], keys[0]))[0]
    return jax.lax.scan(body, (x, cache), (pairs, keys))[0]

  return integrate


def unipc(velocity: Velocity, x, levels, cache, key):
  """UniPC of order 2 (B(h) = e^h - 1) on the clean video that x - t v guesses.

  A step goes from t to t' by x' = (t'/t) x + (1 - t'/t) m, where Euler's m is
  the guess at t. Here m leans on the guess before as well, and once there is a
  guess at t', the step is taken again with all three. The first step and the
  last are Euler's. One evaluation a step; what is remembered ends with the
  chunk. Zhao et al., arXiv 2302.04867.

  Args:
    velocity: the field.
    x: where to start [b ...].
    levels: [g b], down to 0.
    cache: handed through `velocity`.
    key: drawn from by nobody.
  """
  del key
  steps = len(levels) - 1

  def body(carry, inputs):
    x, cache, start, near, far = carry
    i, (before, last, t, t_next) = inputs
    v, cache = velocity(x, t, cache)
    clean = _step(x, -t, v)
    # The step that led here again, of the order that it had.
    older, newer = _corrector(before, last, t, i > 1)
    lean = _times(older, far - near) + _times(newer, clean - near)
    x = jnp.where(i > 0, _towards(start, near + lean, last, t), x)
    older = _predictor(last, t, t_next, (i > 0) & (i < steps - 1))
    after = _towards(x, clean + _times(older, near - clean), t, t_next)
    return (after, cache, x, clean, near), None

  # Levels of two steps before the first are masked, whatever they are.
  padded = jnp.concatenate([levels[:1], levels[:1], levels])
  around = jnp.stack([padded[i : i + steps] for i in range(4)], 1)
  carry = (x, cache, *(jnp.zeros_like(x) for _ in range(3)))
  return jax.lax.scan(body, carry, (jnp.arange(steps), around))[0][:2]


def _times(weight, x):
  """Numbers [b] times arrays [b ...]."""
  return weight.reshape(-1, *(1,) * (x.ndim - 1)) * x


def _towards(x, clean, t, t_next):
  """From level t to t_next on the straight path that ends at `clean`."""
  left = t_next / jnp.maximum(t, _TINY)
  return _times(left, x) + _times(1 - left, clean)


def _distance(t, t_next):
  """Between two levels, as half the log of the signal-to-noise ratio."""
  half = lambda t: (
    jnp.log(jnp.maximum(1 - t, _TINY)) - jnp.log(jnp.maximum(t, _TINY))
  )
  return jnp.maximum(half(t_next) - half(t), _NEAR)


def _predictor(last, t, t_next, second):
  """Weight [b] of the guess before; 0 where the order is not the second."""
  ratio = -_distance(last, t) / _distance(t, t_next)
  return jnp.where(second, 0.5 / ratio, 0.0)


def _corrector(before, last, t, second):
  """Weights [b] of the guess before the last, and of the new one."""
  h = _distance(last, t)
  ratio = -_distance(before, last) / h
  grown = jnp.expm1(-h)
  one = -grown / h - 1
  two = -one / h - 0.5
  one, two = one / grown, 2 * two / grown
  older = (one - two) / (1 - ratio)
  newer = jnp.where(second, one - older, 0.5)
  return jnp.where(second, older / ratio, 0.0), newer


# (velocity, x [b ...], levels [g b] down to 0, cache, key) -> (x, cache)
SOLVERS = {
  "euler": _by_steps(euler),
  "heun": _by_steps(heun),
  "consistency": _by_steps(consistency),
  "unipc": unipc,
}


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

  levels = grid[:, None] * t_start
  return SOLVERS[solver](velocity, x, levels, cache, key)
