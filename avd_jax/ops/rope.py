"""Rotary positions over (frame, height, width), exact at any frame.

Wan's layout: a head's d dims split into frame, height and width parts, each
with its own frequencies theta^(-2i/d_part), rotated in interleaved pairs.

Angles are computed, never tabled, so no length is the last one. They are also
computed *modulo a turn in integers*: a position times a frequency held as a
32-bit fraction of a turn wraps exactly where the angle does. A float32 product
loses 6e-5 rad at frame 1,000 and all of it near frame 10 million; this one is
off by at most pi * 2^-32 rad a frame: 7e-7 at 1,000, 7e-5 at 100,000.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from avd_jax.errors import UserError


def axis_dims(head_dim: int) -> tuple[int, int, int]:
  """Splits a head's dims into (frame, height, width) parts, as Wan does.

  Raises:
    UserError: a head dim that leaves an odd part or an axis without dims.
  """
  space = 2 * (head_dim // 6)
  frame = head_dim - 2 * space
  if space == 0 or frame % 2:
    raise UserError(
      f"head dim {head_dim}: rotary positions need an even head dim of at"
      " least 6; change model.dim or model.num_heads"
    )
  return frame, space, space


def axis_angles(
  positions: Int[Array, "*p"], dim: int, theta: float
) -> Float[Array, "*p {dim//2}"]:
  """Angles in [-pi, pi) of integer positions for one axis of `dim` dims."""
  turns = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim) / (2 * np.pi)
  phase = np.round(turns * 2.0**32).astype(np.uint64).astype(np.uint32)
  wrapped = positions.astype(jnp.uint32)[..., None] * phase  # mod 2^32: a turn
  signed = jax.lax.bitcast_convert_type(wrapped, jnp.int32)
  return signed.astype(jnp.float32) * np.float32(2 * np.pi / 2**32)


def grid_angles(
  frames: Int[Array, "f"],
  height: int,
  width: int,
  head_dim: int,
  theta: float = 10_000.0,
) -> Float[Array, "f*{height*width} {head_dim//2}"]:
  """Angles of the tokens of some frames, in (frame, height, width) order."""
  dims = axis_dims(head_dim)
  axes = (frames, jnp.arange(height), jnp.arange(width))
  parts = [
    axis_angles(axis.astype(jnp.int32), dim, theta)
    for axis, dim in zip(axes, dims, strict=True)
  ]
  shape = (frames.shape[0], height, width)
  grid = [
    jnp.broadcast_to(
      part.reshape([-1 if i == j else 1 for j in range(3)] + [part.shape[-1]]),
      shape + part.shape[-1:],
    )
    for i, part in enumerate(parts)
  ]
  return jnp.concatenate(grid, -1).reshape(-1, head_dim // 2)


def rotate(
  x: Float[Array, "b *s a d"], angles: Float[Array, "*s d//2"]
) -> Float[Array, "b *s a d"]:
  """Rotates interleaved pairs (x_0, x_1), (x_2, x_3), ... in float32."""
  cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  even, odd = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
  return turned.reshape(x.shape).astype(x.dtype)
