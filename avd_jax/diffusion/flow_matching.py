"""The straight path between data and noise, and the levels to train it at."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SampleLevels = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def interpolate(
  x: Float[Array, "*s"], noise: Float[Array, "*s"], t: Float[Array, "..."]
) -> Float[Array, "*s"]:
  """x_t = (1 - t) x + t eps; `t` broadcasts from the left. [RF Eq. 3]"""
  t = t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
  return (1 - t) * x + t * noise


def velocity(
  x: Float[Array, "*s"], noise: Float[Array, "*s"]
) -> Float[Array, "*s"]:
  """The regression target eps - x, dx_t/dt of the path. [RF Eq. 4]"""
  return noise - x


def shift(t: Float[Array, "*s"], s: float) -> Float[Array, "*s"]:
  """s t / (1 + (s - 1) t): s > 1 moves mass to noise, s < 1 to clean.

  [RF Eq. 7]
  """
  return s * t / (1 + (s - 1) * t)


def logit_normal(s: float = 1.0) -> SampleLevels:
  """Levels with logit(t) ~ N(0, 1), then shifted by s. [RF Eq. 6]"""

  def sample(key, shape):
    return shift(jax.nn.sigmoid(jax.random.normal(key, shape)), s)

  return sample


def uniform(s: float = 1.0) -> SampleLevels:
  """Levels uniform in [0, 1], then shifted by s (Wan trains with s = 5)."""

  def sample(key, shape):
    return shift(jax.random.uniform(key, shape), s)

  return sample


def per_frame(t: Float[Array, "b n"], chunk_frames: int) -> Float[Array, "b f"]:
  """A chunk's level, for each of its frames."""
  return jnp.repeat(t, chunk_frames, 1)
