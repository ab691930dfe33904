"""An onlooker beside every layer's attention, while a rollout runs.

It keeps its own mean keys, chooses as the model would, and counts, inside the
rollout's program: its tally travels with the cache. What is attended does not
change, so that a model trained dense can be looked at as if it were routed. It
also weighs the dense softmax over everything in sight: the share of it that
chosen chunks catch is what a descriptor is good for.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avd_jax.models import attention
from avd_jax.models import denoiser as denoiser_lib
from avd_jax.models.dit_config import DiTConfig
from avd_jax.ops import rope, routing
from avd_jax.ops.masks import Sight
from avd_jax.ops.routing import Routing
from avd_jax.typing import Denoiser

PASSES = ("solver", "clean")  # t > 0, and t = 0, whose keys the cache keeps


@dataclasses.dataclass(frozen=True)
class Watch:
  """What to look at.

  Attributes:
    top_k: how many chunks are chosen, each of them a measurement.
    descriptors: what describes a chunk; see `attention.DESCRIPTORS`.
    videos: how many first entries of the batch; guidance appends others.
  """

  top_k: tuple[int, ...]
  descriptors: tuple[str, ...]
  videos: int


class Tally(NamedTuple):
  """Sums over queries; p passes (`PASSES`), n chunks that query.

  Besides: l layers, m descriptors, t values of top_k, a heads, and j chunks
  that are queried, by their absolute index.

  Attributes:
    queries: int32 [p n], how many there were, of one head.
    chosen: int32 [p n l m t a j], how many of them chose a chunk.
    caught: [p n l m t a], dense attention mass on the chosen chunks.
    best: [p n l t a], mass on each query's k heaviest chunks of history.
    mass: [p n l a j], mass on each chunk, their own included.
  """

  queries: jax.Array
  chosen: jax.Array
  caught: jax.Array
  best: jax.Array
  mass: jax.Array


class Watched(NamedTuple):
  """A denoiser's cache and what the onlooker keeps beside it.

  Attributes:
    cache: the denoiser's own.
    means: mean keys of each slot, [b c a d] for each layer and descriptor.
    tally: the counts so far.
  """

  cache: Any
  means: tuple[tuple[jax.Array, ...], ...]
  tally: Tally


def attention_mass(
  q: Float[Array, "b q a d"],
  k: Float[Array, "b c s a d"],
  sight: Sight,
  q_sink: Float[Array, "b q a d"] | None = None,
) -> Float[Array, "b q a c"]:
  """Share of the dense softmax that falls on each column of a sight of one row.

  A column at a time, so that no more than a chunk's logits exist at once.
  """
  scale = q.shape[-1] ** -0.5

  def column(i):
    keys = jax.lax.dynamic_index_in_dim(k, i, 1, keepdims=False)
    near = q if q_sink is None else jnp.where(i < sight.sink, q_sink, q)
    logits = jnp.einsum(
      "bqad,bkad->bqak", near, keys, preferred_element_type=jnp.float32
    )
    return jax.nn.logsumexp(scale * logits, -1)

  lse = jax.lax.map(column, jnp.arange(sight.sees.shape[1]))
  lse = jnp.moveaxis(lse, 0, -1)
  return jax.nn.softmax(jnp.where(sight.sees[0], lse, -jnp.inf), -1)


def _look(watch, means, turns, layout, chunk, q, k, held):
  """One layer: (means, a dict of sums over queries as `Tally` names them).

  `q` and `k` are the chunk's, before rotation; `held` the cache's keys.
  """
  slot, sight = layout.slot(chunk), layout.sight(chunk, q.shape[2])
  order = None if layout.in_order else layout.held(chunk)
  near = rope.rotate(q, turns.own)[:, 0]
  q_sink = None if turns.sink is None else rope.rotate(q, turns.sink)[:, 0]
  mass = attention_mass(near, held.astype(q.dtype), sight, q_sink)
  columns = jnp.arange(mass.shape[-1])
  history = jnp.where(sight.candidates()[0], mass, 0)
  heaviest = -jnp.sort(-history, -1)
  updated, chosen, caught = [], [], []
  for descriptor, mean in zip(watch.descriptors, means, strict=True):
    raw = descriptor == "raw"
    keys = k if raw else rope.rotate(k, turns.own)
    own = routing.descriptors(keys, sight.tokens)
    mean = jax.lax.dynamic_update_slice_in_dim(mean, own, slot, 1)
    options = Routing(max(watch.top_k), mean, q[:, 0] if raw else None, order)
    # Best first: a smaller top_k chooses the first of these.
    choice = routing.choose(near, sight, options, q_sink)
    taken = [
      (choice[..., :top_k, None] == columns).any(-2) for top_k in watch.top_k
    ]
    updated.append(mean)
    chosen.append(jnp.stack([t.sum((0, 1), dtype=jnp.int32) for t in taken]))
    caught.append(
      jnp.stack([jnp.where(t, mass, 0).sum((0, 1, 3)) for t in taken])
    )
  best = [heaviest[..., :top_k].sum((0, 1, 3)) for top_k in watch.top_k]
  return tuple(updated), {
    "chosen": jnp.stack(chosen),
    "caught": jnp.stack(caught),
    "best": jnp.stack(best),
    "mass": mass.sum((0, 1)),
  }


def _add(tally: Tally, sums, layout, phase, chunk, queries) -> Tally:
  """Counts one pass; columns become the chunks that they hold."""
  room = tally.mass.shape[-1]
  held = layout.held(chunk)
  held = jnp.where(held < 0, room, held)  # nothing there: dropped below

  def spread(x):
    wide = jnp.zeros((*x.shape[:-1], room), x.dtype)
    return wide.at[..., held].add(x, mode="drop")

  stacked = {name: jnp.stack([s[name] for s in sums]) for name in sums[0]}
  for name in ("chosen", "mass"):
    stacked[name] = spread(stacked[name])
  more = Tally(queries=queries, **stacked)
  add = lambda total, x: total.at[phase, chunk].add(x)
  return jax.tree.map(add, tally, more)


def watched(cfg: DiTConfig, watch: Watch) -> Denoiser:
  """A CausalDiT whose cached face is looked at; its caches are `Watched`."""
  plain = denoiser_lib.make(cfg)

  def cached(params, x, t, text, cache, chunk):
    means, sums = [], []

    def attend(see, q, k, v, turns, layer, layout, chunk, platform):
      out, layer = attention.cached(
        see, q, k, v, turns, layer, layout, chunk, platform
      )
      first = lambda z: z[: watch.videos]
      mine, sum_ = _look(
        watch, cache.means[len(means)], turns, layout, chunk, first(q),
        first(k), first(layer.k),
      )  # fmt: skip
      means.append(mine)
      sums.append(sum_)
      return out, layer

    looking = denoiser_lib.make(cfg, attend=attend)
    v, inner = looking.cached(params, x, t, text, cache.cache, chunk)
    layout, tokens = inner.layout, inner.kv.k[0].shape[2]
    phase = (t[0] == 0).astype(jnp.int32)
    tally = _add(cache.tally, sums, layout, phase, chunk, watch.videos * tokens)
    return v, Watched(inner, tuple(means), tally)

  def init_cache(x, chunks, keep_all=False):
    cache = plain.init_cache(x, chunks, keep_all)
    slots = cache.layout.slots
    layers, a, d = cfg.num_layers, cfg.num_heads, cfg.head_dim
    m, t = len(watch.descriptors), len(watch.top_k)
    rows = (len(PASSES), chunks)
    means = tuple(
      tuple(jnp.zeros((watch.videos, slots, a, d)) for _ in range(m))
      for _ in range(layers)
    )
    tally = Tally(
      jnp.zeros(rows, jnp.int32),
      jnp.zeros((*rows, layers, m, t, a, chunks), jnp.int32),
      jnp.zeros((*rows, layers, m, t, a)),
      jnp.zeros((*rows, layers, t, a)),
      jnp.zeros((*rows, layers, a, chunks)),
    )
    return Watched(cache, means, tally)

  return plain._replace(cached=cached, init_cache=init_cache)
