"""One static buffer per layer that a rollout writes in place.

A cache has slots of one chunk each. `Layout` maps chunks to slots by
arithmetic alone: the first `sink` chunks keep their own slots, the rest share
a ring, so that memory and shapes stay constant however long the video gets.
Order inside the cache does not matter to a softmax, hence no shifting, no
concatenation: a window *is* its ring.

Layers are a tuple of arrays, not one stacked array: an update then touches
one layer's buffer (a scan over layers would copy the whole cache a step).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class KVCache(NamedTuple):
  """Keys (rotated at their absolute frame) and values, one array a layer."""

  k: tuple[Float[Array, "b k a d"], ...]
  v: tuple[Float[Array, "b k a d"], ...]


@dataclasses.dataclass(frozen=True)
class Layout:
  """Where chunks live.

  Attributes:
    slots: chunks that the buffer holds.
    sink: first chunks that keep their slots for good.
    window: chunks before its own that a query sees (None: all).
  """

  slots: int
  sink: int = 0
  window: int | None = None

  def slot(self, chunk: Int[Array, ""]) -> Int[Array, ""]:
    """The slot of a chunk."""
    ring = self.slots - self.sink
    if ring <= 0:
      return chunk
    return jnp.where(
      chunk < self.sink, chunk, self.sink + (chunk - self.sink) % ring
    )

  def held(self, chunk: Int[Array, ""]) -> Int[Array, "slots"]:
    """The chunk in each slot once `chunk` was written; -1 for none."""
    slot = jnp.arange(self.slots)
    ring = max(self.slots - self.sink, 1)
    newest = chunk - (chunk - slot) % ring
    held = jnp.where(slot < self.sink, slot, newest)
    filled = (held <= chunk) & ((slot < self.sink) | (held >= self.sink))
    return jnp.where(filled, held, -1)

  def visible(self, chunk: Int[Array, ""]) -> Bool[Array, "slots"]:
    """Which slots chunk `chunk` attends to, its own among them."""
    held = self.held(chunk)
    see = held >= 0
    if self.window is not None:
      see &= (chunk - held <= self.window) | (held < self.sink)
    return see


def layout(
  chunks: int, window: int | None, sink: int, keep_all: bool
) -> Layout:
  """The smallest layout for a video of `chunks` chunks under a window."""
  if window is None:
    return Layout(chunks)
  slots = chunks if keep_all else min(chunks, sink + window + 1)
  return Layout(slots, min(sink, slots), window)


def init(layers: int, shape: tuple[int, int, int, int], dtype: str) -> KVCache:
  """An empty cache; `shape` is [b, slots * s, a, d]."""
  zeros = lambda: tuple(jnp.zeros(shape, dtype) for _ in range(layers))
  return KVCache(zeros(), zeros())


def write(
  buffer: Float[Array, "b k a d"],
  new: Float[Array, "b s a d"],
  slot: Int[Array, ""],
) -> Float[Array, "b k a d"]:
  """Overwrites one slot."""
  start = slot * new.shape[1]
  return jax.lax.dynamic_update_slice_in_dim(
    buffer, new.astype(buffer.dtype), start, axis=1
  )
