"""Rotary positions: against float64, at any frame, in Wan's layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.errors import UserError
from avd_jax.ops import rope

# Rounding a frequency to 2^-32 of a turn, per frame; float32's own rounding
# of an angle up to pi, and of the factor that makes radians of it.
PER_FRAME, FLOAT32 = np.pi * 2.0**-32, 6e-7


def frequencies(dim, theta=10_000.0):
  return theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def difference(a, b):
  """Distance between angles, around the circle."""
  return np.abs((a - b + np.pi) % (2 * np.pi) - np.pi)


@pytest.mark.parametrize("dim", [2, 16, 44])
def test_angles_against_float64_to_a_million(dim):
  positions = np.array(
    [0, 1, 2, 63, 999, 1000, 10_007, 99_991, 100_000, 999_983, 1_000_000]
  )
  ours = np.asarray(
    jax.jit(rope.axis_angles, static_argnums=(1, 2))(positions, dim, 10_000.0),
    np.float64,
  )
  exact = positions[:, None] * frequencies(dim)
  error = difference(ours, exact).max(1)
  assert (error <= positions * PER_FRAME + FLOAT32).all()
  # The bounds that the docstring names.
  assert error[positions == 1000].max() < 7e-7 + FLOAT32
  assert error[positions == 100_000].max() < 7.5e-5
  assert (np.abs(ours) <= np.pi + FLOAT32).all()


def test_a_float32_product_would_fail_the_bound():
  """What the integer arithmetic is for: the bound is not an easy one."""
  position, dim = 999_983, 44
  product = np.float32(position) * frequencies(dim).astype(np.float32)
  error = difference(product.astype(np.float64), position * frequencies(dim))
  assert error.max() > 10 * (position * PER_FRAME + FLOAT32)


def test_negative_positions_turn_the_other_way():
  ahead = rope.axis_angles(jnp.array([5, 100_000]), 16, 10_000.0)
  back = rope.axis_angles(jnp.array([-5, -100_000]), 16, 10_000.0)
  np.testing.assert_allclose(ahead, -back, atol=1e-6)


@pytest.mark.parametrize(
  ("head_dim", "parts"),
  [(128, (44, 42, 42)), (64, (24, 20, 20)), (6, (2, 2, 2)), (16, (8, 4, 4))],
)
def test_head_dims_split_as_in_wan(head_dim, parts):
  assert rope.axis_dims(head_dim) == parts


@pytest.mark.parametrize("head_dim", [2, 4, 5, 7, 15])
def test_unsplittable_head_dims_are_refused(head_dim):
  with pytest.raises(UserError, match=f"head dim {head_dim}"):
    rope.axis_dims(head_dim)


def test_grid_is_frame_height_width_with_width_fastest():
  frames, height, width, dim = np.array([7, 3]), 2, 3, 16
  angles = np.asarray(rope.grid_angles(jnp.array(frames), height, width, dim))
  f_dim, h_dim, w_dim = rope.axis_dims(dim)
  token = 0
  for frame in frames:
    for row in range(height):
      for column in range(width):
        expected = np.concatenate(
          [
            frame * frequencies(f_dim),
            row * frequencies(h_dim),
            column * frequencies(w_dim),
          ]
        )
        assert difference(angles[token], expected).max() < 1e-6
        token += 1
  assert token == len(angles)


def wan_rotate(x, angles):
  """Wan's form: consecutive pairs seen as complex numbers, and multiplied."""
  pairs = x.astype(np.float64).reshape(*x.shape[:-1], -1, 2)
  turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None]
  return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def test_rotation_is_of_interleaved_pairs():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
  angles = rng.uniform(-np.pi, np.pi, (5, 4)).astype(np.float32)
  ours = np.asarray(rope.rotate(jnp.asarray(x), jnp.asarray(angles)))
  np.testing.assert_allclose(ours, wan_rotate(x, angles), atol=2e-6)
  # Not the two halves, the other layout in use: these would differ.
  halves = wan_rotate(
    x.reshape(2, 5, 3, 2, 4).swapaxes(-1, -2).reshape(x.shape), angles
  )
  halves = halves.reshape(2, 5, 3, 4, 2).swapaxes(-1, -2).reshape(x.shape)
  assert np.abs(ours - halves).max() > 0.1


def test_scores_depend_on_distance_alone_however_far():
  rng = np.random.default_rng(1)
  q, k = (
    jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2)
  )

  @jax.jit
  def score(position, distance):
    place = lambda p: rope.grid_angles(p[None], 1, 1, 16)
    turned = rope.rotate(q, place(position))
    return jnp.sum(turned * rope.rotate(k, place(position - distance)))

  near, far = score(10, 3), score(100_010, 3)
  assert abs(near - far) < 1e-5
  assert abs(near - score(10, 4)) > 1e-3


def test_rotation_keeps_bfloat16_and_computes_in_float32():
  x = jnp.linspace(-1, 1, 16, dtype=jnp.bfloat16).reshape(1, 1, 1, 16)
  angles = jnp.full((1, 8), 0.7)
  turned = rope.rotate(x, angles)
  assert turned.dtype == jnp.bfloat16
  exact = rope.rotate(x.astype(jnp.float32), angles).astype(jnp.bfloat16)
  np.testing.assert_array_equal(
    np.asarray(turned, np.float32), np.asarray(exact, np.float32)
  )
