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

from avd_jax.ops.masks import Sight


class KVCache(NamedTuple):
  """What a layer remembers of each chunk, one array a layer.

  Attributes:
    k: keys by slot, rotated at their absolute frame.
    v: values.
    mean: mean keys of each slot, float32, where history is routed; else empty.
  """

  k: tuple[Float[Array, "b c s a d"], ...]
  v: tuple[Float[Array, "b c s a d"], ...]
  mean: tuple[Float[Array, "b c a d"], ...] = ()


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

  @property
  def in_order(self) -> bool:
    """Whether slot i holds chunk i, whatever the chunk."""
    return self.window is None

  @property
  def prefix(self) -> bool:
    """Whether every filled slot is in sight, and those come first."""
    if self.window is None:
      return True
    return self.sink + self.window + 1 >= self.slots

  def sight(self, chunk: Int[Array, ""], tokens: int) -> Sight:
    """What chunk `chunk` sees, as the front door of attention takes it."""
    filled = jnp.minimum(chunk + 1, self.slots)
    return Sight(
      sees=self.visible(chunk)[None],
      own=jnp.asarray(self.slot(chunk), jnp.int32)[None],
      tokens=tokens,
      history=self.slots,
      sink=self.sink,
      count=filled if self.prefix else None,
      most=None if self.window is None else self.window + self.sink,
    )


def layout(
  chunks: int, window: int | None, sink: int, keep_all: bool
) -> Layout:
  """The smallest layout for a video of `chunks` chunks under a window."""
  if window is None:
    return Layout(chunks)
  slots = chunks if keep_all else min(chunks, sink + window + 1)
  return Layout(slots, min(sink, slots), window)


def init(
  layers: int,
  slots: int,
  shape: tuple[int, int, int, int],
  dtype: str,
  routed: bool = False,
) -> KVCache:
  """An empty cache of chunks of `shape` [b s a d]."""
  b, s, a, d = shape
  empty = lambda *size, dtype: tuple(
    jnp.zeros(size, dtype) for _ in range(layers)
  )
  k, v = (empty(b, slots, s, a, d, dtype=dtype) for _ in range(2))
  mean = empty(b, slots, a, d, dtype="float32") if routed else ()
  return KVCache(k, v, mean)


def write(
  buffer: Float[Array, "b c *s"],
  new: Float[Array, "b 1 *s"],
  slot: Int[Array, ""],
) -> Float[Array, "b c *s"]:
  """Overwrites one slot."""
  return jax.lax.dynamic_update_slice_in_dim(
    buffer, new.astype(buffer.dtype), slot, axis=1
  )
