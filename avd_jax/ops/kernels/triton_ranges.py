"""Dense attention over a few ranges of keys, for GPUs.

Under a structured mask a chunk of queries sees a few contiguous ranges of
keys (sinks | window or all history | its own chunk), and a chunk of keys is
seen by a few ranges of queries. Three kernels walk those: nothing is computed
that the mask hides, but for the last block of a range.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from avd_jax.ops import reference
from avd_jax.ops.kernels import triton_blocks as blk
from avd_jax.ops.kernels.compat import load, store
from avd_jax.ops.kernels.triton_blocks import Tile
from avd_jax.ops.masks import Sight
from avd_jax.ops.problem import Problem
from avd_jax.ops.reference import Out
from avd_jax.ops.routing import Routing


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Tiles of the three kernels."""

  forward: Tile
  dq: Tile
  dkv: Tile


HALF = Blocks(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2))
FULL = Blocks(Tile(64, 32, 4, 1), Tile(64, 16, 4, 1), Tile(16, 64, 4, 1))


def default_blocks(dtype: jnp.dtype) -> Blocks:
  """Tiles that fit the registers of an H100 at head_dim 128.

  But float32's, which spill there: right, and slow.
  """
  return FULL if dtype == jnp.float32 else HALF


class Spans(NamedTuple):
  """Ranges of tokens that chunks attend to, or are attended to by.

  Attributes:
    order: [n], chunks, those with most work first.
    tokens: [n r 2], half-open ranges of each chunk, maybe empty.
  """

  order: Int[Array, "n"]
  tokens: Int[Array, "n r 2"]


def _spans(table: np.ndarray, tokens: int) -> Spans:
  """The ranges of true columns in each row of a table."""
  runs = [Sight(table, table, tokens, 0).runs(r) for r in range(len(table))]
  spans = np.zeros((len(table), max(1, *map(len, runs)), 2), np.int32)
  for row, found in zip(spans, runs, strict=True):
    row[: len(found)] = np.reshape(found, (-1, 2))
  order = np.argsort(-table.sum(1), kind="stable").astype(np.int32)
  return Spans(jnp.asarray(order), jnp.asarray(spans * tokens))


def _tables(sight: Sight, first: int, last: int) -> tuple[Spans, Spans]:
  """Spans of rows and of columns, columns [first, last) alone being seen."""
  columns = sight.sees.shape[1]
  at = np.arange(columns)
  if sight.static:
    table = sight.sees & (first <= at) & (at < last)
    return _spans(table, sight.tokens), _spans(table.T, sight.tokens)
  stop = jnp.clip(sight.count, first, last)
  row = jnp.stack([jnp.asarray(first), stop]).astype(jnp.int32)
  seen = ((first <= at) & (at < stop)).astype(jnp.int32)
  column = jnp.stack([jnp.zeros_like(seen), seen], -1)
  return (
    Spans(jnp.zeros((1,), jnp.int32), row[None, None] * sight.tokens),
    Spans(jnp.arange(columns), column[:, None] * sight.tokens),
  )


def _over_spans(spans_ref, chunk, size, body, carry):
  """Walks the ranges of a chunk."""

  def span(r, carry):
    start = spans_ref[chunk, r, 0]
    return blk.over(start, spans_ref[chunk, r, 1] - start, size, body, carry)

  return jax.lax.fori_loop(0, spans_ref.shape[1], span, carry)


def ranges_forward(
  order_ref, spans_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, tokens, tile
):
  """One tile of queries against the ranges that its chunk sees."""
  chunk = order_ref[pl.program_id(2)]
  rows, to, valid = blk.tile_rows(chunk, pl.program_id(0), tile.q, tokens)
  q = blk.load_rows(q_ref, rows)
  body = blk.adding_keys(q, k_ref, v_ref)
  carry = _over_spans(spans_ref, chunk, tile.k, body, blk.no_keys(*q.shape))
  out, lse = blk.normalise(carry)
  blk.store_rows(out_ref, to, out, valid)
  store(lse_ref.at[to], lse, mask=valid)


def ranges_dq(
  order_ref, spans_ref, q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref,
  dq_ref, *, tokens, tile,
):  # fmt: skip
  """dq of one tile of queries."""
  chunk = order_ref[pl.program_id(2)]
  rows, to, valid = blk.tile_rows(chunk, pl.program_id(0), tile.q, tokens)
  q, do = blk.load_rows(q_ref, rows), blk.load_rows(do_ref, rows)
  lse, delta = load(lse_ref.at[rows]), load(delta_ref.at[rows])
  body = blk.adding_dq(q, do, lse, delta, k_ref, v_ref)
  dq = _over_spans(spans_ref, chunk, tile.k, body, blk.no_gradient(q))
  blk.store_rows(dq_ref, to, dq * q.shape[1] ** -0.5, valid)


def ranges_dkv(
  order_ref, spans_ref, q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref,
  dk_ref, dv_ref, *, tokens, tile,
):  # fmt: skip
  """dk and dv of one tile of keys, from all queries that see it."""
  chunk = order_ref[pl.program_id(2)]
  rows, to, valid = blk.tile_rows(chunk, pl.program_id(0), tile.k, tokens)
  k, v = blk.load_rows(k_ref, rows), blk.load_rows(v_ref, rows)
  body = blk.adding_dkv(k, v, q_ref, do_ref, lse_ref, delta_ref)
  start = blk.no_gradient(k), blk.no_gradient(v)
  dk, dv = _over_spans(spans_ref, chunk, tile.q, body, start)
  blk.store_rows(dk_ref, to, dk * k.shape[1] ** -0.5, valid)
  blk.store_rows(dv_ref, to, dv, valid)


@dataclasses.dataclass(frozen=True)
class _Call:
  """What the kernels need besides arrays."""

  tokens: int
  blocks: Blocks
  interpret: bool


def _run(kernel, call: _Call, spans: Spans, tile: Tile, size: int, ins, outs):
  """Runs a kernel on tiles of `size` rows of the chunks of `spans`.

  `ins` and `outs` are arrays [b s a d] or [b a s] (outs: their shapes).
  """
  b, _, a, _ = ins[0].shape
  spec = lambda x: (blk.of_tokens if x.ndim == 4 else blk.of_head, x)
  return blk.run(
    functools.partial(kernel, tokens=call.tokens, tile=tile),
    (pl.cdiv(call.tokens, size), b * a, len(spans.order)),
    [(blk.shared, x) for x in spans] + [spec(x) for x in ins],
    [spec(x) for x in outs],
    tile,
    call.interpret,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, q, k, v, rows: Spans, columns: Spans):
  return _forward(call, q, k, v, rows, columns)[0]


def _forward(call, q, k, v, rows, columns):
  b, queries, a, _ = q.shape
  outs = [blk.like(q), blk.like(q, (b, a, queries), jnp.float32)]
  tile = call.blocks.forward
  out, lse = _run(ranges_forward, call, rows, tile, tile.q, (q, k, v), outs)
  return blk.to_front(out, lse), (q, k, v, out, lse, rows, columns)


def _backward(call, residuals, cotangents):
  q, k, v, out, lse, rows, columns = residuals
  do, dlse = cotangents
  ins = (q, do, lse, blk.delta(out, do, dlse), k, v)
  tile = call.blocks.dq
  (dq,) = _run(ranges_dq, call, rows, tile, tile.q, ins, [blk.like(q)])
  tile = call.blocks.dkv
  outs = [blk.like(k), blk.like(v)]
  dk, dv = _run(ranges_dkv, call, columns, tile, tile.k, ins, outs)
  return dq, dk, dv, None, None


_attend.defvjp(_forward, _backward)


def attend(
  q: Float[Array, "b q a d"],
  k: Float[Array, "b k a d"],
  v: Float[Array, "b k a d"],
  sight: Sight,
  *,
  routing: Routing | None = None,
  q_sink: Float[Array, "b q a d"] | None = None,
  interpret: bool = False,
  blocks: Blocks | None = None,
) -> Out:
  """Attention of each row of chunks to the columns it sees.

  Args:
    q: queries, `rows * tokens` of them.
    k: keys, `columns * tokens`.
    v: values.
    sight: a static one, or a prefix (`count`) of one row.
    routing: not here; must be None.
    q_sink: other queries, for the sink columns.
    interpret: run without a GPU, for tests.
    blocks: tiles; None takes the defaults of the dtype.

  Returns:
    (out [b q a d] in q's dtype, natural-log lse [b q a] float32), to be
    differentiated through both.

  Raises:
    ValueError: with a routing, or a traced mask that is no prefix.
  """
  if routing is not None or not (sight.static or sight.count is not None):
    raise ValueError("ranges do neither routing nor traced masks without count")
  call = _Call(sight.tokens, blocks or default_blocks(q.dtype), interpret)
  columns = sight.sees.shape[1]
  if q_sink is None or not sight.sink:
    return _attend(call, q, k, v, *_tables(sight, 0, columns))
  rest = _attend(call, q, k, v, *_tables(sight, sight.sink, columns))
  sinks = _attend(call, q_sink, k, v, *_tables(sight, 0, sight.sink))
  return reference.merge(rest, sinks)


def refuses(problem: Problem) -> str | None:
  """Why not, or None."""
  if problem.top_k is not None:
    return (
      "ranges attend to all that is seen: model.attention.routing_top_k must be"
      " None"
    )
  if problem.capability is not None and 8.0 < problem.capability < 9.0:
    return (
      "ranges need 128 KiB of shared memory, which compute capability"
      f" {problem.capability} lacks"
    )
  if not (problem.static or problem.prefix):
    return "ranges need a mask known while tracing, or a cache seen as a prefix"
  return blk.refuses(problem)
