"""Self-attention of a CausalDiT, in both faces, before the front door.

Here keys and queries get their rotary positions, sinks their shorter distance,
and history its descriptors; `ops/attention.py` does the rest. The two faces
hand it the same numbers in another arrangement.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avd_jax.errors import UserError
from avd_jax.ops import attention, kv_cache, masks, rope
from avd_jax.ops import routing as routing_lib
from avd_jax.ops.attention import Place
from avd_jax.ops.masks import Sight
from avd_jax.ops.problem import describe
from avd_jax.ops.routing import Routing

DESCRIPTORS = ("rotated", "raw")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """What a query sees; no field changes the weights.

  Attributes:
    window: chunks of history a chunk sees; None sees all.
    sink: first chunks that stay in sight beyond the window.
    routing_top_k: chunks of what is in sight that each query of each head
      chooses; its own chunk comes on top. None attends to all in sight.
    descriptor: whose mean describes a chunk: "rotated" keys, those that
      attention meets, or "raw" ones, without position.
    implementation: see `ops.attention`; "auto" picks by platform and shape.
  """

  window: int | None = None
  sink: int = 0
  routing_top_k: int | None = None
  descriptor: str = "rotated"
  implementation: str = "auto"

  def __post_init__(self):
    if self.sink and self.window is None:
      raise UserError(
        "model.attention.sink needs model.attention.window: without a window"
        " every chunk stays in sight anyway"
      )
    if self.window is not None:
      masks.Window(self.window, self.sink)
    for field, allowed in (
      ("descriptor", DESCRIPTORS),
      ("implementation", ("auto", *attention.IMPLEMENTATIONS)),
    ):
      if getattr(self, field) not in allowed:
        raise UserError(
          f"model.attention.{field} {getattr(self, field)!r} is not one of"
          f" {', '.join(allowed)}"
        )
    for name in ("cudnn", "splash"):
      if self.implementation == name and (self.routing_top_k or self.sink):
        lacks = "routing_top_k" if self.routing_top_k else "sink"
        able = ("triton", "tpu") if self.routing_top_k else ("triton",)
        raise UserError(
          f"model.attention.implementation {name!r} lacks"
          f" model.attention.{lacks}: use {', '.join(able)}, xla, reference or"
          " auto"
        )
    if self.implementation == "tpu" and not (self.routing_top_k or self.sink):
      raise UserError(
        "model.attention.implementation 'tpu' is for routed history and sinks:"
        " set model.attention.routing_top_k, or use splash or auto"
      )
    if self.routing_top_k is None:
      return
    if self.routing_top_k < 1:
      raise UserError(
        f"model.attention.routing_top_k {self.routing_top_k}: at least 1, or"
        " None to attend to all in sight"
      )
    if self.window is not None:
      self.check_top_k(self.window + self.sink, "its window and sink hold")

  def check_top_k(self, most: int, what: str) -> None:
    """Refuses to choose more chunks than a query can ever see.

    Raises:
      UserError: naming the setting and its range.
    """
    k = self.routing_top_k
    if k is not None and k > most:
      raise UserError(
        f"model.attention.routing_top_k {k}: {what} {most} chunks of history;"
        f" give 1 to {most}, or None to attend to all in sight"
      )


def check(
  cfg: AttentionConfig,
  chunks: int,
  tokens: int,
  heads: int,
  head_dim: int,
  dtype: str,
  place: Place,
  trains: bool = True,
) -> None:
  """Refuses an implementation that cannot do a model's attention.

  Both faces are asked about: videos of `chunks` chunks at once in two streams,
  and a chunk of `tokens` tokens against a cache of them, ring or whole. Without
  `trains` only what a sampler does: a chunk against its ring.

  Raises:
    UserError: naming the setting, the reason, and what could do it.
  """
  shape = lambda n: jax.ShapeDtypeStruct(
    (1, n * tokens, heads, head_dim), dtype
  )
  caches = [
    kv_cache.layout(chunks, cfg.window, cfg.sink, keep_all)
    for keep_all in (False, True)[: 1 + trains]
  ]
  sights = [layout.sight(jnp.int32(0), tokens) for layout in caches]
  if trains:
    mask = masks.history_mask(2, cfg.window, cfg.sink)
    sights.append(masks.sight(mask, chunks, 2, tokens, None, cfg.sink))
  for sight in sights:
    rows, columns = sight.sees.shape
    top_k = cfg.routing_top_k
    if top_k and top_k >= routing_lib.most_candidates(sight):
      top_k = None  # as in `attend`: then all in sight is chosen
    problem = describe(
      attention.platform_of(place),
      shape(rows),
      shape(columns),
      sight,
      top_k,
      bool(cfg.sink),
      attention.capability_of(place),
    )
    attention.choose(attention.share(problem, place), cfg.implementation)


class Angles(NamedTuple):
  """Rotary angles of a pass's tokens.

  Attributes:
    own: [n s d//2], at their own frames.
    sink: of queries to sink keys, as if nearer; None without sinks.
  """

  own: jax.Array
  sink: jax.Array | None


class Past(NamedTuple):
  """A history that a rollout already computed, of one layer or stacked.

  Attributes:
    k: rotated keys [b n s a d].
    v: values.
    mean: descriptors [b n a d]; None without routing.
  """

  k: jax.Array
  v: jax.Array
  mean: jax.Array | None = None


def angles(
  cfg: AttentionConfig,
  chunk: jax.Array,
  frames: jax.Array,
  chunk_frames: int,
  **grid,
) -> Angles:
  """Angles of the tokens of `frames`, which belong to chunks `chunk`.

  A sink slides along with the window: the distance to it never exceeds sink +
  window chunks, which training has seen.
  """

  def by_chunk(frames):
    angles = rope.grid_angles(frames, **grid)
    return angles.reshape(len(frames) // chunk_frames, -1, angles.shape[-1])

  own = by_chunk(frames)
  if not cfg.sink:
    return Angles(own, None)
  far = jnp.maximum(chunk - (cfg.sink + cfg.window), 0) * chunk_frames
  return Angles(own, by_chunk(frames - far))


def _described(cfg, raw, rotated):
  """Descriptors of the chunks of keys, where routing wants them."""
  if cfg.routing_top_k is None:
    return None
  keys = raw if cfg.descriptor == "raw" else rotated
  return routing_lib.descriptors(keys, keys.shape[2])


def _routing(cfg, mean, q, order=None) -> Routing | None:
  if cfg.routing_top_k is None:
    return None
  # A window may leave fewer chunks than top_k in a short video.
  top_k = min(cfg.routing_top_k, mean.shape[1])
  raw = q if cfg.descriptor == "raw" else None
  return Routing(top_k, mean, raw, order)


def parallel(
  cfg: AttentionConfig,
  q: Float[Array, "b n s a d"],
  k: Float[Array, "b n s a d"],
  v: Float[Array, "b n s a d"],
  turns: Angles,
  sight: Sight,
  past: Past | None = None,
  place: Place = None,
) -> Float[Array, "b n s a d"]:
  """All chunks at once; with `past`, q, k and v are the noisy stream's.

  Args:
    cfg: what a query sees.
    q: queries before rotation.
    k: keys before rotation.
    v: values.
    turns: angles of one stream's tokens; streams share them.
    sight: which chunk sees which.
    past: keys, values and descriptors of the history stream.
    place: what the program will run on; see `ops.attention`.
  """
  streams = q.shape[1] // turns.own.shape[0]
  turn = lambda z, by: rope.rotate(z, jnp.tile(by, (streams, 1, 1)))
  near = turn(k, turns.own)
  if past is None:
    mean = _described(cfg, k, near)
    mean = None if mean is None else mean[:, : sight.history]
  else:
    near = jnp.concatenate([past.k.astype(k.dtype), near], 1)
    v = jnp.concatenate([past.v.astype(v.dtype), v], 1)
    mean = past.mean
  out, _ = attention.attend(
    turn(q, turns.own),
    near,
    v,
    sight,
    routing=_routing(cfg, mean, q),
    q_sink=None if turns.sink is None else turn(q, turns.sink),
    implementation=cfg.implementation,
    place=place,
  )
  return out


def cached(
  cfg: AttentionConfig,
  q: Float[Array, "b 1 s a d"],
  k: Float[Array, "b 1 s a d"],
  v: Float[Array, "b 1 s a d"],
  turns: Angles,
  layer: Past,
  layout: kv_cache.Layout,
  chunk: jax.Array,
  place: Place = None,
) -> tuple[Float[Array, "b 1 s a d"], Past]:
  """One chunk against a layer's cache, whose slot for it is overwritten."""
  slot = layout.slot(chunk)
  near = rope.rotate(k, turns.own)
  mean = layer.mean
  if mean is not None:
    mean = kv_cache.write(mean, _described(cfg, k, near), slot)
  layer = Past(
    kv_cache.write(layer.k, near, slot), kv_cache.write(layer.v, v, slot), mean
  )
  order = None if layout.in_order else layout.held(chunk)
  out, _ = attention.attend(
    rope.rotate(q, turns.own),
    layer.k.astype(q.dtype),
    layer.v.astype(q.dtype),
    layout.sight(chunk, q.shape[2]),
    routing=_routing(cfg, mean, q, order),
    q_sink=None if turns.sink is None else rope.rotate(q, turns.sink),
    implementation=cfg.implementation,
    place=place,
  )
  return out, layer
