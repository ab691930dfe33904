"""What a video is told, chunk by chunk."""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable

import jax
import numpy as np

from avd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Texts:
  """Texts and the chunks from which they hold.

  Attributes:
    starts: first chunk of each, from 0, increasing.
    values: texts [b m] or [b m d], as a model reads them, all of one shape.

  Raises:
    UserError: no text for the first chunk, or starts that do not increase.
  """

  starts: tuple[int, ...]
  values: tuple[np.ndarray | jax.Array, ...]

  def __post_init__(self):
    pairs = itertools.pairwise(self.starts)
    if self.starts[:1] != (0,) or any(a >= b for a, b in pairs):
      raise UserError(
        f"texts begin at chunks {self.starts}: give 0, then later and later"
      )
    if len(self.values) != len(self.starts):
      raise UserError(f"{len(self.values)} texts, {len(self.starts)} starts")

  def at(self, chunk: int) -> np.ndarray | jax.Array:
    """The text of a chunk."""
    return self.values[bisect.bisect(self.starts, chunk) - 1]

  def until(self, chunk: int, total: int) -> int:
    """The first chunk after `chunk` that has another text, or `total`."""
    later = bisect.bisect(self.starts, chunk)
    return min([total, *self.starts[later : later + 1]])


def constant(text: np.ndarray | jax.Array | Texts) -> Texts:
  """One text for all chunks; Texts are handed back."""
  return text if isinstance(text, Texts) else Texts((0,), (text,))


def stretches(
  starts: Iterable[int], done: int, total: int
) -> list[tuple[int, int]]:
  """(first, end) of the chunks from `done` on that share a text."""
  cuts = [done, *(s for s in starts if done < s < total), total]
  return list(itertools.pairwise(cuts))
