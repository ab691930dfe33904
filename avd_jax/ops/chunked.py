"""Attention without a kernel of its own: a product per chunk, no token mask.

Each chunk of queries meets exactly the keys that its row of the mask names, so
that the work is what the mask needs and nothing has the size of queries times
keys. Against a KV cache a loop runs over the slots that are seen, as many
times as there are such slots: a static cache costs what it holds.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avd_jax.ops import masked
from avd_jax.ops import routing as routing_lib
from avd_jax.ops.masks import Sight
from avd_jax.ops.problem import Problem
from avd_jax.ops.reference import EMPTY, Out, merge, reference
from avd_jax.ops.routing import Routing

Product = Callable[..., Out]


def refuses(problem: Problem) -> str | None:
  """Nothing: any mask, shape and type."""
  del problem
  return None


def attend(
  q: Float[Array, "b q a d"],
  k: Float[Array, "b k a d"],
  v: Float[Array, "b k a d"],
  sight: Sight,
  *,
  routing: Routing | None = None,
  q_sink: Float[Array, "b q a d"] | None = None,
) -> Out:
  """Per-chunk products in plain JAX; routed history is masked."""
  if sight.static:
    return per_chunk(q, k, v, sight, routing=routing, q_sink=q_sink)
  if routing is not None:
    return _gathered(q, k, v, sight, routing, q_sink)
  return over_slots(q, k, v, sight, q_sink)


def per_chunk(
  q: Float[Array, "b q a d"],
  k: Float[Array, "b k a d"],
  v: Float[Array, "b k a d"],
  sight: Sight,
  *,
  routing: Routing | None = None,
  q_sink: Float[Array, "b q a d"] | None = None,
  product: Product = reference,
) -> Out:
  """One `product` of a chunk's queries with the keys it sees, chunk by chunk.

  Args:
    q: queries.
    k: keys.
    v: values.
    sight: static.
    routing: adds a token mask to each product.
    q_sink: queries to sink keys, in a product of their own.
    product: (q, k, v) -> (out, lse), or (q, k, v, mask) where routed.
  """
  chosen = None
  if routing is not None:
    chosen = routing_lib.choose(q, sight, routing, q_sink)
  split = sight.sink if q_sink is not None else 0
  parts = []
  for row in range(sight.sees.shape[0]):
    rows = slice(row * sight.tokens, (row + 1) * sight.tokens)
    runs = sight.runs(row)
    hot = None
    if chosen is not None:
      one = Sight(sight.sees, sight.own[row : row + 1], sight.tokens, 0)
      hot = routing_lib.chosen_columns(chosen[:, rows], one).swapaxes(1, 2)
    meet = lambda q, runs, hot=hot: _meet(
      product, q, k, v, runs, sight.tokens, hot
    )
    rest = [(max(a, split), b) for a, b in runs if b > split]
    sinks = [(a, min(b, split)) for a, b in runs if a < split]
    branches = [meet(q[:, rows], rest)] if rest else []
    branches += [meet(q_sink[:, rows], sinks)] if sinks else []
    parts.append(branches[0] if len(branches) == 1 else merge(*branches))
  outs, lses = zip(*parts, strict=True)
  return jnp.concatenate(outs, 1), jnp.concatenate(lses, 1)


def _meet(product, q, k, v, runs, tokens, hot):
  """Queries of one chunk with the keys of some runs of columns."""
  pick = lambda x, by, axis: _join(
    [jax.lax.slice_in_dim(x, a * by, b * by, axis=axis) for a, b in runs], axis
  )
  k, v = pick(k, tokens, 1), pick(v, tokens, 1)
  if hot is None:
    return product(q, k, v)
  return product(q, k, v, jnp.repeat(pick(hot, 1, 3), tokens, -1))


def _join(parts, axis):
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def exact_gradient(fast: Callable, exact: Callable) -> Callable:
  """`fast`, with the gradient of `exact`: they compute the same.

  For what only decoding calls: it is right, if slow, to differentiate it.
  """
  call = jax.custom_vjp(fast)
  call.defvjp(
    lambda *args: (fast(*args), args),
    lambda args, grads: jax.vjp(exact, *args)[1](grads),
  )
  return call


def over_slots(
  q: Float[Array, "b q a d"],
  k: Float[Array, "b k a d"],
  v: Float[Array, "b k a d"],
  sight: Sight,
  q_sink: Float[Array, "b q a d"] | None = None,
  product: Product = reference,
) -> Out:
  """The single row of a traced sight, slot after slot that it sees.

  Args:
    q: queries of a chunk.
    k: keys, a chunk a slot.
    v: values.
    sight: traced.
    q_sink: queries to the slots that are sinks.
    product: (q, k, v) of one slot -> (out, lse); its gradient is not asked for.
  """

  def exact(q, k, v, q_sink, sees):
    seen = Sight(sees, sight.own, sight.tokens, sight.history, sight.sink)
    return masked.attend(q, k, v, seen, q_sink=q_sink)

  def fast(q, k, v, q_sink, sees):
    columns = jnp.argsort(~sees[0], stable=True)
    # As the cache has them: flat, XLA would copy all of it before the loop.
    by_slot = lambda x: x.reshape(len(x), -1, sight.tokens, *x.shape[2:])
    keys, values = by_slot(k), by_slot(v)

    def step(i, carry):
      column = columns[i]
      cut = lambda x: jax.lax.dynamic_index_in_dim(x, column, 1, False)
      turned = q
      if q_sink is not None:
        turned = jnp.where(column < sight.sink, q_sink, q)
      out, lse = product(turned, cut(keys), cut(values))
      return _fold(carry, out.astype(jnp.float32), lse)

    start = (jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], EMPTY))
    count = jnp.sum(sees[0])
    out, lse = jax.lax.fori_loop(0, count, step, start)
    return out.astype(q.dtype), lse

  call = exact_gradient(fast, exact)
  return call(q, k, v, q_sink, jnp.asarray(sight.sees))


def _gathered(q, k, v, sight: Sight, routing: Routing, q_sink) -> Out:
  """The single row of a traced sight, choice after choice of each query.

  Every query fetches the keys of its own choice: work and memory do not depend
  on how long the history is, nor on who else chose what.
  """

  def exact(q, k, v, q_sink, sees, own, routing):
    seen = Sight(sees, own, sight.tokens, sight.history, sight.sink)
    return masked.attend(q, k, v, seen, routing=routing, q_sink=q_sink)

  def fast(q, k, v, q_sink, sees, own, routing):
    b, _, a, d = q.shape
    seen = Sight(sees, own, sight.tokens, sight.history, sight.sink)
    chosen = routing_lib.choose(q, seen, routing, q_sink)
    split = lambda x: x.reshape(b, -1, sight.tokens, a, d)
    video, head = jnp.arange(b)[:, None, None], jnp.arange(a)
    keys, values = split(k), split(v)

    def step(carry, column):
      fetch = lambda x: x[video, jnp.maximum(column, 0), :, head]
      turned = q
      if q_sink is not None:
        turned = jnp.where((column < sight.sink)[..., None], q_sink, q)
      # One query against keys of its own: queries and heads are the batch.
      flat = lambda x: x.reshape(-1, *x.shape[3:])
      out, lse = reference(
        flat(turned)[:, None, None],
        flat(fetch(keys))[:, :, None],
        flat(fetch(values))[:, :, None],
      )
      lse = jnp.where(column >= 0, lse.reshape(column.shape), EMPTY)
      out = out.reshape(q.shape).astype(jnp.float32)
      return _fold(carry, out, lse), None

    mine = lambda x: jax.lax.dynamic_slice_in_dim(
      x, own[0] * sight.tokens, sight.tokens, 1
    )
    turned = q
    if q_sink is not None:
      turned = jnp.where(own[0] < sight.sink, q_sink, q)
    out, lse = reference(turned, mine(k), mine(v))
    start = (out.astype(jnp.float32), lse)
    steps = jnp.moveaxis(chosen, -1, 0)
    out, lse = jax.lax.scan(step, start, steps)[0]
    return out.astype(q.dtype), lse

  # top_k is a number, not data.
  bind = lambda call: (
    lambda *args: call(*args[:-1], routing._replace(**args[-1]))
  )
  call = exact_gradient(bind(fast), bind(exact))
  arrays = {
    name: getattr(routing, name) for name in ("descriptors", "q", "order")
  }
  sees, own = jnp.asarray(sight.sees), jnp.asarray(sight.own)
  return call(q, k, v, q_sink, sees, own, arrays)


def _fold(carry, out, lse):
  """Another branch joins, as in `merge`, two at a time."""
  old, total = carry
  joint = jnp.logaddexp(total, lse)
  share = lambda x: jnp.exp(x - joint)[..., None]
  return old * share(total) + out * share(lse), joint
