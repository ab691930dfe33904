"""Tiles of rows attending each to one chunk of keys, on CPUs.

`Engine` is what does this anywhere. The one here is a loop in plain JAX over
the tiles that are there: how long it takes goes with the rows that attend, not
with how much history they chose from.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

# The lse of padding rows on the way back: exp(logit - PAD) is 0.
PAD = 1e30
AT_ONCE = 4  # tiles of one turn of the loop


class Engine(NamedTuple):
  """Dense attention of tiles of rows, each to one column of keys.

  Attributes:
    forward: (q [b a p s d], column [b a p], k [b k a d], v, tokens) to
      (out [b a p s d], lse [b a p s]). What tiles without a column give is
      never read.
    backward: (q, dout, lse, delta, column, k, v, tokens), as above, delta
      [b a p s] the sum(out * dout) - dlse, to (dq [b a p s d], dk [b k a d]
      float32, dv). A column without tiles may give anything.
    block: bounds on the rows of a tile: the largest power of two within them
      that the slots of an average column fill.
    own_block: most rows of a tile of a chunk's attention to itself.
    align: what the rows of such a tile are a multiple of.
    tiles: most tiles of one call, over batch and heads: more run in turns.
  """

  forward: Callable
  backward: Callable
  block: tuple[int, int]
  own_block: int
  align: int = 1
  tiles: int | None = None


def _turn(column: Int[Array, "b a p"], tokens: int):
  """(how many turns, turn): real tiles only, several at a time.

  turn(i) gives the tiles [w] of a turn as indices into all of them, flat, with
  n where the last turn has too few; the same below n; where their chunks start;
  and what fetches those chunks, of keys or of values, as [w tokens d].
  """
  _, a, p = column.shape
  flat = column.reshape(-1)
  n = flat.size
  real = flat >= 0
  place = jnp.where(real, jnp.cumsum(real) - 1, n + AT_ONCE)
  order = jnp.full((n + AT_ONCE,), n, jnp.int32)
  order = order.at[place].set(jnp.arange(n, dtype=jnp.int32), mode="drop")
  turns = -(-jnp.sum(real, dtype=jnp.int32) // AT_ONCE)

  def turn(i):
    tile = jax.lax.dynamic_slice_in_dim(order, i * AT_ONCE, AT_ONCE)
    safe = jnp.minimum(tile, n - 1)
    start = (safe // (a * p), flat[safe] * tokens, safe // p % a)

    def chunk(x):
      size = (1, tokens, 1, x.shape[-1])
      cut = lambda *at: jax.lax.dynamic_slice(x, (*at, 0), size)[0, :, 0]
      return jax.vmap(cut)(*start)

    return tile, safe, start, chunk

  return turns, turn


def _flat(x):
  """Tiles [b a p ...] as [n ...]."""
  return x.reshape(-1, *x.shape[3:])


def _put(x, tile, rows):
  """Writes tiles, in place within a loop; x has one more for the surplus."""
  for i in range(AT_ONCE):
    at = (tile[i],) + (0,) * (x.ndim - 1)
    x = jax.lax.dynamic_update_slice(x, rows[i : i + 1].astype(x.dtype), at)
  return x


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _loop_forward(q, column, k, v, tokens):
  shape, scale = q.shape, q.shape[-1] ** -0.5
  q = _flat(q)
  turns, turn = _turn(column, tokens)

  def body(i, carry):
    out, lse = carry
    tile, safe, _, chunk = turn(i)
    logits = _product("wsd,wkd->wsk", q[safe], chunk(k)) * scale
    top = jnp.max(logits, -1, keepdims=True)
    weight = jnp.exp(logits - top)
    total = jnp.sum(weight, -1, keepdims=True)
    part = _product("wsk,wkd->wsd", weight.astype(v.dtype), chunk(v)) / total
    part_lse = (top + jnp.log(total))[..., 0]
    return _put(out, tile, part), _put(lse, tile, part_lse)

  n, s, d = q.shape
  empty = jnp.zeros((n + 1, s, d), q.dtype), jnp.zeros((n + 1, s), jnp.float32)
  out, lse = jax.lax.fori_loop(0, turns, body, empty)
  return out[:n].reshape(shape), lse[:n].reshape(shape[:-1])


def _loop_backward(q, dout, lse, delta, column, k, v, tokens):
  shape, scale = q.shape, q.shape[-1] ** -0.5
  q, dout, lse, delta = map(_flat, (q, dout, lse[..., None], delta[..., None]))
  turns, turn = _turn(column, tokens)
  n = len(q)

  def add(x, start, rows):
    for i in range(AT_ONCE):
      at = (start[0][i], start[2][i], start[1][i], 0)
      old = jax.lax.dynamic_slice(x, at, (1, 1, *rows.shape[1:]))
      x = jax.lax.dynamic_update_slice(x, old + rows[i], at)
    return x

  def body(i, carry):
    dq, dk, dv = carry
    tile, safe, start, chunk = turn(i)
    rows, keys, values, back = q[safe], chunk(k), chunk(v), dout[safe]
    # Surplus tiles add nothing: their probabilities are 0.
    level = jnp.where((tile < n)[:, None, None], lse[safe], PAD)
    logits = _product("wsd,wkd->wsk", rows, keys) * scale
    weight = jnp.exp(logits - level)
    slope = _product("wsd,wkd->wsk", back, values) - delta[safe]
    slope = (weight * slope * scale).astype(rows.dtype)
    weight = weight.astype(back.dtype)
    dv = add(dv, start, _product("wsk,wsd->wkd", weight, back))
    dk = add(dk, start, _product("wsk,wsd->wkd", slope, rows))
    dq = _put(dq, tile, _product("wsk,wkd->wsd", slope, keys))
    return dq, dk, dv

  # By head, so that what a tile adds to lies in one piece.
  zeros = jnp.zeros(jnp.swapaxes(k, 1, 2).shape, jnp.float32)
  empty = jnp.zeros((n + 1, *q.shape[1:]), q.dtype), zeros, zeros
  dq, dk, dv = jax.lax.fori_loop(0, turns, body, empty)
  dk, dv = jnp.swapaxes(dk, 1, 2), jnp.swapaxes(dv, 1, 2)
  return dq[:n].reshape(shape), dk, dv


# Measured on two cores: below 32 rows a chunk's keys are fetched too often for
# too little, above 128 nothing is gained.
LOOP = Engine(_loop_forward, _loop_backward, block=(32, 128), own_block=256)
