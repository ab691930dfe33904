"""Routed attention by groups: queries gathered under the column they chose.

A query token attends to its own chunk and to the columns it chose. Its choices
are `t` slots; slots are grouped by column and cut into tiles of `block` rows,
so that every tile is dense attention of some rows to one chunk of keys: the
work is that of the pairs attended to, with nothing masked. Each slot's partial
result is brought back to its query and joined by log-sum-exp, exactly.

An `Engine` attends tile by tile, forward and backward. Everything else, the
custom derivative included, is shared: `grouped_loop` has a loop in plain JAX,
for CPUs, and `tpu_routed` a kernel. Only q, k, v, out, lse and the plan are
kept for the backward pass: probabilities are computed again, from the lse of
the whole softmax.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from avd_jax.errors import UserError
from avd_jax.ops import routing as routing_lib
from avd_jax.ops.kernels.grouped_loop import LOOP, PAD, Engine
from avd_jax.ops.kernels.grouped_plan import (
  OwnTiles,
  SlotTiles,
  num_tiles,
  plan,
)
from avd_jax.ops.masks import Sight
from avd_jax.ops.problem import Problem
from avd_jax.ops.reference import EMPTY
from avd_jax.ops.routing import Routing


def attend(
  q: Float[Array, "b q a d"],
  k: Float[Array, "b k a d"],
  v: Float[Array, "b k a d"],
  sight: Sight,
  *,
  routing: Routing | None = None,
  q_sink: Float[Array, "b q a d"] | None = None,
  block: int | None = None,
  engine: Engine | None = None,
) -> tuple[Float[Array, "b q a d"], Float[Array, "b q a"]]:
  """Attention of each query to its own chunk and to the chunks it chose.

  Args:
    q: queries, whole chunks of them.
    k: keys, one column after the other.
    v: values.
    sight: which columns may be chosen, and which are the rows' own.
    routing: what choosing needs.
    q_sink: queries for the first `sight.sink` columns.
    block: rows of a tile; None leaves it to the engine.
    engine: what attends to the tiles; None for the loop on CPUs.

  Returns:
    (out, lse), differentiable both, in q, k, v and q_sink.

  Raises:
    UserError: without a routing.
  """
  if routing is None:
    raise UserError(
      "grouped attention groups queries by the history they choose: without"
      " routing there is nothing to group"
    )
  engine = LOOP if engine is None else engine
  pairs = q.shape[1] * routing.top_k
  if sight.static:  # first chunks have less to choose from
    choices = np.minimum(sight.candidates().sum(1), routing.top_k)
    pairs = int(choices.sum()) * sight.tokens
  if block is None:
    block = _rows_of_a_tile(pairs, sight.history, *engine.block)
  if q_sink is not None and not sight.sink:
    q_sink = None
  own = jnp.asarray(sight.own, jnp.int32)

  def part(args):
    q, k, v, q_sink, described, choosing = args
    asked = routing._replace(descriptors=described, q=choosing)
    chosen = routing_lib.choose(q, sight, asked, q_sink)
    grouped = plan(chosen, sight.history, block, pairs)
    static = _Static(engine, block, sight.tokens, sight.sink)
    return _attend(static, q, q_sink, k, v, own, grouped)

  b, length, heads = q.shape[:3]
  tiles = num_tiles(pairs, sight.history, block)
  many, few = _turns(b, heads, tiles, engine.tiles)
  args = (q, k, v, q_sink, routing.descriptors, routing.q)
  if many == few == 1:
    return part(args)

  def split(x):
    x = x.reshape(many, b // many, x.shape[1], few, heads // few, x.shape[3])
    x = x.transpose(0, 3, 1, 2, 4, 5)
    return x.reshape(many * few, *x.shape[2:])

  def join(x):
    x = x.reshape(many, few, *x.shape[1:])
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(b, length, heads, *x.shape[5:])

  out, lse = jax.lax.map(part, jax.tree.map(split, args))
  return join(out), join(lse)


def refuses(problem: Problem) -> str | None:
  """Why this cannot do a problem, in one sentence; None if it can."""
  if problem.top_k is None:
    return (
      "grouped attention needs routing: model.attention.routing_top_k of 1 or"
      " more"
    )
  return None


def _rows_of_a_tile(pairs: int, columns: int, least: int, most: int) -> int:
  share = max(pairs // max(columns, 1), 1)
  return min(max(1 << (share.bit_length() - 1), least), most)


def _turns(b: int, heads: int, tiles: int, most: int | None):
  """In how many parts to cut batch and heads, for calls of `most` tiles."""
  if most is None:
    return 1, 1
  cuts = lambda n: [c for c in range(1, n + 1) if n % c == 0]
  for few in cuts(heads):
    if b * (heads // few) * tiles <= most:
      return 1, few
  for many in cuts(b):
    if (b // many) * tiles <= most:
      return many, heads
  return b, heads


def _by_head(x):
  return jnp.swapaxes(x, 1, 2)


def _sum(x):
  """Over choices [b a t q d]; XLA's own sum is tens of times slower on CPUs."""
  return sum(x[:, :, i] for i in range(1, x.shape[2])) + x[:, :, 0]


def _own_queries(q, q_sink, own, sink, tokens):
  """Queries [b a q d] for their own chunk, and whether that is a sink."""
  if q_sink is None:
    return q, None
  is_sink = jnp.repeat(own < sink, tokens)[:, None]
  return jnp.where(is_sink, q_sink, q), is_sink


class _Static(NamedTuple):
  """What is known while tracing."""

  engine: Engine
  block: int
  tokens: int
  sink: int


def _own_tiles(static, length):
  engine, _, tokens, _ = static
  return OwnTiles.of(length // tokens, tokens, engine.own_block, engine.align)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, q_sink, k, v, own, plan):
  return _forward(static, q, q_sink, k, v, own, plan)[0]


def _forward(static, q, q_sink, k, v, own, plan):
  engine, block, tokens, sink = static
  kept = (q, q_sink, k, v, own, plan)
  q, q_sink = jax.tree.map(_by_head, (q, q_sink))
  b, a, length, _ = q.shape

  mine = _own_tiles(static, length)
  met, _ = _own_queries(q, q_sink, own, sink, tokens)
  out, lse = map(
    mine.join,
    engine.forward(mine.cut(met), mine.column(own, b, a), k, v, tokens),
  )
  slots = SlotTiles(plan, block, sink)
  outs, lses = engine.forward(slots.cut(q, q_sink), plan.column, k, v, tokens)
  outs, lses = slots.join(outs, 0.0), slots.join(lses, EMPTY)

  top = jnp.maximum(lse, jnp.max(lses, 2))
  weight, weights = jnp.exp(lse - top), jnp.exp(lses - top[:, :, None])
  total = weight + jnp.sum(weights, 2)
  out = weight[..., None] * out.astype(jnp.float32)
  out += _sum(weights[..., None] * outs.astype(jnp.float32))
  out = _by_head((out / total[..., None]).astype(q.dtype))
  lse = _by_head(top + jnp.log(total))
  return (out, lse), (*kept, out, lse)


def _backward(static, kept, cotangents):
  engine, block, tokens, sink = static
  q, q_sink, k, v, own, plan, out, lse = kept
  dout, dlse = cotangents
  delta = jnp.sum(out.astype(jnp.float32) * dout, -1) - dlse
  args = (q, q_sink, dout.astype(q.dtype), lse, delta)
  q, q_sink, dout, lse, delta = jax.tree.map(_by_head, args)
  b, a, length, _ = q.shape

  def used(gradients, column):
    """Zeros in columns without tiles, which an engine leaves undefined."""
    ids = jnp.arange(k.shape[1] // tokens)
    some = (column[..., None] == ids).any(2)  # [b a c]
    some = jnp.repeat(_by_head(some), tokens, 1)[..., None]
    return [jnp.where(some, x, 0) for x in gradients]

  mine = _own_tiles(static, length)
  column = mine.column(own, b, a)
  met, own_sink = _own_queries(q, q_sink, own, sink, tokens)
  dq, *dkv = engine.backward(
    mine.cut(met),
    mine.cut(dout),
    # Of padding, which so gets a probability of 0; its delta may be any.
    mine.cut(lse, PAD),
    mine.cut(delta),
    column,
    k,
    v,
    tokens,
  )
  dq = mine.join(dq).astype(jnp.float32)
  dkv = used(dkv, column)

  slots = SlotTiles(plan, block, sink)
  dqs, *more = engine.backward(
    slots.cut(q, q_sink),
    slots.cut(dout),
    slots.cut(lse, empty=PAD),
    slots.cut(delta),
    plan.column,
    k,
    v,
    tokens,
  )
  more = used(more, plan.column)
  dk, dv = (
    (x + y).astype(z.dtype) for x, y, z in zip(dkv, more, (k, v), strict=True)
  )
  dqs = slots.join(dqs, 0.0).astype(jnp.float32)
  back = lambda x: _by_head(x).astype(kept[0].dtype)
  if q_sink is None:
    return back(dq + _sum(dqs)), None, dk, dv, None, None
  is_sink = slots.is_sink()[..., None]
  dq_sink = jnp.where(own_sink, dq, 0.0) + _sum(jnp.where(is_sink, dqs, 0.0))
  dq = jnp.where(own_sink, 0.0, dq) + _sum(jnp.where(is_sink, 0.0, dqs))
  return back(dq), back(dq_sink), dk, dv, None, None


_attend.defvjp(_forward, _backward)
