"""Routed attention on TPUs: the tiles of `grouped`, as Pallas kernels.

A program takes one tile: some rows of queries and the chunk of keys that all
of them chose, which a prefetched map names. Tiles ascend by chunk, so that a
chunk's keys and values stay in VMEM while one tile after another meets them,
and on the way back so do their gradients, which leave when the chunk changes:
one pass, nothing added atomically. Logits stand as [keys, rows]: maxima and
sums then run along sublanes, and a row's statistics lie along lanes, as they
are stored. A chunk's keys are met in pieces, with a running softmax.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from avd_jax.ops.kernels import grouped
from avd_jax.ops.masks import Sight
from avd_jax.ops.problem import Problem
from avd_jax.ops.reference import EMPTY
from avd_jax.ops.routing import Routing

LANES = 128
BLOCK = 128  # rows of a tile
PIECE = 512  # keys met at once
TILES = 2**13  # of one call: 2**20 rows gathered at once
VMEM = 56 * 2**20  # what a chunk's keys, values and gradients may take
SPARE = 8 * 2**20  # beside them: rows, logits of a piece, and the compiler's

Interpret = bool | pltpu.InterpretParams


def attend(
  q: Float[Array, "b q a d"],
  k: Float[Array, "b k a d"],
  v: Float[Array, "b k a d"],
  sight: Sight,
  *,
  routing: Routing | None = None,
  q_sink: Float[Array, "b q a d"] | None = None,
  block: int = BLOCK,
  interpret: Interpret = False,
) -> tuple[Float[Array, "b q a d"], Float[Array, "b q a"]]:
  """`grouped.attend` with kernels for TPUs; `block` is a multiple of 8."""
  return grouped.attend(
    q,
    k,
    v,
    sight,
    routing=routing,
    q_sink=q_sink,
    block=block,
    engine=_engine(interpret),
  )


def refuses(problem: Problem) -> str | None:
  """Why this cannot do a problem, in one sentence; None if it can."""
  if problem.platform != "tpu":
    return f"tpu_routed runs on TPUs only, not on {problem.platform}"
  if problem.top_k is None and not problem.sink_queries:
    return (
      "tpu_routed is for routed history (model.attention.routing_top_k) and for"
      " sinks: what sees all would be cut into more pieces than it can hold"
    )
  if problem.head_dim % LANES:
    return (
      f"tpu_routed needs a head_dim that is a multiple of {LANES}, not"
      f" {problem.head_dim} (model.dim / model.num_heads)"
    )
  if problem.dtype not in ("float32", "bfloat16"):
    return (
      f"tpu_routed takes float32 or bfloat16, not {problem.dtype} (model.dtype)"
    )
  need = _vmem(problem.tokens, problem.head_dim, np.dtype(problem.dtype), True)
  if need > VMEM:
    return (
      f"tpu_routed keeps a chunk's keys, values and gradients in VMEM:"
      f" chunks of {problem.tokens} tokens take {need >> 20} MiB of the"
      f" {VMEM >> 20} it may use"
    )
  return None


@functools.cache
def _engine(interpret: Interpret) -> grouped.Engine:
  return grouped.Engine(
    functools.partial(_forward, interpret=interpret),
    functools.partial(_backward, interpret=interpret),
    block=(BLOCK, BLOCK),
    own_block=BLOCK,
    align=8,
    tiles=TILES,
  )


def _vmem(tokens: int, dim: int, dtype: np.dtype, gradients: bool) -> int:
  """Bytes of the blocks that follow the chunk, each held twice."""
  sizes = 2 * dtype.itemsize + (2 * 4 if gradients else 0)
  return 2 * tokens * dim * sizes


def _dot(x, y, over):
  """x and y contracted over an axis of each, float32."""
  exact = x.dtype == jnp.float32
  return jax.lax.dot_general(
    x,
    y,
    (((over[0],), (over[1],)), ((), ())),
    preferred_element_type=jnp.float32,
    precision=jax.lax.Precision.HIGHEST if exact else None,
  )


def _pieces(tokens, body, carry):
  """carry = body(slice, carry) over a chunk's keys: equal pieces, a tail."""
  whole = tokens // PIECE
  step = lambda i, c: body(pl.ds(pl.multiple_of(i * PIECE, PIECE), PIECE), c)
  if whole > 1:
    carry = jax.lax.fori_loop(0, whole, step, carry)
  elif whole:
    carry = body(pl.ds(0, PIECE), carry)
  if tail := tokens - whole * PIECE:
    carry = body(pl.ds(whole * PIECE, tail), carry)
  return carry


def _program():
  """(head, counted over the batch; tile) of this program."""
  return (
    pl.program_id(0) * pl.num_programs(1) + pl.program_id(1),
    pl.program_id(2),
  )


def _forward_kernel(column, real, q_ref, k_ref, v_ref, out_ref, lse_ref):
  del column
  rows, dim = q_ref.shape

  head, tile = _program()

  @pl.when(tile < real[head])
  def _():
    q = q_ref[...]

    def piece(at, carry):
      top, total, out = carry
      logits = _dot(k_ref[at, :], q, (1, 1)) * dim**-0.5
      new = jnp.maximum(top, jnp.max(logits, 0, keepdims=True))
      weight, decay = jnp.exp(logits - new), jnp.exp(top - new)
      total = total * decay + jnp.sum(weight, 0, keepdims=True)
      weight = weight.astype(v_ref.dtype)
      return new, total, out * decay + _dot(v_ref[at, :], weight, (0, 0))

    top = jnp.full((1, rows), EMPTY, jnp.float32)
    total = jnp.zeros((1, rows), jnp.float32)
    out = jnp.zeros((dim, rows), jnp.float32)
    top, total, out = _pieces(k_ref.shape[0], piece, (top, total, out))
    out_ref[...] = (out / total).T.astype(out_ref.dtype)
    lse_ref[...] = top + jnp.log(total)


def _backward_kernel(
  column,
  real,
  q_ref,
  dout_ref,
  lse_ref,
  delta_ref,
  k_ref,
  v_ref,
  dq_ref,
  dk_ref,
  dv_ref,
):
  rows, dim = q_ref.shape
  head, tile = _program()
  at = head * pl.num_programs(2) + tile
  first = (tile == 0) | (column[at] != column[jnp.maximum(at - 1, 0)])

  @pl.when((tile < real[head]) & first)
  def _():
    dk_ref[...] = jnp.zeros_like(dk_ref)
    dv_ref[...] = jnp.zeros_like(dv_ref)

  @pl.when(tile < real[head])
  def _():
    q, dout, lse, delta = (
      ref[...] for ref in (q_ref, dout_ref, lse_ref, delta_ref)
    )

    def piece(at, dq):
      k, v = k_ref[at, :], v_ref[at, :]
      weight = jnp.exp(_dot(k, q, (1, 1)) * dim**-0.5 - lse)
      slope = weight * (_dot(v, dout, (1, 1)) - delta) * dim**-0.5
      slope = slope.astype(q.dtype)
      dv_ref[at, :] += _dot(weight.astype(dout.dtype), dout, (1, 0))
      dk_ref[at, :] += _dot(slope, q, (1, 0))
      return dq + _dot(k, slope, (0, 0))

    dq = jnp.zeros((dim, rows), jnp.float32)
    dq = _pieces(k_ref.shape[0], piece, dq)
    dq_ref[...] = dq.T.astype(dq_ref.dtype)


class _Layout:
  """How tiles and chunks lie in memory, and the specs of their blocks."""

  def __init__(self, q, column, k, tokens):
    b, heads, tiles, s, d = q.shape
    self.grid = (b, heads, tiles)
    self.tokens = tokens
    real = jnp.sum(column >= 0, -1, dtype=jnp.int32)
    # Tiles left over stay with the last chunk, so that nothing moves. The
    # lists are flat: SMEM would pad a last axis to 128.
    last = jnp.max(column, -1, keepdims=True, initial=0)
    column = jnp.where(column >= 0, column, last)
    self.scalars = (column.reshape(-1), real.reshape(-1))

    def row(i, head, tile, column, real):
      return i, head, tile, 0, 0

    def chunk(i, head, tile, column, real):
      return i, column[(i * heads + head) * tiles + tile], 0, head

    self.rows = pl.BlockSpec((None, None, None, s, d), row)
    self.line = pl.BlockSpec((None, None, None, 1, s), row)
    # A head is a slice of lanes: keys stay as the projection left them.
    self.chunk = pl.BlockSpec((None, None, tokens, d), chunk)

  def chunks(self, x):
    b, k, a, d = x.shape
    return x.reshape(b, k // self.tokens, self.tokens, a * d)


def _call(kernel, layout, ins, outs, shapes, interpret, gradients=False):
  dim, dtype = shapes[0].shape[-1], np.dtype(shapes[0].dtype)
  vmem = _vmem(layout.tokens, dim, dtype, gradients)
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(layout.scalars),
      grid=layout.grid,
      in_specs=ins,
      out_specs=outs,
    ),
    out_shape=shapes,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=vmem + SPARE,
    ),
    interpret=interpret,
    name="routed_backward" if gradients else "routed_forward",
  )


def _forward(q, column, k, v, tokens, *, interpret):
  at = _Layout(q, column, k, tokens)
  lse = jax.ShapeDtypeStruct((*q.shape[:3], 1, q.shape[3]), jnp.float32)
  out, lse = _call(
    _forward_kernel,
    at,
    [at.rows, at.chunk, at.chunk],
    [at.rows, at.line],
    [jax.ShapeDtypeStruct(q.shape, q.dtype), lse],
    interpret,
  )(*at.scalars, q, at.chunks(k), at.chunks(v))
  return out, lse[..., 0, :]


def _backward(q, dout, lse, delta, column, k, v, tokens, *, interpret):
  at = _Layout(q, column, k, tokens)
  lse, delta = lse[..., None, :], delta[..., None, :]
  chunks = jax.ShapeDtypeStruct(at.chunks(k).shape, jnp.float32)
  dq, dk, dv = _call(
    _backward_kernel,
    at,
    [at.rows, at.rows, at.line, at.line, at.chunk, at.chunk],
    [at.rows, at.chunk, at.chunk],
    [jax.ShapeDtypeStruct(q.shape, q.dtype), chunks, chunks],
    interpret,
    gradients=True,
  )(*at.scalars, q, dout, lse, delta, at.chunks(k), at.chunks(v))
  return dq, dk.reshape(k.shape), dv.reshape(k.shape)
