"""cuDNN's flash attention, through JAX's public call, a chunk at a time.

No mask is ever built: every chunk of queries meets the contiguous keys that it
sees. Its gradient ignores the log-sum-exp, so that one is refused rather than
silently dropped.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avd_jax.ops import chunked, masked
from avd_jax.ops.masks import Sight
from avd_jax.ops.problem import Problem
from avd_jax.ops.reference import Out, without_gradient
from avd_jax.ops.routing import Routing

DTYPES = ("bfloat16", "float16")


def refuses(problem: Problem) -> str | None:
  """Why cuDNN cannot do a problem, or None."""
  if problem.platform != "gpu":
    return f"it runs on a GPU, not on {problem.platform}"
  if problem.dtype not in DTYPES:
    return f"it takes {' or '.join(DTYPES)}, not {problem.dtype} (model.dtype)"
  if problem.head_dim % 8 or problem.head_dim > 128:
    return (
      f"it takes head dims that are multiples of 8 up to 128, not"
      f" {problem.head_dim} (model.dim / model.num_heads)"
    )
  if problem.top_k is not None:
    return (
      "it cannot route (model.attention.routing_top_k): use triton, xla or"
      " reference"
    )
  if problem.sink_queries:
    return (
      "it has no gradient through the log-sum-exp that joins re-based sinks"
      " (model.attention.sink)"
    )
  if not problem.static and not problem.prefix:
    return "it sees a prefix of a KV cache only"
  return None


@functools.partial(jax.jit, inline=True)
def _product(q, k, v) -> Out:
  out, lse = jax.nn.dot_product_attention(
    q, k, v, implementation="cudnn", return_residual=True
  )
  return out, lse.astype(jnp.float32)


def attend(
  q: Float[Array, "b q a d"],
  k: Float[Array, "b k a d"],
  v: Float[Array, "b k a d"],
  sight: Sight,
  *,
  routing: Routing | None = None,
  q_sink: Float[Array, "b q a d"] | None = None,
) -> Out:
  """Per-chunk calls; against a cache, one call with a length.

  Raises:
    NotImplementedError: a gradient is taken through the returned lse of a
      pass over whole videos.
  """
  del routing, q_sink  # refused above
  if sight.static:
    out, lse = chunked.per_chunk(q, k, v, sight, product=_product)
    return out, without_gradient(lse, "cuDNN's attention")

  def fast(q, k, v, sees):
    length = jnp.sum(sees[0]).astype(jnp.int32) * sight.tokens
    return jax.nn.dot_product_attention(
      q,
      k,
      v,
      key_value_seq_lengths=jnp.broadcast_to(length, q.shape[:1]),
      query_seq_lengths=jnp.full(q.shape[:1], q.shape[1], jnp.int32),
      implementation="cudnn",
      return_residual=True,
    )

  def exact(q, k, v, sees):
    seen = Sight(sees, sight.own, sight.tokens, sight.history)
    return masked.attend(q, k, v, seen)

  return chunked.exact_gradient(fast, exact)(q, k, v, jnp.asarray(sight.sees))
