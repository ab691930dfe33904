"""History routing: each query token of each head chooses its own history.

A chunk of history is described by the mean of its keys; a query takes the
top-k chunks by inner product with those, and attends, in one softmax, to them
and to its own chunk. Nothing here has parameters, and no gradient passes
through the choice.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from avd_jax.ops.masks import Sight

NONE = -1  # a choice that is not there: fewer chunks than top_k


class Routing(NamedTuple):
  """What choosing needs.

  Attributes:
    top_k: chunks of history that a query chooses.
    descriptors: [b c a d] float32, mean keys of the history columns.
    q: [b q a d], the queries that choose, where they are not those that
      attend (raw descriptors want raw queries).
    order: [c], the chunk that each column holds; ties go to the lowest. None
      where columns stand in order.
  """

  top_k: int
  descriptors: Float[Array, "b c a d"]
  q: Float[Array, "b q a d"] | None = None
  order: Int[Array, "c"] | None = None


def descriptors(
  k: Float[Array, "b *k a d"], tokens: int
) -> Float[Array, "b c a d"]:
  """Mean keys of chunks of `tokens` tokens, float32."""
  chunks = k.reshape(k.shape[0], -1, tokens, *k.shape[-2:])
  return chunks.astype(jnp.float32).mean(2)


def scores(
  q: Float[Array, "b q a d"],
  sight: Sight,
  routing: Routing,
  q_sink: Float[Array, "b q a d"] | None = None,
) -> Float[Array, "b q a c"]:
  """Inner products of queries and descriptors, float32."""

  def product(q, described):
    return jnp.einsum(
      "bqad,bcad->bqac",
      q.astype(jnp.float32),
      described,
      precision=jax.lax.Precision.HIGHEST,
    )

  if routing.q is not None:
    return product(routing.q, routing.descriptors)
  split = sight.sink if q_sink is not None else 0
  rest = product(q, routing.descriptors[:, split:])
  if not split:
    return rest
  return jnp.concatenate(
    [product(q_sink, routing.descriptors[:, :split]), rest], -1
  )


def choose(
  q: Float[Array, "b q a d"],
  sight: Sight,
  routing: Routing,
  q_sink: Float[Array, "b q a d"] | None = None,
) -> Int[Array, "b q a t"]:
  """The columns that each token of each head chooses, best first.

  Ties go to the lowest chunk; where fewer chunks than top_k may be chosen,
  all of them are and NONE fills the rest. [RF Eq. 8]
  """
  score = jax.lax.stop_gradient(scores(q, sight, routing, q_sink))
  may = jnp.repeat(jnp.asarray(sight.candidates()), sight.tokens, 0)
  may = may[None, :, None, :]
  place = None
  if routing.order is not None:  # columns as chunks follow each other
    place = jnp.argsort(routing.order).astype(jnp.int32)
    score, may = score[..., place], may[..., place]
  columns = jnp.arange(score.shape[-1], dtype=jnp.int32)
  may = jnp.broadcast_to(may, score.shape)

  # A loop of rounds, not a sort: columns are few, and a sort of so many short
  # rows is slow everywhere.
  def round_(may, _):
    best = jnp.argmax(jnp.where(may, score, -jnp.inf), -1).astype(jnp.int32)
    taken = jnp.where(jnp.any(may, -1), best, NONE)
    return may & (columns != best[..., None]), taken

  _, chosen = jax.lax.scan(round_, may, length=routing.top_k)
  chosen = jnp.moveaxis(chosen, 0, -1)
  if place is not None:
    chosen = jnp.where(chosen == NONE, NONE, place[chosen])
  return chosen


def everything(q: Float[Array, "b q a d"], sight: Sight) -> Routing:
  """The routing that chooses all in sight: dense, for kernels that route."""
  b, _, a, d = q.shape
  means = jnp.zeros((b, sight.history, a, d))
  return Routing(max(1, most_candidates(sight)), means)


def most_candidates(sight: Sight) -> int:
  """Most columns that a row could choose from."""
  if sight.static:
    return int(sight.candidates().sum(1).max())
  slots = sight.history - 1  # all but one's own
  return slots if sight.most is None else min(slots, sight.most)


def chosen_columns(
  chosen: Int[Array, "b q a t"], sight: Sight
) -> Bool[Array, "b q a {sight.sees.shape[1]}"]:
  """Whether a token attends to a column: chosen, or its own chunk."""
  columns = jnp.arange(sight.sees.shape[1], dtype=jnp.int32)
  own = jnp.repeat(jnp.asarray(sight.own), sight.tokens)[None, :, None, None]
  taken = (chosen[..., None] == columns).any(-2)
  return taken | (columns == own)
