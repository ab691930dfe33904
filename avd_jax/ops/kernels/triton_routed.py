"""Attention to a query's own chunk and the history it chose, for GPUs.

Queries are grouped by the column they chose (`triton_plan`). Forward, one
kernel attends each slot to its column and a second attends each query to its
own chunk and folds in its slots' results; backward, the same for dq, and one
kernel for dk and dv that walks a column's own queries and its slots. Every
output has one writer: no atomics, the same result each time.

Where sinks are met by other queries, those stand below the queries in one
array, and a tile of a sink column reads from there.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from avd_jax.ops.kernels import triton_blocks as blk
from avd_jax.ops.kernels import triton_plan
from avd_jax.ops.kernels.compat import load, store
from avd_jax.ops.kernels.triton_blocks import EMPTY, Tile
from avd_jax.ops.kernels.triton_plan import Plan
from avd_jax.ops.masks import Sight
from avd_jax.ops.problem import Problem
from avd_jax.ops.reference import Out
from avd_jax.ops.routing import Routing


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Tiles of the kernels.

  Attributes:
    chosen: forward over slots; its q is the slots of a tile.
    own: forward over the own chunk.
    chosen_dq: backward over slots; its q must be that of `chosen`.
    own_dq: backward over the own chunk.
    dkv: backward over keys; its q divides that of `chosen`.
    plan: queries that choose at a time.
  """

  chosen: Tile
  own: Tile
  chosen_dq: Tile
  own_dq: Tile
  dkv: Tile
  plan: int

  def __post_init__(self):
    slots = self.chosen.q
    if self.chosen_dq.q != slots or slots % self.dkv.q:
      raise ValueError(
        f"tiles of {slots} slots: chosen_dq.q must be the same and dkv.q"
        f" divide it, not {self.chosen_dq.q} and {self.dkv.q}"
      )


HALF = Blocks(
  chosen=Tile(128, 64, 8, 3),
  own=Tile(128, 64, 8, 3),
  chosen_dq=Tile(128, 32, 8, 2),
  own_dq=Tile(128, 32, 8, 2),
  dkv=Tile(64, 128, 8, 2),
  plan=128,
)
FULL = Blocks(
  chosen=Tile(64, 32, 4, 1),
  own=Tile(64, 32, 4, 1),
  chosen_dq=Tile(64, 16, 4, 1),
  own_dq=Tile(64, 16, 4, 1),
  dkv=Tile(16, 64, 4, 1),
  plan=64,
)


def default_blocks(dtype: jnp.dtype) -> Blocks:
  """Tiles that fit the registers of an H100 at head_dim 128.

  But float32's, which spill there: right, and slow.
  """
  if dtype == jnp.float32:
    return FULL
  # float16 queries choose in float32.
  return HALF if dtype == jnp.bfloat16 else dataclasses.replace(HALF, plan=64)


@dataclasses.dataclass(frozen=True)
class _Call:
  """What the kernels need besides arrays.

  Attributes:
    tokens: of a chunk.
    queries: of a head, short of those for sinks.
    sink: columns that other queries meet; 0 where none do.
    blocks: tiles.
    interpret: run without a GPU.
  """

  tokens: int
  queries: int
  sink: int
  blocks: Blocks
  interpret: bool

  def offset(self, column):
    """How far down stand the queries that meet a column."""
    if not self.sink:
      return 0
    return jnp.where(column < self.sink, jnp.int32(self.queries), jnp.int32(0))


def attend_slots(
  column_ref, query_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, *, call
):
  """One tile of slots against its column."""
  column = column_ref[pl.program_id(0)]

  @pl.when(column >= 0)
  def _():
    query = query_ref[...]
    rows = jnp.maximum(query, 0) + call.offset(column)
    q = blk.load_rows(q_ref, rows)
    carry = blk.over(
      column * call.tokens,
      call.tokens,
      call.blocks.chosen.k,
      blk.adding_keys(q, k_ref, v_ref),
      blk.no_keys(*q.shape),
    )
    out, lse = blk.normalise(carry)
    out_ref[...] = out.astype(out_ref.dtype)
    lse_ref[...] = jnp.where(query >= 0, lse, EMPTY)


def attend_own(
  own_ref, slot_ref, q_ref, k_ref, v_ref, part_ref, part_lse_ref, out_ref,
  lse_ref, *, call,
):  # fmt: skip
  """One tile of queries against its own chunk, and its slots' results."""
  tile, chunk = call.blocks.own, pl.program_id(2)
  rows, to, valid = blk.tile_rows(chunk, pl.program_id(0), tile.q, call.tokens)
  column = own_ref[chunk]
  q = blk.load_rows(q_ref, rows + call.offset(column))
  carry = blk.over(
    column * call.tokens,
    call.tokens,
    tile.k,
    blk.adding_keys(q, k_ref, v_ref),
    blk.no_keys(*q.shape),
  )
  for t in range(slot_ref.shape[0]):
    slot = load(slot_ref.at[t, rows])
    some = slot >= 0
    slot = jnp.maximum(slot, 0)
    lse = jnp.where(some, load(part_lse_ref.at[slot]), EMPTY)
    out = blk.load_rows(part_ref, slot, some)
    carry = blk.adding_branch(carry, out.astype(jnp.float32), lse)
  out, lse = blk.normalise(carry)
  blk.store_rows(out_ref, to, out, valid)
  store(lse_ref.at[to], lse, mask=valid)


def slots_dq(
  column_ref, query_ref, q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref,
  dq_ref, *, call,
):  # fmt: skip
  """The part of dq that comes through one tile of slots."""
  column = column_ref[pl.program_id(0)]

  @pl.when(column >= 0)
  def _():
    rows = jnp.maximum(query_ref[...], 0)
    q = blk.load_rows(q_ref, rows + call.offset(column))
    body = blk.adding_dq(
      q,
      blk.load_rows(do_ref, rows),
      load(lse_ref.at[rows]),
      load(delta_ref.at[rows]),
      k_ref,
      v_ref,
    )
    dq = blk.over(
      column * call.tokens,
      call.tokens,
      call.blocks.chosen_dq.k,
      body,
      blk.no_gradient(q),
    )
    dq_ref[...] = dq.astype(dq_ref.dtype)


def own_dq(
  own_ref, last_ref, slot_ref, q_ref, do_ref, lse_ref, delta_ref, k_ref,
  v_ref, part_ref, dq_ref, *, call,
):  # fmt: skip
  """dq of one tile of queries, or of queries for sinks: own chunk and slots."""
  tile, stacked = call.blocks.own_dq, pl.program_id(2)
  chunks = call.queries // call.tokens
  chunk, on = stacked, None
  if call.sink:  # chunks of queries for sinks follow the others
    for_sinks = (stacked >= chunks).astype(jnp.int32)
    chunk = stacked - for_sinks * chunks
  rows, to, valid = blk.tile_rows(chunk, pl.program_id(0), tile.q, call.tokens)
  offset = (stacked - chunk) * call.tokens
  column = own_ref[chunk]
  if call.sink:
    on = (column < call.sink).astype(jnp.int32) == for_sinks
    on = on.astype(jnp.int32)
  q = blk.load_rows(q_ref, rows + offset)
  body = blk.adding_dq(
    q,
    blk.load_rows(do_ref, rows),
    load(lse_ref.at[rows]),
    load(delta_ref.at[rows]),
    k_ref,
    v_ref,
  )
  dq = blk.over(
    column * call.tokens, call.tokens, tile.k, body, blk.no_gradient(q), on
  )
  for t in range(slot_ref.shape[0]):
    slot = load(slot_ref.at[t, rows])
    some = slot >= 0
    if call.sink:  # slots of the first columns are the first slots
      end = last_ref[call.sink - 1] * call.blocks.chosen.q
      some &= (slot < end).astype(jnp.int32) == for_sinks
    part = blk.load_rows(part_ref, jnp.maximum(slot, 0), some)
    dq += part.astype(jnp.float32)
  blk.store_rows(dq_ref, to + offset, dq * q.shape[1] ** -0.5, valid)


def routed_dkv(
  row_ref, first_ref, last_ref, query_ref, q_ref, do_ref, lse_ref, delta_ref,
  k_ref, v_ref, dk_ref, dv_ref, *, call,
):  # fmt: skip
  """dk and dv of one tile of keys: its own queries, then its slots."""
  tile, column = call.blocks.dkv, pl.program_id(2)
  rows, to, valid = blk.tile_rows(column, pl.program_id(0), tile.k, call.tokens)
  k, v = blk.load_rows(k_ref, rows), blk.load_rows(v_ref, rows)
  add = blk.adding_dkv(
    k, v, q_ref, do_ref, lse_ref, delta_ref, call.offset(column)
  )
  row = row_ref[column]
  carry = blk.over(
    jnp.maximum(row, 0) * call.tokens,
    call.tokens,
    tile.q,
    add,
    (blk.no_gradient(k), blk.no_gradient(v)),
    (row >= 0).astype(jnp.int32),
  )

  def of_slots(i, carry):
    query = load(query_ref.at[pl.ds(i * tile.q, tile.q)])
    return add(jnp.maximum(query, 0), query >= 0, carry)

  blocks = call.blocks.chosen.q // tile.q
  dk, dv = jax.lax.fori_loop(
    first_ref[column] * blocks, last_ref[column] * blocks, of_slots, carry
  )
  blk.store_rows(dk_ref, to, dk * k.shape[1] ** -0.5, valid)
  blk.store_rows(dv_ref, to, dv, valid)


def _forward(call, q, k, v, plan: Plan, own):
  b, _, a, d = q.shape
  blocks, chunks = call.blocks, call.queries // call.tokens
  head, token = blk.of_head, blk.of_tokens
  slots = blk.of_tile(blocks.chosen.q)
  places = plan.query_of.shape[2]
  kernel = lambda f: functools.partial(f, call=call)
  part, part_lse = blk.run(
    kernel(attend_slots),
    (plan.column_of.shape[2], b * a, 1),
    [(head, plan.column_of), (slots, plan.query_of)]
    + [(token, x) for x in (q, k, v)],
    [
      (slots, blk.like(q, (b, a, places, d))),
      (slots, blk.like(q, (b, a, places), jnp.float32)),
    ],
    blocks.chosen,
    call.interpret,
  )
  out, lse = blk.run(
    kernel(attend_own),
    (pl.cdiv(call.tokens, blocks.own.q), b * a, chunks),
    [(blk.shared, own), (head, plan.slot_of)]
    + [(token, x) for x in (q, k, v)]
    + [(head, part), (head, part_lse)],
    [
      (token, blk.like(q, (b, call.queries, a, d))),
      (head, blk.like(q, (b, a, call.queries), jnp.float32)),
    ],
    blocks.own,
    call.interpret,
  )
  return blk.to_front(out, lse), (q, k, v, out, lse, plan, own)


def _backward(call, residuals, cotangents):
  q, k, v, out, lse, plan, own = residuals
  do, dlse = cotangents
  b, stacked, a, d = q.shape
  blocks, columns = call.blocks, k.shape[1] // call.tokens
  head, token = blk.of_head, blk.of_tokens
  slots = blk.of_tile(blocks.chosen.q)
  kernel = lambda f: functools.partial(f, call=call)
  rest = [
    (token, q),
    (token, do),
    (head, lse),
    (head, blk.delta(out, do, dlse)),
    (token, k),
    (token, v),
  ]
  (part,) = blk.run(
    kernel(slots_dq),
    (plan.column_of.shape[2], b * a, 1),
    [(head, plan.column_of), (slots, plan.query_of), *rest],
    [(slots, blk.like(q, (b, a, plan.query_of.shape[2], d)))],
    blocks.chosen_dq,
    call.interpret,
  )
  (dq,) = blk.run(
    kernel(own_dq),
    (pl.cdiv(call.tokens, blocks.own_dq.q), b * a, stacked // call.tokens),
    [
      (blk.shared, own),
      (head, plan.last),
      (head, plan.slot_of),
      *rest,
      (head, part),
    ],
    [(token, blk.like(q))],
    blocks.own_dq,
    call.interpret,
  )
  row_of = jnp.full((columns,), -1, jnp.int32)
  row_of = row_of.at[own].set(jnp.arange(len(own), dtype=jnp.int32))
  dk, dv = blk.run(
    kernel(routed_dkv),
    (pl.cdiv(call.tokens, blocks.dkv.k), b * a, columns),
    [(blk.shared, row_of)]
    + [(head, x) for x in (plan.first, plan.last, plan.query_of)]
    + rest,
    [(token, blk.like(k)), (token, blk.like(v))],
    blocks.dkv,
    call.interpret,
  )
  return dq, dk, dv, None, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, q, k, v, plan: Plan, own):
  return _forward(call, q, k, v, plan, own)[0]


_attend.defvjp(_forward, _backward)


def attend(
  q: Float[Array, "b q a d"],
  k: Float[Array, "b k a d"],
  v: Float[Array, "b k a d"],
  sight: Sight,
  *,
  routing: Routing,
  q_sink: Float[Array, "b q a d"] | None = None,
  interpret: bool = False,
  blocks: Blocks | None = None,
) -> Out:
  """Attention of each query to its own chunk and those it chooses.

  Args:
    q: queries, `rows * tokens` of them.
    k: keys, `columns * tokens`.
    v: values.
    sight: what may be chosen.
    routing: how.
    q_sink: other queries, for the sink columns.
    interpret: run without a GPU, for tests.
    blocks: tiles; None takes the defaults of the dtype.

  Returns:
    (out [b q a d] in q's dtype, natural-log lse [b q a] float32), to be
    differentiated through both.
  """
  blocks = blocks or default_blocks(q.dtype)
  with_sinks = q_sink is not None and sight.sink > 0
  plan = triton_plan.plan(
    q,
    sight,
    routing,
    q_sink if with_sinks else None,
    blocks.plan,
    blocks.chosen.q,
    interpret,
  )
  sink = sight.sink if with_sinks else 0
  call = _Call(sight.tokens, q.shape[1], sink, blocks, interpret)
  stacked = jnp.concatenate([q, q_sink], 1) if with_sinks else q
  return _attend(call, stacked, k, v, plan, jnp.asarray(sight.own, jnp.int32))


def refuses(problem: Problem) -> str | None:
  """Why not, or None."""
  if problem.top_k is None and (problem.static or problem.prefix):
    return "routed kernels need model.attention.routing_top_k of 1 or more"
  return blk.refuses(problem)
