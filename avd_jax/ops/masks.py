"""Which chunk sees which: structured attention masks.

A mask is a small frozen object, a predicate on (stream, chunk) of a query and
of a key, and masks compose with `&`. Nothing of size [tokens, tokens] exists
until someone asks for it: `chunk_table` gives booleans per pair of *chunks*,
which is what an implementation plans with, and `dense` the token-level mask
that only the plain reference uses.

Streams: a training pass runs two, history (clean, stream 0) and noisy
(stream 1), laid out as [history | noisy] along the tokens; a diffusion-forcing
pass runs one (stream 0).
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from avd_jax.errors import UserError

HISTORY, NOISY = 0, 1


@runtime_checkable
class Mask(Protocol):
  """A predicate on chunks; arrays broadcast."""

  def visible(
    self,
    q_stream: np.ndarray,
    q_chunk: np.ndarray,
    k_stream: np.ndarray,
    k_chunk: np.ndarray,
  ) -> np.ndarray: ...


class _Composable:
  def __and__(self, other: Mask) -> "Both":
    return Both(self, other)


@dataclasses.dataclass(frozen=True)
class Both(_Composable):
  """Visible under both masks."""

  first: Mask
  second: Mask

  def visible(self, *args):
    return self.first.visible(*args) & self.second.visible(*args)


@dataclasses.dataclass(frozen=True)
class BlockCausal(_Composable):
  """One stream: chunk i sees chunks <= i, itself in both directions."""

  def visible(self, q_stream, q_chunk, k_stream, k_chunk):
    return (k_chunk <= q_chunk) & (q_stream == k_stream)


@dataclasses.dataclass(frozen=True)
class HistoryNoisy(_Composable):
  """Two streams, the teacher-forcing mask.

  History chunk i sees history chunks <= i. Noisy chunk i sees itself and
  history chunks < i: never its own history copy, another noisy chunk, or
  anything later. [RF Fig. 3c]
  """

  def visible(self, q_stream, q_chunk, k_stream, k_chunk):
    to_history = k_stream == HISTORY
    from_history = q_stream == HISTORY
    history = to_history & np.where(
      from_history, k_chunk <= q_chunk, k_chunk < q_chunk
    )
    own = ~from_history & ~to_history & (k_chunk == q_chunk)
    return history | own


@dataclasses.dataclass(frozen=True)
class Window(_Composable):
  """The `size` chunks before one's own, and the first `sink` chunks always.

  Attributes:
    size: chunks of history that a query reaches back; at least 1.
    sink: first chunks of the video that never leave sight.

  Raises:
    UserError: a size below 1 or a sink below 0.
  """

  size: int
  sink: int = 0

  def __post_init__(self):
    if self.size < 1 or self.sink < 0:
      raise UserError(
        f"attention window {self.size} with sink {self.sink}: the window must"
        " be at least 1 chunk and the sink at least 0"
      )

  def visible(self, q_stream, q_chunk, k_stream, k_chunk):
    del q_stream, k_stream
    return (q_chunk - k_chunk <= self.size) | (k_chunk < self.sink)


def history_mask(streams: int, window: int | None, sink: int) -> Mask:
  """The mask of a pass over one or two streams, windowed where asked."""
  mask = HistoryNoisy() if streams == 2 else BlockCausal()
  return mask if window is None else mask & Window(window, sink)


def chunk_table(mask: Mask, num_chunks: int, streams: int) -> np.ndarray:
  """Booleans [streams * n, streams * n]: row chunk sees column chunk."""
  stream = np.repeat(np.arange(streams), num_chunks)
  chunk = np.tile(np.arange(num_chunks), streams)
  return mask.visible(
    stream[:, None], chunk[:, None], stream[None, :], chunk[None, :]
  )


def dense(table: np.ndarray, q_tokens: int, k_tokens: int) -> np.ndarray:
  """A table of chunks spread to tokens, [q chunks * q_tokens, k ...]."""
  return np.repeat(np.repeat(table, q_tokens, 0), k_tokens, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Sight:
  """Which chunks of keys each chunk of queries attends to.

  What the front door of attention takes instead of a token mask. A pass over
  whole videos knows its tables (numpy), and implementations plan with them;
  a chunk against a KV cache has one row, whose tables are traced.

  Attributes:
    sees: booleans [rows, columns]: a row of queries sees a column of keys.
    own: [rows], the column of each row's own chunk: always seen, and never
      routed.
    tokens: of a chunk, of queries and of keys alike.
    history: how many of the first columns hold history, which is what routing
      chooses from; columns after it are seen as somebody's own chunk only.
    sink: how many of the first columns are sinks, whose keys other queries
      (`q_sink`) may meet.
    count: how many first columns are seen, where a single row sees exactly
      those; None where it may see others.
    most: of a traced row: columns besides its own that it sees at most; None
      where that may be all of them.
    parts: columns that a chunk of keys takes up, where queries are a part of
      each chunk (`cut`); `own` is then the first of them.

  Raises:
    ValueError: more sinks than history, or more history than columns.
  """

  sees: np.ndarray | jax.Array
  own: np.ndarray | jax.Array
  tokens: int
  history: int
  sink: int = 0
  count: jax.Array | None = None
  most: int | None = None
  parts: int = 1

  def __post_init__(self):
    if not 0 <= self.sink <= self.history <= self.sees.shape[-1]:
      raise ValueError(
        f"{self.sink} sinks of {self.history} chunks of history among"
        f" {self.sees.shape[-1]} columns"
      )

  @property
  def static(self) -> bool:
    """Whether the tables are known while tracing."""
    return isinstance(self.sees, np.ndarray)

  def candidates(self) -> np.ndarray | jax.Array:
    """Booleans [rows, history]: what routing may choose."""
    xp = np if self.static else jnp
    columns = xp.arange(self.history)
    mine = columns == self.own[:, None]
    return self.sees[:, : self.history] & ~mine

  def cut(self, parts: int) -> "Sight":
    """The static sight of one of `parts` equal parts of every chunk's queries.

    They see what all of their chunk sees: keys stay whole, in columns as short
    as the queries' part is.
    """
    return dataclasses.replace(
      self,
      sees=np.repeat(self.sees, parts, 1),
      own=self.own * parts,
      tokens=self.tokens // parts,
      history=self.history * parts,
      sink=self.sink * parts,
      parts=self.parts * parts,
    )

  def runs(self, row: int) -> list[tuple[int, int]]:
    """The columns that a row sees, as ascending half-open ranges."""
    edges = np.diff(np.concatenate([[0], self.sees[row].astype(int), [0]]))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return [(int(a), int(b)) for a, b in zip(starts, ends, strict=True)]


def sight(
  mask: Mask,
  num_chunks: int,
  streams: int,
  tokens: int,
  rows: int | None = None,
  sink: int = 0,
) -> Sight:
  """The sight of a pass over whole videos; of its last `rows` chunks only.

  Raises:
    UserError: a mask that leaves a query without keys, or that hides a
      chunk from itself.
  """
  table = chunk_table(mask, num_chunks, streams)
  own = np.arange(streams * num_chunks, dtype=np.int32)
  blind = np.flatnonzero(~table[own, own])
  if blind.size:
    raise UserError(
      f"attention mask {mask}: chunk {int(blind[0])} of {len(own)} does not"
      " see itself; every query needs its own chunk among its keys"
    )
  rows = len(own) if rows is None else rows
  return Sight(
    table[-rows:], own[-rows:], tokens, num_chunks, min(sink, num_chunks)
  )
