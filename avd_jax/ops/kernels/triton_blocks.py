"""Inner loops that the Triton kernels share.

A program holds one tile of rows (queries, or keys) and walks over ranges of
the others. Rows are fetched by index, so a tile may be any rows of a head;
ranges end anywhere, and the last block of a range is masked. All softmax here
is base 2: scales and the lse that the backward pass reads hold a factor
log2(e).
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from avd_jax.ops.kernels.compat import dot, load, store, triton_call
from avd_jax.ops.problem import Problem
from avd_jax.ops.reference import EMPTY

LOG2E = math.log2(math.e)
NEVER = 1e30  # an lse that makes every weight of its row zero
SMALLEST = 16  # rows of a tile that a matrix unit takes
HEAD_DIMS = (16, 32, 64, 128)
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Tile:
  """What a program works on at a time.

  Attributes:
    q: query rows, a power of two from 16 on.
    k: key rows, likewise.
    warps: of 32 threads, that share the tile.
    stages: blocks in flight while one is worked on.
  """

  q: int
  k: int
  warps: int
  stages: int


# Triton's own floor; the kernels are cut for Hopper (9.0).
LEAST_CAPABILITY = 8.0


def refuses(problem: Problem) -> str | None:
  """Why Triton kernels cannot do a problem, whatever its mask; None if so."""
  if problem.platform != "gpu":
    return f"Triton kernels run on platform gpu, not on {problem.platform}"
  if problem.capability is not None and problem.capability < LEAST_CAPABILITY:
    return (
      f"Triton kernels need compute capability {LEAST_CAPABILITY} (Ampere), not"
      f" {problem.capability}"
    )
  if problem.head_dim not in HEAD_DIMS:
    return (
      f"Triton kernels take head_dim {', '.join(map(str, HEAD_DIMS))}, not"
      f" {problem.head_dim} (model.dim / model.num_heads)"
    )
  if problem.dtype not in DTYPES:
    return (
      f"Triton kernels take dtype {', '.join(DTYPES)}, not {problem.dtype}"
      " (model.dtype)"
    )
  return None


def base2_scale(head_dim: int) -> float:
  """What makes a product of query and key a base-2 logit."""
  return head_dim**-0.5 * LOG2E


Spec = Callable[[jax.Array], pl.BlockSpec]


def run(
  kernel: Callable,
  grid: tuple[int, int, int],
  ins: list[tuple[Spec, jax.Array]],
  outs: list[tuple[Spec, jax.ShapeDtypeStruct]],
  tile: Tile,
  interpret: bool,
  aliases: dict[int, int] | None = None,
) -> tuple[jax.Array, ...]:
  """Runs a kernel.

  Args:
    kernel: of refs of ins, then outs.
    grid: (tiles, batch * heads, chunks): tiles follow each other fastest, so
      that those which run together share keys; first chunks start first.
    ins: arrays, with what a program sees of them.
    outs: likewise.
    tile: for warps and stages.
    interpret: run without a GPU.
    aliases: ins that outs overwrite.
  """
  call = triton_call(
    kernel,
    grid=grid,
    in_specs=[spec(x) for spec, x in ins],
    out_specs=[spec(x) for spec, x in outs],
    out_shape=[x for _, x in outs],
    input_output_aliases=aliases or {},
    warps=tile.warps,
    stages=tile.stages,
    interpret=interpret,
  )
  return tuple(call(*[x for _, x in ins]))


def like(x: jax.Array, shape: tuple[int, ...] | None = None, dtype=None):
  """The shape and dtype of an array, but for what is given."""
  return jax.ShapeDtypeStruct(shape or x.shape, dtype or x.dtype)


def of_tokens(x) -> pl.BlockSpec:
  """All tokens of one head, of an array [b s a d]: no transpose needed."""
  _, tokens, heads, dims = x.shape
  return pl.BlockSpec(
    (None, tokens, None, dims), lambda _, i, __: (i // heads, 0, i % heads, 0)
  )


def of_head(x) -> pl.BlockSpec:
  """All of one head, of an array [b a ...]."""
  heads, rest = x.shape[1], x.shape[2:]
  return pl.BlockSpec(
    (None, None, *rest),
    lambda _, i, __: (i // heads, i % heads, *(0 for _ in rest)),
  )


def of_tile(size: int) -> Spec:
  """`size` rows of one head, a tile's own, of an array [b a p*size ...]."""

  def spec(x):
    heads, rest = x.shape[1], x.shape[3:]
    return pl.BlockSpec(
      (None, None, size, *rest),
      lambda t, i, _: (i // heads, i % heads, t, *(0 for _ in rest)),
    )

  return spec


def shared(x) -> pl.BlockSpec:
  """A table that every program reads whole."""
  return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)


def load_rows(ref, rows, some=None):
  """Rows of a [rows, d] array, [n, d]; zeros where not `some`."""
  at = ref.at[rows[:, None], jnp.arange(ref.shape[1])[None, :]]
  if some is None:
    return load(at)
  shape = (rows.shape[0], ref.shape[1])
  return load(at, mask=jnp.broadcast_to(some[:, None], shape), other=0.0)


def store_rows(ref, rows, values, valid):
  """Writes the valid ones of [n, d] rows."""
  store(
    ref.at[rows[:, None], jnp.arange(ref.shape[1])[None, :]],
    values.astype(ref.dtype),
    mask=jnp.broadcast_to(valid[:, None], values.shape),
  )


def tile_rows(chunk, tile, size: int, tokens: int):
  """Rows of a tile of a chunk, as (to read, to write, valid), each [size].

  The last tile of a chunk hangs over its end: it reads the last row again and
  must not write there.
  """
  inside = tile * size + jnp.arange(size)
  first = chunk * tokens
  valid = inside < tokens
  return first + jnp.minimum(inside, tokens - 1), first + inside, valid


def over(start, length, size: int, body: Callable, carry, on=None):
  """Walks a range of rows in blocks.

  Args:
    start: first row.
    length: rows; where a Python int, the last block is as small as it can be.
    size: rows of a block.
    body: (rows [n], valid [n] or None where all are, carry) -> carry.
    carry: what body carries.
    on: traced, 0 to skip the range and 1 to walk it; None walks it.
  """
  full = length // size
  rest = length - full * size
  if isinstance(length, int):
    last_size = max(SMALLEST, pl.next_power_of_2(max(rest, 1)))
    lasts = min(rest, 1)
  else:
    last_size = size
    lasts = jnp.minimum(rest, 1)
  if on is not None:
    full, lasts = full * on, lasts * on

  def block(i, carry):
    return body(start + i * size + jnp.arange(size), None, carry)

  def last(_, carry):
    # Rows past the end are another chunk's, or nobody's.
    rows = start + full * size + jnp.arange(last_size)
    end = start + length
    return body(jnp.minimum(rows, end - 1), rows < end, carry)

  carry = jax.lax.fori_loop(0, full, block, carry)
  return jax.lax.fori_loop(0, lasts, last, carry)


def no_keys(rows: int, dims: int):
  """The softmax over no keys: (top logit, sum of weights, weighted values)."""
  return (
    jnp.full((rows,), EMPTY, jnp.float32),
    jnp.zeros((rows,), jnp.float32),
    jnp.zeros((rows, dims), jnp.float32),
  )


def adding_keys(q, k_ref, v_ref):
  """The body that adds a block of keys to the softmax of a tile of queries."""
  scale = base2_scale(q.shape[1])

  def body(rows, valid, carry):
    top, total, acc = carry
    logits = dot(q, load_rows(k_ref, rows), trans_b=True) * scale
    if valid is not None:
      logits = jnp.where(valid[None, :], logits, EMPTY)
    higher = jnp.maximum(top, logits.max(1))
    decay = jnp.exp2(top - higher)
    weight = jnp.exp2(logits - higher[:, None])
    v = load_rows(v_ref, rows)
    total = total * decay + weight.sum(1)
    acc = acc * decay[:, None] + dot(weight.astype(v.dtype), v)
    return higher, total, acc

  return body


def adding_branch(carry, out, lse):
  """Adds a branch, already normalised: out [n, d] float32, base-2 lse [n]."""
  top, total, acc = carry
  higher = jnp.maximum(top, lse)
  decay, weight = jnp.exp2(top - higher), jnp.exp2(lse - higher)
  return (
    higher,
    total * decay + weight,
    acc * decay[:, None] + (out * weight[:, None]),
  )


def normalise(carry):
  """(out [n, d], base-2 lse [n]); 0 and EMPTY where there were no keys."""
  top, total, acc = carry
  some = total > 0
  safe = jnp.where(some, total, 1.0)
  lse = jnp.where(some, top + jnp.log2(safe), EMPTY)
  return acc / safe[:, None], lse


def adding_dq(q, do, lse, delta, k_ref, v_ref):
  """The body that adds a block of keys to dq [n, d], short of the scale."""
  scale = base2_scale(q.shape[1])

  def body(rows, valid, dq):
    k, v = load_rows(k_ref, rows), load_rows(v_ref, rows)
    weight = jnp.exp2(dot(q, k, trans_b=True) * scale - lse[:, None])
    ds = weight * (dot(do, v, trans_b=True) - delta[:, None])
    if valid is not None:
      ds = jnp.where(valid[None, :], ds, 0.0)
    return dq + dot(ds.astype(k.dtype), k)

  return body


def adding_dkv(k, v, q_ref, do_ref, lse_ref, delta_ref, offset=0):
  """The body that adds a block of queries to (dk, dv), dk short of the scale.

  Args:
    k: [n, d] keys of the tile.
    v: values.
    q_ref: queries; a row of the others stands `offset` rows later here.
    do_ref: cotangents of their outputs.
    lse_ref: their base-2 lse.
    delta_ref: their delta.
    offset: see q_ref.
  """
  scale = base2_scale(k.shape[1])

  def body(rows, valid, carry):
    dk, dv = carry
    q, do = load_rows(q_ref, rows + offset), load_rows(do_ref, rows)
    lse, delta = load(lse_ref.at[rows]), load(delta_ref.at[rows])
    if valid is not None:
      lse = jnp.where(valid, lse, NEVER)
    weight = jnp.exp2(dot(k, q, trans_b=True) * scale - lse[None, :])
    dv += dot(weight.astype(do.dtype), do)
    ds = weight * (dot(v, do, trans_b=True) - delta[None, :])
    return dk + dot(ds.astype(q.dtype), q), dv

  return body


def no_gradient(like):
  """Zeros [n, d] float32, to add a tile's gradients to."""
  return jnp.zeros(like.shape, jnp.float32)


def to_front(out, lse):
  """Out [b q a d], base-2 lse [b a q] -> out, natural-log lse [b q a]."""
  lse = jnp.where(lse > EMPTY, lse / LOG2E, EMPTY)
  return out, jnp.swapaxes(lse, 1, 2)


def delta(out, do, dlse):
  """What the backward pass takes off each weight's gradient, [b a q]."""
  product = out.astype(jnp.float32) * do.astype(jnp.float32)
  return jnp.swapaxes(product.sum(-1) - dlse, 1, 2)
