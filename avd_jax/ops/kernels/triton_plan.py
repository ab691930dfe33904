"""Choosing history and grouping queries by it, without the score matrix.

Routed attention works on tiles of queries that chose the same column, so that
every tile is dense. The first kernel scores a tile of queries against all
descriptors, takes the best k and counts who chose what; a small cumulative sum
of the counts says where each tile of each column starts; the second kernel
gives every choice its slot. There is no sort, and nothing of size [queries,
columns] leaves a kernel.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from avd_jax.ops import routing as routing_lib
from avd_jax.ops.kernels import triton_blocks as blk
from avd_jax.ops.kernels.compat import dot, load, store
from avd_jax.ops.kernels.triton_blocks import Tile
from avd_jax.ops.masks import Sight
from avd_jax.ops.routing import NONE, Routing

WARPS = 4
SCORES = 128 * 64  # of a tile; more do not fit the registers of 4 warps


class Plan(NamedTuple):
  """Who attends to which column in which slot; tiles of slots share a column.

  Attributes:
    slot_of: [b a t q], the slot of a query's t-th choice; -1 for none.
    query_of: [b a p*s], the query in a slot; -1 for nobody.
    column_of: [b a p], the column of a tile; -1 for a tile that is not used.
    first: [b a c], the first tile of each column of keys.
    last: [b a c], the tile after its last one.
  """

  slot_of: Int[Array, "b a t q"]
  query_of: Int[Array, "b a p*s"]
  column_of: Int[Array, "b a p"]
  first: Int[Array, "b a c"]
  last: Int[Array, "b a c"]


def choose_history(
  may_ref, q_ref, *refs, tokens, rows, top_k, split, sink_rows
):
  """The best columns for one tile of queries, and how many chose each.

  Args:
    may_ref: [chunks, c], 1 where a chunk's queries may choose a column.
    q_ref: [q, d], maybe followed by the queries that meet sinks.
    *refs: descriptors [c, d], as summands from small to large; chosen [t, q]
      and counts [c], which are written.
    tokens: of a chunk.
    rows: of the tile.
    top_k: choices.
    split: how many first columns the sinks' queries score.
    sink_rows: where those queries start.
  """
  *parts, chosen_ref, count_ref = refs
  chunk = pl.program_id(2)
  read, write, valid = blk.tile_rows(chunk, pl.program_id(0), rows, tokens)
  columns = parts[0].shape[0]
  column = jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 1)

  def scores(read):
    q = blk.load_rows(q_ref, read)
    return sum(dot(q, part[...], trans_b=True) for part in parts)

  score = scores(read)
  if split:
    score = jnp.where(column < split, scores(read + sink_rows), score)
  may = load(may_ref.at[chunk, jnp.arange(columns)]) > 0
  score = jnp.where(may[None, :] & valid[:, None], score, -jnp.inf)
  taken = jnp.zeros((rows, columns), jnp.int32)
  for t in range(top_k):
    best = score.max(1)
    # The lowest of equals.
    pick = jnp.where(score == best[:, None], column, columns).min(1)
    pick = jnp.where(best > -jnp.inf, pick, NONE)
    store(chosen_ref.at[t, write], pick, mask=valid)
    hit = column == pick[:, None]
    taken += hit.astype(jnp.int32)
    score = jnp.where(hit, -jnp.inf, score)
  count_ref[...] = taken.sum(0)


def give_slots(
  chosen_ref, base_ref, _, slot_ref, query_ref, *, tokens, rows, top_k
):
  """Slots for the choices of one tile of queries.

  Args:
    chosen_ref: [t, q].
    base_ref: [c], the first slot in each column for this tile.
    _: query_ref's buffer, all -1.
    slot_ref: [t, q], written.
    query_ref: [slots], written where a choice is.
    tokens: of a chunk.
    rows: of the tile.
    top_k: choices.
  """
  read, write, valid = blk.tile_rows(
    pl.program_id(2), pl.program_id(0), rows, tokens
  )
  columns = base_ref.shape[0]
  column = jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 1)
  chosen = [
    jnp.where(valid, load(chosen_ref.at[t, read]), NONE) for t in range(top_k)
  ]
  taken = sum((column == c[:, None]).astype(jnp.bfloat16) for c in chosen)
  # Ranks inside the tile: how many rows above took the same column.
  above = jax.lax.broadcasted_iota(jnp.int32, (rows, rows), 1)
  above = above < jax.lax.broadcasted_iota(jnp.int32, (rows, rows), 0)
  rank = dot(above.astype(jnp.bfloat16), taken).astype(jnp.int32)
  slot = rank + base_ref[...][None, :]
  for t, c in enumerate(chosen):
    mine = jnp.where(column == c[:, None], slot, 0).sum(1)
    some = c >= 0
    store(slot_ref.at[t, write], jnp.where(some, mine, NONE), mask=valid)
    # Nobody's slot is past the end, so that it is no other's in a masked store.
    mine = jnp.where(some, mine, query_ref.shape[0])
    store(query_ref.at[mine], write, mask=some)


def summands(x: Float[Array, "..."], dtype: jnp.dtype) -> list[jax.Array]:
  """Arrays, small to large, whose sum is float32 `x`, to multiply `dtype` by.

  Three bfloat16 hold the 24 bits of a float32, so that products with bfloat16
  queries are exact and only sums round, as in float32.
  """
  if dtype != jnp.bfloat16:
    return [x]
  parts = []
  for _ in range(3):
    # A cast there and back is an identity to XLA, which may drop it.
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    parts.append(high.astype(jnp.bfloat16))
    x = x - high
  return parts[::-1]


def tile_count(sight: Sight, top_k: int, slots: int) -> int:
  """Tiles of `slots` that any choice of top_k fits in, at least one."""
  if sight.static:
    chosen = np.minimum(sight.candidates().sum(1), top_k).sum()
  else:
    chosen = sight.sees.shape[0] * min(top_k, sight.history)
  filled = int(chosen) * sight.tokens
  # Each column may end in a tile that is all but empty.
  return max(1, (filled + sight.history * (slots - 1)) // slots)


def _grid(sight: Sight, rows: int, b: int, a: int) -> tuple[int, int, int]:
  return pl.cdiv(sight.tokens, rows), b * a, sight.sees.shape[0]


def _of_counts(grid: tuple[int, int, int]) -> blk.Spec:
  """The counts of one tile, of an array [b a n c]."""

  def spec(x):
    heads, columns = x.shape[1], x.shape[3]
    return pl.BlockSpec(
      (None, None, None, columns),
      lambda t, i, chunk: (i // heads, i % heads, chunk * grid[0] + t, 0),
    )

  return spec


def _padded(columns: int) -> int:
  return max(blk.SMALLEST, pl.next_power_of_2(columns))


def choose(
  q: Float[Array, "b s a d"],
  sight: Sight,
  routing: Routing,
  top_k: int,
  rows: int,
  interpret: bool,
) -> tuple[Int[Array, "b a t q"], Int[Array, "b a n f"]]:
  """What every query chooses, as `routing.choose`, and counts per tile.

  Args:
    q: queries that choose; where sink columns are scored by others, those
      follow them.
    sight: a static one.
    routing: with columns in order.
    top_k: choices, no more than there are columns of history.
    rows: of a tile.
    interpret: run without a GPU.

  Returns:
    (columns, best first, -1 for none; counts of each tile, columns padded to
    a power of two).
  """
  b, stacked, a, _ = q.shape
  queries = sight.sees.shape[0] * sight.tokens
  columns = _padded(sight.history)
  pad = columns - sight.history
  may = jnp.asarray(np.pad(sight.candidates(), ((0, 0), (0, pad))), jnp.int32)
  described = jnp.pad(routing.descriptors, ((0, 0), (0, pad), (0, 0), (0, 0)))
  if q.dtype == jnp.float16:
    q = q.astype(jnp.float32)
  parts = summands(described, q.dtype)
  grid = _grid(sight, rows, b, a)
  like = lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  return blk.run(
    functools.partial(
      choose_history,
      tokens=sight.tokens,
      rows=rows,
      top_k=top_k,
      split=sight.sink if stacked > queries else 0,
      sink_rows=queries,
    ),
    grid,
    [(blk.shared, may)] + [(blk.of_tokens, x) for x in (q, *parts)],
    [
      (blk.of_head, like((b, a, top_k, queries))),
      (_of_counts(grid), like((b, a, grid[0] * grid[2], columns))),
    ],
    Tile(rows, columns, WARPS, 1),
    interpret,
  )


def count(
  chosen: Int[Array, "b a t q"], sight: Sight, rows: int
) -> Int[Array, "b a n f"]:
  """Counts per tile of rows, for choices made elsewhere."""
  b, a, top_k, _ = chosen.shape
  chunks, tiles = sight.sees.shape[0], pl.cdiv(sight.tokens, rows)
  x = chosen.reshape(b, a, top_k, chunks, sight.tokens)
  x = jnp.pad(
    x, [(0, 0)] * 4 + [(0, tiles * rows - sight.tokens)], constant_values=NONE
  ).reshape(b, a, top_k, chunks * tiles, rows)
  columns = jnp.arange(_padded(sight.history), dtype=jnp.int32)
  return (x[..., None] == columns).sum((2, 4), dtype=jnp.int32)


def group(
  chosen: Int[Array, "b a t q"],
  counts: Int[Array, "b a n f"],
  sight: Sight,
  rows: int,
  slots: int,
  interpret: bool,
) -> Plan:
  """Slots for choices, each column's slots filling tiles of its own.

  Args:
    chosen: columns of history, -1 for none.
    counts: of each tile of `rows` queries.
    sight: of the queries.
    rows: of a tile of queries.
    slots: of a tile of slots.
    interpret: run without a GPU.
  """
  b, a, top_k, _ = chosen.shape
  columns = counts.shape[-1]
  tiles = tile_count(sight, top_k, slots)
  used = (counts.sum(2) + slots - 1) // slots
  last = jnp.cumsum(used, -1)
  first = last - used
  base = jnp.cumsum(counts, 2) - counts + first[:, :, None] * slots
  tile = jnp.arange(tiles, dtype=jnp.int32)[:, None]
  column_of = (tile >= last[:, :, None]).sum(-1, dtype=jnp.int32)
  column_of = jnp.where(column_of < columns, column_of, NONE)
  empty = jnp.full((b, a, tiles * slots), NONE, jnp.int32)
  grid = _grid(sight, rows, b, a)
  slot_of, query_of = blk.run(
    functools.partial(give_slots, tokens=sight.tokens, rows=rows, top_k=top_k),
    grid,
    [(blk.of_head, chosen), (_of_counts(grid), base), (blk.of_head, empty)],
    [(blk.of_head, blk.like(chosen)), (blk.of_head, blk.like(empty))],
    Tile(rows, columns, WARPS, 1),
    interpret,
    aliases={2: 1},
  )
  beyond = sight.sees.shape[1] - sight.history
  of_columns = lambda x: jnp.pad(
    x[..., : sight.history], ((0, 0), (0, 0), (0, beyond))
  )
  return Plan(slot_of, query_of, column_of, of_columns(first), of_columns(last))


def plan(
  q: Float[Array, "b q a d"],
  sight: Sight,
  routing: Routing,
  q_sink: Float[Array, "b q a d"] | None,
  rows: int,
  slots: int,
  interpret: bool,
) -> Plan:
  """Chooses and groups; no gradient passes.

  Args:
    q: queries.
    sight: what they see.
    routing: what they choose by.
    q_sink: queries that meet the sink columns, or None.
    rows: of a tile of queries, at most.
    slots: of a tile of slots.
    interpret: run without a GPU.
  """
  top_k = max(1, min(routing.top_k, sight.history))
  rows = max(blk.SMALLEST, min(rows, SCORES // _padded(sight.history)))
  arrays = jax.lax.stop_gradient((q, routing._replace(top_k=None), q_sink))
  q, routing, q_sink = arrays
  routing = routing._replace(top_k=top_k)
  if not sight.static or routing.order is not None:
    # One chunk of queries: its scores are small, and XLA's own will do.
    chosen = routing_lib.choose(q, sight, routing, q_sink)
    chosen = chosen.transpose(0, 2, 3, 1)
    counts = count(chosen, sight, rows)
  else:
    if routing.q is not None:
      q = routing.q
    elif q_sink is not None and sight.sink:
      q = jnp.concatenate([q, q_sink], 1)
    chosen, counts = choose(q, sight, routing, top_k, rows, interpret)
  return group(chosen, counts, sight, rows, slots, interpret)
