"""Attention on a mesh: each device's share, and exact merges of shares.

Videos are cut over mesh axes data and fsdp, heads over tensor: neither needs
anybody else's. Over context the tokens *of every chunk* are cut, so that a
device holds a part of each chunk: masks, which know chunks only, stay what they
were, all devices have equal work however long the history, and a rollout's one
chunk is cut like a training video's many.

What then travels is what costs least. Against a KV cache, and wherever history
is routed, keys and values stay where they are: in a ring, each device's queries
pass by every other's keys and take along what they have seen so far, merged by
log-sum-exp into the one softmax over all keys. Queries of a decoded chunk are
few and its history is long, so this moves little. In dense attention over whole
videos keys and values are gathered instead, which moves less than queries with
their float32 sums, and asks no gradient through a kernel's lse; where blocks
are recomputed (model.remat) they last as long as a block's backward pass.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from avd_jax import parallel
from avd_jax.errors import UserError
from avd_jax.ops.masks import Sight
from avd_jax.ops.reference import Out, merge
from avd_jax.ops.routing import Routing

CHUNKS = parallel.spec(parallel.HEADS)
MEANS = parallel.spec(parallel.MEANS)


def shards(mesh: Mesh) -> tuple[int, int, int]:
  """Parts that videos, a chunk's tokens and heads are cut into."""
  sizes = mesh.shape
  return sizes["data"] * sizes["fsdp"], sizes["context"], sizes["tensor"]


def divides(mesh: Mesh, videos: int, tokens: int, heads: int) -> bool:
  """Whether every device gets as much as any other."""
  sizes = zip((videos, tokens, heads), shards(mesh), strict=True)
  return not any(size % parts for size, parts in sizes)


def attend(
  call: Callable[..., Out],
  mesh: Mesh,
  q: Float[Array, "b *q a d"],
  k: Float[Array, "b *k a d"],
  v: Float[Array, "b *k a d"],
  sight: Sight,
  routing: Routing | None = None,
  q_sink: Float[Array, "b *q a d"] | None = None,
) -> tuple[Float[Array, "b *q a d"], Float[Array, "b *q a"]]:
  """`call`, an implementation of attention, on each device's share.

  Args:
    call: see `ops.attention`; must have a gradient through its lse where
      context cuts tokens, history is routed and gradients are taken.
    mesh: what to run on.
    q: queries [b q a d], or by chunk [b n s a d].
    k: keys.
    v: values.
    sight: which chunk sees which.
    routing: with descriptors of whole chunks.
    q_sink: queries to sinks.

  Returns:
    (out, of q's shape, and lse, float32, without the last axis).

  Raises:
    UserError: a mesh that does not divide videos, tokens and heads.
  """
  videos, tokens, heads = q.shape[0], sight.tokens, q.shape[-2]
  if not divides(mesh, videos, tokens, heads):
    parts = shards(mesh)
    raise UserError(
      f"attention over {videos} videos, {tokens} tokens a chunk and {heads}"
      f" heads is not divisible by mesh axes data x fsdp = {parts[0]}, context"
      f" = {parts[1]} and tensor = {parts[2]}; change data.batch_size,"
      " model.num_heads, the frame size or mesh"
    )
  split = lambda x: x.reshape(videos, -1, tokens, *x.shape[-2:])
  moving = {"q": q, "q_sink": q_sink, "q_means": routing and routing.q}
  moving = jax.tree.map(split, moving)
  means = routing and routing.descriptors
  arrays = {"k": split(k), "v": split(v), "means": means}
  specs = (
    jax.tree.map(lambda _: CHUNKS, moving),
    {
      "k": CHUNKS,
      "v": CHUNKS,
      "means": routing and MEANS,
    },
  )
  tables = {"order": routing and routing.order}
  if not sight.static:
    tables |= {"sees": sight.sees, "own": sight.own, "count": sight.count}
  specs += (jax.tree.map(lambda _: PartitionSpec(), tables),)
  context = mesh.shape["context"]
  gather = context > 1 and sight.static and routing is None
  flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])

  def share(moving, arrays, tables):
    tables = dict(tables)
    order = tables.pop("order")
    part = dict(tokens=tokens // context, **tables)
    seen = sight.cut(context) if gather else dataclasses.replace(sight, **part)
    rule = routing and Routing(
      routing.top_k, arrays["means"], moving["q_means"], order
    )
    q, k, v = moving["q"], arrays["k"], arrays["v"]
    return call(q, k, v, seen, routing=rule, q_sink=moving["q_sink"])

  def local(moving, arrays, tables):
    by_chunk = moving["q"].shape
    moving = jax.tree.map(flat, moving)
    keys = {name: arrays[name] for name in ("k", "v")}
    if gather:
      whole = lambda x: jax.lax.all_gather(x, "context", axis=2, tiled=True)
      keys = jax.tree.map(whole, keys)
    arrays = arrays | jax.tree.map(flat, keys)
    if context == 1 or gather:
      out, lse = share(moving, arrays, tables)
    else:
      out, lse = _ring(share, context, moving, arrays, tables)
    return out.reshape(by_chunk), lse.reshape(by_chunk[:-1])

  # check_vma would want every kernel to annotate its outputs.
  out, lse = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=specs,
    out_specs=(CHUNKS, PartitionSpec(*CHUNKS[:4])),
    check_vma=False,
  )(moving, arrays, tables)
  return out.reshape(q.shape), lse.reshape(q.shape[:-1])


def attend_all(
  call: Callable[..., jax.Array],
  mesh: Mesh,
  q: Float[Array, "b n s a d"],
  k: Float[Array, "b m a d"],
  v: Float[Array, "b m a d"],
) -> Float[Array, "b n s a d"]:
  """`call` on each device's queries, and on keys that no chunk is cut from."""
  return jax.shard_map(
    call,
    mesh=mesh,
    in_specs=(CHUNKS, MEANS, MEANS),
    out_specs=CHUNKS,
    check_vma=False,
  )(q, k, v)


Share = Callable[[Any, Any, Any], Out]


def _move(tree: Any, devices: int) -> Any:
  """Hands a tree to the next device of the ring."""
  onward = [(i, (i + 1) % devices) for i in range(devices)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, "context", onward), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(share: Share, devices: int, queries: Any, keys: Any, tables: Any):
  """All devices' shares of some queries, merged where the queries live.

  Its gradient goes round once more: by default every hop's queries, and what an
  implementation keeps of them, would be kept, which is all of the video on
  every device.
  """

  def see(queries):
    out, lse = share(queries, keys, tables)
    return out.astype(jnp.float32), lse

  def hop(carry, _):
    queries, so_far = _move(carry, devices)
    return (queries, merge(so_far, see(queries))), None

  carry = (queries, see(queries))
  carry, _ = jax.lax.scan(hop, carry, length=devices - 1)
  out, lse = _move(carry[1], devices)
  return out.astype(queries["q"].dtype), lse


def _ring_forward(share, devices, queries, keys, tables):
  out, lse = _ring(share, devices, queries, keys, tables)
  return (out, lse), (queries, keys, tables, out, lse)


def _ring_backward(share, devices, saved, grads):
  queries, keys, tables, out, lse = saved
  grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  add = lambda total, x: total + x.astype(jnp.float32)

  def hop(carry, _):
    (queries, out, lse, (d_out, d_lse), d_queries), d_keys = carry
    (part, part_lse), pull = jax.vjp(
      lambda queries, keys: share(queries, keys, tables), queries, keys
    )
    # out is the average of its parts, weighted by their exponentiated lse.
    weight = jnp.exp(part_lse - lse)
    more = part.astype(jnp.float32) - out.astype(jnp.float32)
    d_part = (weight[..., None] * d_out).astype(part.dtype)
    d_part_lse = weight * (d_lse + jnp.sum(d_out * more, -1))
    found = pull((d_part, d_part_lse))
    d_queries = jax.tree.map(add, d_queries, found[0])
    d_keys = jax.tree.map(add, d_keys, found[1])
    guest = (queries, out, lse, (d_out, d_lse), d_queries)
    return (_move(guest, devices), d_keys), None

  guest = (queries, out, lse, grads, jax.tree.map(zeros, queries))
  carry = (guest, jax.tree.map(zeros, keys))
  ((*_, d_queries), d_keys), _ = jax.lax.scan(hop, carry, length=devices)
  cast = lambda d, x: d.astype(x.dtype)
  d_queries = jax.tree.map(cast, d_queries, queries)
  return d_queries, jax.tree.map(cast, d_keys, keys), None


_ring.defvjp(_ring_forward, _ring_backward)
