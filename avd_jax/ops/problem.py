"""What an attention call asks for, in the few facts implementations go by."""

import dataclasses

import jax
import numpy as np

from avd_jax.ops.masks import Sight


@dataclasses.dataclass(frozen=True)
class Problem:
  """An attention call without its arrays.

  Attributes:
    platform: "cpu", "gpu" (CUDA), "tpu", or "rocm".
    batch: videos.
    rows: chunks of queries.
    columns: chunks of keys.
    tokens: of a chunk.
    heads: attention heads.
    head_dim: dims of a head.
    dtype: of queries, keys and values.
    top_k: chunks that routing chooses; None where it is off.
    static: whether the mask is known while tracing (a pass over whole
      videos) or traced (a chunk against a KV cache).
    prefix: of a traced mask: whether what is seen is a prefix of the cache.
    runs: most contiguous ranges of columns that a row of a static mask sees.
    pairs: chunk pairs that attention needs, of a static mask without routing.
    sink_queries: whether sink keys are met by queries of their own.
    capability: CUDA compute capability of the GPU, where it is known.
    parts: columns of a chunk of keys; see `masks.Sight`.
  """

  platform: str
  batch: int
  rows: int
  columns: int
  tokens: int
  heads: int
  head_dim: int
  dtype: str
  top_k: int | None = None
  static: bool = True
  prefix: bool = False
  runs: int = 1
  pairs: int = 0
  sink_queries: bool = False
  capability: float | None = None
  parts: int = 1


def describe(
  platform: str,
  q: jax.Array | jax.ShapeDtypeStruct,
  k: jax.Array | jax.ShapeDtypeStruct,
  sight: Sight,
  top_k: int | None = None,
  sink_queries: bool = False,
  capability: float | None = None,
) -> Problem:
  """The problem that arrays (or their shapes) pose."""
  rows, columns = sight.sees.shape
  static = sight.static
  return Problem(
    platform="gpu" if platform == "cuda" else platform,
    batch=q.shape[0],
    rows=rows,
    columns=columns,
    tokens=sight.tokens,
    heads=q.shape[-2],
    head_dim=q.shape[-1],
    dtype=str(np.dtype(q.dtype)),
    top_k=top_k,
    static=static,
    prefix=sight.count is not None,
    runs=max(len(sight.runs(r)) for r in range(rows)) if static else 1,
    pairs=int(sight.sees.sum()) if static else columns,
    sink_queries=sink_queries and sight.sink > 0,
    capability=capability,
  )
