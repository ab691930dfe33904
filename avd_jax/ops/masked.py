"""Attention by one masked product over all keys: the definition, on a `Sight`.

The mask and the logits have the size of queries times keys, so this is for
small problems and for tests, which hold every other implementation to it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avd_jax.ops import routing as routing_lib
from avd_jax.ops.masks import Sight
from avd_jax.ops.problem import Problem
from avd_jax.ops.reference import Out, merge, reference
from avd_jax.ops.routing import Routing


def refuses(problem: Problem) -> str | None:
  """Nothing: any mask, shape and type."""
  del problem
  return None


def token_mask(
  sight: Sight, chosen: jax.Array | None = None
) -> Bool[Array, "... q k"]:
  """Who sees whom, token by token: [q k], or [b a q k] where routed."""
  tokens = sight.tokens
  if chosen is None:
    rows = jnp.repeat(jnp.asarray(sight.sees), tokens, 0)
  else:
    rows = routing_lib.chosen_columns(chosen, sight).swapaxes(1, 2)
  return jnp.repeat(rows, tokens, -1)


def attend(
  q: Float[Array, "b q a d"],
  k: Float[Array, "b k a d"],
  v: Float[Array, "b k a d"],
  sight: Sight,
  *,
  routing: Routing | None = None,
  q_sink: Float[Array, "b q a d"] | None = None,
) -> Out:
  """One masked softmax over all keys."""
  chosen = None
  if routing is not None:
    chosen = routing_lib.choose(q, sight, routing, q_sink)
  mask = token_mask(sight, chosen)
  split = sight.sink * sight.tokens if q_sink is not None else 0
  out = reference(q, k[:, split:], v[:, split:], mask[..., split:])
  if not split:
    return out
  to_sink = reference(q_sink, k[:, :split], v[:, :split], mask[..., :split])
  return merge(out, to_sink)
