"""A CausalDiT as a `Denoiser`: two faces of one set of weights.

`parallel` runs all chunks under the training mask, scanning over layers;
`cached` runs one chunk against a KV cache, with the layers unrolled over the
same stacked parameters, so that each layer's cache is updated in place (a scan
over layers would copy all of it). Tests hold the two equal.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avd_jax.models.dit import Block, CausalDiT, DiTConfig
from avd_jax.ops import attention, kv_cache, masks, rope
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

  @property
  def k(self):
    return self.kv.k

  @property
  def v(self):
    return self.kv.v


def _cached(
  cfg: DiTConfig,
  params: Params,
  x: Float[Array, "b f h w c"],
  t: Float[Array, "b"],
  text: Text,
  cache: Cache,
  chunk: Array,
) -> tuple[Float[Array, "b f h w c"], Cache]:
  """One chunk against the cache: the second face of the same weights."""
  model = CausalDiT(cfg)
  call = functools.partial(model.apply, {"params": params})
  t = t[:, None]
  e, e0, context = call(t, text, method="condition")
  tokens = call(x, method="embed")
  frames = chunk * cfg.chunk_frames + jnp.arange(cfg.chunk_frames)
  angles, sink_angles = call(
    x, frames // cfg.chunk_frames, frames, method="angles"
  )
  layout = cache.layout
  slot, see = layout.slot(chunk), layout.visible(chunk)
  see = jnp.repeat(see, tokens.shape[2])[None]
  split = layout.sink * tokens.shape[2]
  keys, values = list(cache.kv.k), list(cache.kv.v)
  layer = lambda i: jax.tree.map(lambda w: w[i], params["blocks"])
  for i in range(cfg.num_layers):
    weights = {"params": layer(i)}
    block = functools.partial(Block(cfg).apply, weights)
    q, k, v = block(tokens, e0, method="qkv")
    keys[i] = kv_cache.write(keys[i], rope.rotate(k, angles), slot)
    values[i] = kv_cache.write(values[i], v, slot)
    out = attention.reference(
      rope.rotate(q, angles),
      keys[i][:, split:],
      values[i][:, split:],
      see[:, split:],
    )
    if split:
      to_sink = attention.reference(
        rope.rotate(q, sink_angles),
        keys[i][:, :split],
        values[i][:, :split],
        see[:, :split],
      )
      out = attention.merge(out, to_sink)
    tokens = block(tokens, e0, out[0], context, method="finish")
  v = call(tokens, e, x, t, method="predict")
  kv = kv_cache.KVCache(tuple(keys), tuple(values))
  return v, dataclasses.replace(cache, kv=kv)


def make(cfg: DiTConfig) -> Denoiser:
  """The two faces of a CausalDiT."""

  def parallel(params, x, t, text, history=None):
    model = CausalDiT(cfg, history is not None)
    return model.apply({"params": params}, x, t, text, history)

  def init_cache(x, chunks, keep_all=False):
    """An empty cache; `x` [b f h w c] is a chunk, or has its shape."""
    rows, columns = cfg.grid(x.shape[2], x.shape[3])
    layout = kv_cache.layout(chunks, cfg.window, cfg.sink, keep_all)
    tokens = layout.slots * cfg.chunk_frames * rows * columns
    shape = (x.shape[0], tokens, cfg.num_heads, cfg.head_dim)
    return Cache(kv_cache.init(cfg.num_layers, shape, cfg.dtype), layout)

  return Denoiser(
    parallel, functools.partial(_cached, cfg), init_cache, cfg.chunk_frames
  )


def init(cfg: DiTConfig, key: Array, x, text) -> Params:
  """Parameters, boxed with their logical axes (`flax.linen.meta`).

  Args:
    cfg: the network.
    key: a PRNG key.
    x: a batch of videos [b f h w c], or its shape.
    text: its text.
  """
  x = jnp.zeros(x.shape)
  t = jnp.zeros((x.shape[0], x.shape[1] // cfg.chunk_frames))
  text = jnp.zeros(text.shape, text.dtype)
  return CausalDiT(cfg).init(key, x, t, text)["params"]


def abstract_params(cfg: DiTConfig, x, text) -> Params:
  """Shapes and types of the parameters, on one device, nothing allocated."""
  boxed = jax.eval_shape(lambda key: init(cfg, key, x, text), jax.random.key(0))
  return nn.meta.unbox(boxed)


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
  mask = masks.history_mask(streams, cfg.window, cfg.sink)
  pairs = int(masks.chunk_table(mask, chunks, streams).sum()) * tokens**2
  linear = 4 * cfg.dim**2 + 2 * cfg.dim * cfg.ffn_dim
  if cfg.text != "none":
    linear += 2 * cfg.dim**2
  all_tokens = streams * chunks * tokens
  return cfg.num_layers * (2 * all_tokens * linear + 4 * pairs * cfg.dim)
