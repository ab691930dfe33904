"""Queries grouped by the column they chose, and cut into tiles.

A query's choices are slots. `plan` gives each slot a place: slots of one
column stand together, in tiles of so many rows, so that a tile is dense
attention of some rows to one chunk of keys. `SlotTiles` gathers rows by the
plan and brings results back; `OwnTiles` cuts the rows for chunks' attention
to themselves, which need no gathering.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from avd_jax.ops.routing import NONE

SCAN = 1024  # query tokens that are ranked at once


class Plan(NamedTuple):
  """Slots grouped by column.

  Attributes:
    query: [b a p*block], the query token in each slot, NONE in padding.
    place: [b a t q], the slot of a query's choice, NONE where there is none.
    column: [b a p], the column of each tile, ascending; NONE in the tiles
      left over, which come last.
  """

  query: Int[Array, "b a slots"]
  place: Int[Array, "b a t q"]
  column: Int[Array, "b a p"]


def num_tiles(pairs: int, columns: int, block: int) -> int:
  """Tiles that always suffice for `pairs` slots, none shared by columns."""
  return pairs // block + min(columns, pairs)


def plan(
  chosen: Int[Array, "b q a t"],
  columns: int,
  block: int,
  pairs: int | None = None,
) -> Plan:
  """Groups slots by the column they chose, in the order of their queries.

  A slot's place is its column's first tile plus its rank among that column's
  slots: counted, not sorted, so that [q columns] never exists at once.

  Args:
    chosen: distinct columns below `columns` for each query; NONE for none.
    columns: how many there are to choose from.
    block: rows of a tile.
    pairs: most choices that queries can make; q * t where not given.
  """
  b, q, a, t = chosen.shape
  tiles = num_tiles(q * t if pairs is None else pairs, columns, block)
  slots = tiles * block
  chosen = chosen.transpose(0, 2, 3, 1)
  ids = jnp.arange(columns, dtype=jnp.int32)[:, None]

  def rank(count, chosen):
    hot = chosen[..., None, :] == ids  # [b a t c q]
    taken = hot.any(2).astype(jnp.int32)
    upto = jnp.cumsum(taken, -1)
    before = count[..., None] + upto - taken
    ranks = jnp.sum(jnp.where(hot, before[:, :, None], 0), -2)
    return count + upto[..., -1], ranks

  count = jnp.zeros((b, a, columns), jnp.int32)
  if q <= SCAN:
    count, ranks = rank(count, chosen)
  else:
    whole = -(-q // SCAN) * SCAN
    padded = jnp.pad(
      chosen, [(0, 0)] * 3 + [(0, whole - q)], constant_values=NONE
    )
    parts = jnp.moveaxis(padded.reshape(b, a, t, -1, SCAN), 3, 0)
    count, ranks = jax.lax.scan(rank, count, parts)
    ranks = jnp.moveaxis(ranks, 0, 3).reshape(b, a, t, whole)[..., :q]

  needed = -(-count // block)
  end = jnp.cumsum(needed, -1)
  first = (end - needed)[:, :, None, :, None]
  first = jnp.sum(jnp.where(chosen[..., None, :] == ids, first, 0), -2)
  there = chosen >= 0
  place = jnp.where(there, first * block + ranks, NONE)

  # One flat scatter, as the gather of `_rows` is. Places outside are dropped;
  # they differ, as unique_indices demands.
  total = b * a * slots
  outside = total + jnp.arange(chosen.size, dtype=jnp.int32)
  target = place + _starts(b, a, slots)[..., None]
  target = jnp.where(there, target, outside.reshape(chosen.shape)).reshape(-1)
  token = jnp.broadcast_to(jnp.arange(q, dtype=jnp.int32), chosen.shape)
  query = jnp.full((total,), NONE, jnp.int32)
  query = query.at[target].set(
    token.reshape(-1), mode="drop", unique_indices=True
  )
  query = query.reshape(b, a, slots)

  tile = jnp.arange(tiles, dtype=jnp.int32)[:, None]
  column = jnp.sum(tile >= end[:, :, None], -1, dtype=jnp.int32)
  column = jnp.where(column < columns, column, NONE)
  return Plan(query, place, column)


def _starts(b: int, a: int, n: int) -> Int[Array, "b a 1"]:
  """Where rows of n begin, all of them in a line."""
  return jnp.arange(b * a, dtype=jnp.int32).reshape(b, a, 1) * n


def _rows(x, index, empty=None):
  """Rows of x [b a n ...] at index [b a i]; `empty` where that is NONE.

  Without an `empty` rows at NONE are some row or other.
  """
  b, a, n = x.shape[:3]
  # One flat gather: of batched ones libtpu's layouts for v6e come out wrong.
  at = (_starts(b, a, n) + jnp.clip(index, 0, n - 1)).reshape(-1)
  flat = x.reshape(b * a * n, *x.shape[3:])
  rows = flat.at[at].get(mode="promise_in_bounds")
  rows = rows.reshape(*index.shape, *x.shape[3:])
  if empty is None:
    return rows
  there = jnp.expand_dims(index >= 0, range(3, rows.ndim))
  return jnp.where(there, rows, empty)


class OwnTiles(NamedTuple):
  """Tiles of chunks' attention to themselves: rows in order, tails padded.

  Attributes:
    rows: chunks of queries.
    tokens: of a chunk.
    size: rows of a tile.
  """

  rows: int
  tokens: int
  size: int

  @classmethod
  def of(cls, rows: int, tokens: int, most: int, align: int) -> "OwnTiles":
    """Equal tiles of at most `most` rows, a multiple of `align`."""
    pieces = -(-tokens // most)
    return cls(rows, tokens, -(-tokens // (pieces * align)) * align)

  def cut(
    self, x: Shaped[Array, "b a q *d"], empty: float = 0.0
  ) -> Shaped[Array, "b a p s *d"]:
    """Rows to tiles, padded with `empty`."""
    b, a, _, *rest = x.shape
    x = x.reshape(b, a, self.rows, self.tokens, *rest)
    if tail := -self.tokens % self.size:
      pads = [(0, 0)] * 3 + [(0, tail)] + [(0, 0)] * len(rest)
      x = jnp.pad(x, pads, constant_values=empty)
    return x.reshape(b, a, -1, self.size, *rest)

  def join(self, x: Shaped[Array, "b a p s *d"]) -> Shaped[Array, "b a q *d"]:
    """The inverse of `cut`."""
    b, a, _, _, *rest = x.shape
    x = x.reshape(b, a, self.rows, -1, *rest)[:, :, :, : self.tokens]
    return x.reshape(b, a, self.rows * self.tokens, *rest)

  def column(
    self, own: Int[Array, "rows"], b: int, a: int
  ) -> Int[Array, "{b} {a} p"]:
    """The column of each tile."""
    column = jnp.repeat(own, -(-self.tokens // self.size))
    return jnp.broadcast_to(column, (b, a, *column.shape))


class SlotTiles:
  """Tiles of slots: rows gathered by a plan, results brought back by it.

  Args:
    plan: where slots are.
    block: rows of a tile.
    sink: first columns that are sinks.
  """

  def __init__(self, plan: Plan, block: int, sink: int):
    self.plan, self.block = plan, block
    # Tiles ascend by column: the slots of sink columns are the first ones.
    sinks = jnp.sum((plan.column >= 0) & (plan.column < sink), -1)
    self._sinks = (sinks * block)[..., None]

  def cut(
    self,
    x: Shaped[Array, "b a q *d"],
    x_sink: Shaped[Array, "b a q *d"] | None = None,
    empty: float | None = None,
  ) -> Shaped[Array, "b a p s *d"]:
    """Rows to tiles, those of sinks from x_sink; padding is `empty`."""
    index = self.plan.query
    if x_sink is not None:
      slot = jnp.arange(index.shape[-1])
      other = (slot < self._sinks) & (index >= 0)
      index = index + jnp.where(other, x.shape[2], 0)
      x = jnp.concatenate([x, x_sink], 2)
    rows = _rows(x, index, empty)
    return rows.reshape(*rows.shape[:2], -1, self.block, *rows.shape[3:])

  def join(
    self, x: Shaped[Array, "b a p s *d"], empty: float
  ) -> Shaped[Array, "b a t q *d"]:
    """What each choice of each query gave; `empty` where there is none."""
    b, a, t, q = self.plan.place.shape
    x = x.reshape(b, a, -1, *x.shape[4:])
    rows = _rows(x, self.plan.place.reshape(b, a, t * q), empty)
    return rows.reshape(b, a, t, q, *rows.shape[3:])

  def is_sink(self) -> Bool[Array, "b a t q"]:
    """Whether a choice is a sink."""
    place = self.plan.place
    return (place >= 0) & (place < self._sinks[..., None])
