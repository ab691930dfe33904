"""Dense attention on TPUs: jax's splash attention, under a mask of chunks.

Splash visits only the blocks of logits in which something is seen, and asks a
computable mask what, from a query's code and a key's index alone. A row of a
`Sight` sees the first columns up to some column, one range more, and one
column more (sinks, a window, its own chunk); those bounds are its code, eight
bits each. Forward and backward are jax's own kernels, through its public
interface, which has no gradient for the lse. Against a KV cache, whose mask is
traced, it is called once for each slot that is seen, without a mask.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as splash_masks,
)
from jaxtyping import Array, Float

from avd_jax.errors import UserError
from avd_jax.ops import chunked
from avd_jax.ops.masks import Sight
from avd_jax.ops.problem import Problem
from avd_jax.ops.reference import without_gradient
from avd_jax.ops.routing import Routing

LANES, HALF = 128, 64
BLOCK = 512  # queries and keys of a block
BITS = 8  # of a bound in a query's code
MOST = 2**BITS - 1


class SightMask(splash_masks._ComputableMask):
  """What splash asks about a mask, without a table of tokens anywhere.

  Args:
    shape: padded (queries, keys).
    rows: for each row of queries, its bounds (e, lo, hi, one) in chunks: it
      sees chunks below e, chunks lo to hi, and chunk `one`.
    tokens: of a row.
    chunk: tokens of a chunk of keys.
  """

  def __init__(
    self,
    shape: tuple[int, int],
    rows: tuple[tuple[int, int, int, int], ...],
    tokens: int,
    chunk: int,
  ):
    self.key = (shape, rows, tokens, chunk)
    self.rows, self.chunk = np.asarray(rows, np.int64), chunk
    super().__init__(shape, self._seen)
    # Padding queries see what the last row sees; padding keys nobody does.
    last = len(rows) - 1
    self.row = np.minimum(np.arange(shape[0]) // tokens, last)
    shifts = BITS * np.arange(4)
    codes = (self.rows << shifts).sum(1).astype(np.uint32).view(np.int32)
    self.q_sequence = codes[self.row]
    bounds = self.rows * chunk
    zero = np.zeros_like(bounds[:, 0])
    self.starts = np.stack([zero, bounds[:, 1], bounds[:, 3]], 1)
    self.ends = np.stack(
      [bounds[:, 0], bounds[:, 2], bounds[:, 3] + self.chunk], 1
    )
    self.middle = bool((self.rows[:, 2] > self.rows[:, 1]).any())

  def _seen(self, code, key):
    """Whether a query with this code sees the key; arrays broadcast."""
    bound = lambda i: ((code >> (BITS * i)) & MOST) * self.chunk
    one = bound(3)
    seen = (key < bound(0)) | ((key >= one) & (key < one + self.chunk))
    if self.middle:
      seen |= (key >= bound(1)) & (key < bound(2))
    return seen

  def table(self) -> np.ndarray:
    """The mask in full, [queries, keys]."""
    keys = np.arange(self.shape[1])
    return self._seen(self.q_sequence[:, None], keys[None])

  def __getitem__(self, at) -> np.ndarray:
    """A block's summary: all its bits, for whoever asks any() and all().

    Splash asks nothing else of a mask that it can compute. Blocks in full
    would be gigabytes, and minutes at 65,536 tokens.
    """
    rows, keys = (
      range(size)[part] for part, size in zip(at, self.shape, strict=True)
    )
    some = slice(self.row[rows[0]], self.row[rows[-1]] + 1)
    starts = np.maximum(self.starts[some], keys[0])
    ends = np.minimum(self.ends[some], keys[-1] + 1)
    # The three ranges of a row may share columns: splash counts a full block
    # as full only where one of them covers it, which costs a test and no more.
    covered = ends - starts
    full = (covered.max(1) == len(keys)).all()
    seen = (covered > 0).any()
    return np.array([[full, seen]])

  def __eq__(self, other: object) -> bool:
    return isinstance(other, SightMask) and self.key == other.key

  def __hash__(self) -> int:
    return hash(self.key)


def attend(
  q: Float[Array, "b q a d"],
  k: Float[Array, "b k a d"],
  v: Float[Array, "b k a d"],
  sight: Sight,
  *,
  routing: Routing | None = None,
  q_sink: Float[Array, "b q a d"] | None = None,
  block: int = BLOCK,
  interpret: bool = False,
) -> tuple[Float[Array, "b q a d"], Float[Array, "b q a"]]:
  """Attention of each query to all that its row sees.

  Against a KV cache (a traced sight) its gradient is the reference's.

  Args:
    q: queries, whole chunks of them.
    k: keys, one column after the other.
    v: values.
    sight: which chunk sees which.
    routing: not taken.
    q_sink: queries to sinks; only against a cache.
    block: most queries and keys of a block, a multiple of 128.
    interpret: run without a TPU, for tests.

  Returns:
    (out, lse). The lse of a pass over whole videos may be used, but not
    differentiated.

  Raises:
    UserError: a mask this cannot express, a routing or a q_sink.
    NotImplementedError: a gradient through the lse.
  """
  sinks = sight.static and q_sink is not None and sight.sink
  if routing is not None or sinks:
    raise UserError(
      "splash attends to all that a row sees, with one set of queries: it"
      " takes neither a routing nor queries for sinks"
    )
  if not sight.static:
    whole = Sight(np.ones((1, 1), bool), np.zeros(1, int), sight.tokens, 0)
    slot = functools.partial(
      attend, sight=whole, block=block, interpret=interpret
    )
    return chunked.over_slots(q, k, v, sight, q_sink, slot)
  rows = tuple(_bounds(sight, row) for row in range(len(sight.sees)))
  lengths = q.shape[1], k.shape[1]
  blocks = tuple(min(block, _whole(n, LANES)) for n in lengths)
  padded = tuple(map(_whole, lengths, blocks))
  kernel = _kernels(
    padded,
    blocks,
    rows,
    (sight.tokens, sight.tokens * sight.parts),
    q.shape[2],
    interpret,
  )

  def lay(x, length):
    x = jnp.pad(x, [(0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)])
    return jnp.swapaxes(x, 1, 2)

  scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
  scaled, k, v = lay(scaled, padded[0]), lay(k, padded[1]), lay(v, padded[1])
  out, lse = _splash(kernel, scaled, k, v)
  crop = lambda x: jnp.swapaxes(x, 1, 2)[:, : lengths[0]]
  return crop(out), without_gradient(crop(lse), "splash attention")


def refuses(problem: Problem) -> str | None:
  """Why this cannot do a problem, in one sentence; None if it can."""
  if problem.platform != "tpu":
    return f"splash runs on TPUs only, not on {problem.platform}"
  if problem.top_k is not None:
    return "splash has no routing: set model.attention.routing_top_k to None"
  if problem.sink_queries and problem.static:
    return (
      "splash has one set of queries: sinks (model.attention.sink) cannot have"
      " their own"
    )
  if problem.runs > 3:
    return (
      f"splash takes rows that see at most 3 ranges of chunks, not"
      f" {problem.runs}"
    )
  chunks = problem.columns // problem.parts
  if chunks > MOST and problem.static:
    return f"splash takes at most {MOST} chunks of keys, not {chunks}"
  if problem.head_dim % HALF:
    return (
      f"splash needs a head_dim that is a multiple of {HALF}, not"
      f" {problem.head_dim} (model.dim / model.num_heads)"
    )
  if problem.dtype not in ("float32", "bfloat16"):
    return (
      f"splash takes float32 or bfloat16, not {problem.dtype} (model.dtype)"
    )
  return None


def _whole(length: int, size: int) -> int:
  """The length in whole blocks."""
  return -(-length // size) * size


def _bounds(sight: Sight, row: int) -> tuple[int, int, int, int]:
  """A row's runs as (e, lo, hi, one), in chunks, of which rows see all or
  nothing."""
  chunks = lambda column: int(column) // sight.parts
  runs = [(chunks(a), chunks(b)) for a, b in sight.runs(row)]
  own = chunks(sight.own[row])
  end = runs.pop(0)[1] if runs[0][0] == 0 else 0
  # One run may be any range; the other must be a single chunk.
  runs.sort(key=lambda run: run[1] - run[0])
  single = runs.pop(0)[0] if runs and runs[0][1] - runs[0][0] == 1 else own
  if len(runs) > 1 or chunks(sight.sees.shape[1]) > MOST:
    raise UserError(
      f"splash takes rows that see the first chunks, one range and one chunk"
      f" more, of at most {MOST}: row {row} sees {sight.runs(row)}"
    )
  lo, hi = runs[0] if runs else (0, 0)
  return end, lo, hi, single


@functools.lru_cache(32)
def _kernels(padded, blocks, rows, tokens, heads, interpret):
  """(kernel, the kernel that gives the lse too), their tables as numpy."""
  mask = SightMask(padded, rows, *tokens)
  mask = splash_masks.MultiHeadMask([mask] * heads)
  q, kv = blocks
  sizes = kernels.BlockSizes(
    block_q=q,
    block_kv=kv,
    block_q_dkv=q,
    block_kv_dkv=kv,
    block_q_dq=q,
    block_kv_dq=kv,
    use_fused_bwd_kernel=False,  # it would hold dq once per block of keys
  )
  forward = kernels.BlockSizes(block_q=q, block_kv=kv)
  make = functools.partial(
    kernels.make_splash_mha,
    mask,
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )

  def tables():
    pair = (
      make(block_sizes=sizes),
      make(block_sizes=forward, save_residuals=True),
    )
    return jax.tree.map(np.asarray, pair)

  # In a thread of its own nobody traces. `jax.ensure_compile_time_eval` is no
  # help where a scan within a shard_map is linearized.
  with ThreadPoolExecutor(1) as pool:
    return _Kernels(*pool.submit(tables).result())


class _Kernels:
  """The two kernels, over the batch; compared by identity."""

  def __init__(self, plain, with_lse):
    self.plain = jax.vmap(plain)
    self.with_lse = jax.vmap(with_lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _splash(kernel, q, k, v):
  out, (lse,) = kernel.with_lse(q, k, v)
  return out, lse


def _splash_forward(kernel, q, k, v):
  out, back = jax.vjp(kernel.plain, q, k, v)
  # Splash keeps its own lse to itself; this second pass is dead code, and
  # compiled away, unless somebody reads the lse beside a gradient.
  _, (lse,) = kernel.with_lse(q, k, v)
  return (out, lse), back


def _splash_backward(kernel, back, cotangents):
  del kernel
  dout, _ = cotangents  # the lse's is zero: `without_gradient` stands after
  return back(dout)


_splash.defvjp(_splash_forward, _splash_backward)
