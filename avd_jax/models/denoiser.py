"""A CausalDiT as a `Denoiser`: two faces of one set of weights.

`parallel` runs all chunks under the training mask, scanning over layers;
`cached` runs one chunk against a KV cache, with the layers unrolled over the
same stacked parameters, so that each layer's cache is updated in place (a scan
over layers would copy all of it). Tests hold the two equal.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh
from jaxtyping import Array, Float

from avd_jax import parallel
from avd_jax.models import attention
from avd_jax.models.dit import Block, CausalDiT
from avd_jax.models.dit_config import DiTConfig
from avd_jax.ops import kv_cache, masks
from avd_jax.ops.attention import Place, platform_of
from avd_jax.typing import Denoiser, Params, Text


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["kv"],
  meta_fields=["layout"],
)
@dataclasses.dataclass(frozen=True)
class Cache:
  """A KV cache and, as static data, where chunks live in it."""

  kv: kv_cache.KVCache
  layout: kv_cache.Layout

  def layers(self) -> list[attention.Past]:
    """What each layer remembers."""
    mean = self.kv.mean or (None,) * len(self.kv.k)
    return [
      attention.Past(*parts)
      for parts in zip(self.kv.k, self.kv.v, mean, strict=True)
    ]


def _cached(
  cfg: DiTConfig,
  place: Place,
  attend: Callable[..., tuple[Array, attention.Past]],
  params: Params,
  x: Float[Array, "b f h w c"],
  t: Float[Array, "b"],
  text: Text,
  cache: Cache,
  chunk: Array,
) -> tuple[Float[Array, "b f h w c"], Cache]:
  """One chunk against the cache: the second face of the same weights."""
  model = CausalDiT(cfg, place=place)
  call = functools.partial(model.apply, {"params": params})
  t = t[:, None]
  e, e0, context = call(t, text, method="condition")
  tokens = call(x, method="embed")
  frames = chunk * cfg.chunk_frames + jnp.arange(cfg.chunk_frames)
  turns = call(x, frames // cfg.chunk_frames, frames, method="angles")
  layers = []
  for i, past in enumerate(cache.layers()):
    weights = jax.tree.map(lambda w, i=i: w[i], params["blocks"])
    block = functools.partial(
      Block(cfg, place=place).apply, {"params": weights}
    )
    q, k, v = block(tokens, e0, method="qkv")
    out, past = attend(
      cfg.attention, q, k, v, turns, past, cache.layout, chunk, place
    )
    tokens = block(tokens, e0, out, context, method="finish")
    layers.append(past)
  v = call(tokens, e, x, t, method="predict")
  k, v_, mean = zip(*layers, strict=True)
  kv = kv_cache.KVCache(k, v_, mean if cache.kv.mean else ())
  return v, dataclasses.replace(cache, kv=_placed(kv, cfg, place))


def _placed(
  kv: kv_cache.KVCache, cfg: DiTConfig, place: Place
) -> kv_cache.KVCache:
  """A cache cut over the mesh like the activations it is made of."""
  see = cfg.attention
  dense = see.routing_top_k is None and not see.sink

  def chunks(x):
    x = parallel.constrain(x, place, parallel.HEADS)
    if platform_of(place) != "tpu" or not dense:
      return x
    # Tokens within heads, as it comes and as splash reads it: a loop over
    # chunks would lay it out anew, and so hold it twice. (tpu_routed, which has
    # routing and sinks, reads heads within tokens.)
    laid = lambda x: with_layout_constraint(x, Layout((0, 1, 3, 2, 4)))
    if not isinstance(place, Mesh) or place.size == 1:
      return laid(x)
    # XLA cuts no layout constraint: said of each device's share.
    cut = parallel.spec(parallel.HEADS)
    return jax.shard_map(laid, mesh=place, in_specs=cut, out_specs=cut)(x)

  means = (parallel.constrain(x, place, parallel.MEANS) for x in kv.mean)
  return kv_cache.KVCache(
    tuple(map(chunks, kv.k)), tuple(map(chunks, kv.v)), tuple(means)
  )


def make(
  cfg: DiTConfig,
  place: Place = None,
  attend: Callable[..., tuple[Array, attention.Past]] = attention.cached,
) -> Denoiser:
  """The two faces of a CausalDiT.

  Args:
    cfg: the network.
    place: what programs will run on: a platform, a mesh, or None for JAX's
      default backend.
    attend: a layer's attention in the cached face; who wants to look on wraps
      `attention.cached`.
  """

  def parallel(params, x, t, text, history=None):
    model = CausalDiT(cfg, history is not None, place)
    return model.apply({"params": params}, x, t, text, history)

  def init_cache(x, chunks, keep_all=False):
    """An empty cache; `x` [b f h w c] is a chunk, or has its shape."""
    rows, columns = cfg.grid(x.shape[2], x.shape[3])
    see = cfg.attention
    layout = kv_cache.layout(chunks, see.window, see.sink, keep_all)
    tokens = cfg.chunk_frames * rows * columns
    shape = (x.shape[0], tokens, cfg.num_heads, cfg.head_dim)
    routed = see.routing_top_k is not None
    kv = kv_cache.init(cfg.num_layers, layout.slots, shape, cfg.dtype, routed)
    return Cache(_placed(kv, cfg, place), layout)

  cached = functools.partial(_cached, cfg, place, attend)
  return Denoiser(parallel, cached, init_cache, cfg.chunk_frames)


def init(cfg: DiTConfig, key: Array, x, text) -> Params:
  """Parameters, boxed with their logical axes (`flax.linen.meta`).

  Args:
    cfg: the network.
    key: a PRNG key.
    x: a batch of videos [b f h w c], or its shape.
    text: its text.
  """
  # Parameters do not depend on the length, nor on who computes attention.
  x = jnp.zeros((x.shape[0], cfg.chunk_frames, *x.shape[2:]))
  t = jnp.zeros((x.shape[0], 1))
  see = attention.AttentionConfig(implementation="reference")
  cfg = dataclasses.replace(cfg, attention=see)
  text = jnp.zeros(text.shape, text.dtype)
  return CausalDiT(cfg).init(key, x, t, text)["params"]


def abstract_params(
  cfg: DiTConfig, x, text, mesh: Mesh | None = None
) -> Params:
  """Shapes and types of the parameters, nothing allocated; on one device, or
  with their shardings over a mesh.

  Raises:
    UserError: a mesh that does not cut them evenly.
  """
  boxed = jax.eval_shape(lambda key: init(cfg, key, x, text), jax.random.key(0))
  whole = nn.meta.unbox(boxed)
  if mesh is None:
    return whole
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    whole,
    parallel.state_shardings(boxed, mesh),
  )


def forward_flops(
  cfg: DiTConfig, frames: int, height: int, width: int, streams: int
) -> int:
  """Multiply-adds, times two, that a parallel pass over one video needs.

  Linear layers of every token and attention over visible pairs only, whatever
  an implementation really computes; embeddings and text are left out.
  """
  rows, columns = cfg.grid(height, width)
  tokens = cfg.chunk_frames * rows * columns
  chunks = frames // cfg.chunk_frames
  see = cfg.attention
  mask = masks.history_mask(streams, see.window, see.sink)
  sight = masks.sight(mask, chunks, streams, tokens)
  history = sight.candidates().sum(1)
  if see.routing_top_k is not None:
    history = np.minimum(history, see.routing_top_k)
  pairs = int(history.sum() + len(sight.own)) * tokens**2
  linear = 4 * cfg.dim**2 + 2 * cfg.dim * cfg.ffn_dim
  if cfg.text != "none":
    linear += 2 * cfg.dim**2
  all_tokens = streams * chunks * tokens
  return cfg.num_layers * (2 * all_tokens * linear + 4 * pairs * cfg.dim)
