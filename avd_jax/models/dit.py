"""CausalDiT: Wan2.1's diffusion transformer, made causal over chunks.

Here is the network and its parallel pass, all chunks at once under a mask;
`denoiser.py` has its other face, a chunk against a KV cache.

The architecture is Wan's to the letter (per-chunk timestep modulation, qk
RMSNorm over the full width, 3D rotary positions, cross-attention to text,
patches (1, p, p)), from one config, tiny to 14B. What a tiny model needs
besides is off by default: the x0 output and the learned spatial embedding.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from avd_jax import parallel
from avd_jax.errors import UserError
from avd_jax.models import attention, layers
from avd_jax.models import text as text_lib
from avd_jax.models.dit_config import REMAT, DiTConfig
from avd_jax.ops import attention as attention_lib
from avd_jax.ops import masks
from avd_jax.ops.attention import Place
from avd_jax.typing import History, Text


def _gate_noise(gate: float, rows: tuple[int, ...]):
  """Wan's modulation init, with `gate` added to the rows that are gates."""

  def init(key, shape, dtype=jnp.float32):
    table = jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5
    return table.at[..., list(rows), :].add(gate) if rows else table

  return init


def _heads(x: Float[Array, "*s e"], heads: int) -> Float[Array, "*s a d"]:
  return x.reshape(*x.shape[:-1], heads, -1)


def _modulate(x, shift, scale, cfg):
  y = layers.layer_norm(x, cfg.eps) * (1 + scale) + shift
  return y.astype(cfg.dtype)


class Block(nn.Module):
  """One transformer block, cut where attention happens.

  `qkv` and `finish` are what stands before and after self-attention, so that
  both faces share them; `__call__` joins them under the parallel mask.

  Attributes:
    cfg: the network's config.
    mask: the pass's mask; None where only `qkv` and `finish` are used.
    streams: streams along the tokens, 1 or 2.
    place: what the program will run on; see `ops.attention`.
  """

  cfg: DiTConfig
  mask: Any = None
  streams: int = 1
  place: Place = None

  def setup(self):
    c = self.cfg
    square = functools.partial(layers.dense, c.dim, dtype=c.dtype)
    norm = functools.partial(layers.RMSNorm, c.eps, c.dtype)
    into, out_of = ("embed", "heads"), ("heads", "embed")
    self.q, self.k, self.v = (square(axes=into) for _ in range(3))
    self.o = square(axes=out_of)
    self.norm_q, self.norm_k = norm(), norm()
    if c.text != "none":
      self.cross_norm = nn.LayerNorm(
        epsilon=c.eps,
        dtype=jnp.float32,
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses what large means hide
        scale_init=nn.with_logical_partitioning(
          nn.initializers.ones, ("embed",)
        ),
        bias_init=nn.with_logical_partitioning(
          nn.initializers.zeros, ("embed",)
        ),
      )
      self.cross_q, self.cross_k, self.cross_v = (
        square(axes=into) for _ in range(3)
      )
      self.cross_o = square(axes=out_of)
      self.cross_norm_q, self.cross_norm_k = norm(), norm()
    self.ffn = layers.MLP(
      c.ffn_dim, c.dim, layers.gelu_tanh, ("embed", "mlp", "embed"), c.dtype
    )
    self.modulation = self.param(
      "modulation",
      nn.with_logical_partitioning(
        _gate_noise(c.gate_init, (2, 5)), (None, "embed")
      ),
      (6, c.dim),
    )

  def _parts(self, e: Float[Array, "b n 6 e"]):
    """Shift, scale, gate (attention), shift, scale, gate (ffn), float32."""
    table = e.astype(jnp.float32) + self.modulation
    return [table[:, :, None, i] for i in range(6)]

  def qkv(self, x: Float[Array, "b n s e"], e: Float[Array, "b n 6 e"]):
    """Queries, keys and values [b n s a d], before rotation."""
    shift, scale, *_ = self._parts(e)
    y = _modulate(x, shift, scale, self.cfg)
    split = lambda z: parallel.constrain(
      _heads(z, self.cfg.num_heads), self.place, parallel.HEADS
    )
    q, k = self.norm_q(self.q(y)), self.norm_k(self.k(y))
    return split(q), split(k), split(self.v(y))

  def finish(
    self,
    x: Float[Array, "b n s e"],
    e: Float[Array, "b n 6 e"],
    attended: Float[Array, "b n s a d"],
    text: Float[Array, "b m e"] | None,
  ) -> Float[Array, "b n s e"]:
    """Everything after self-attention; the residual stream stays float32."""
    _, _, gate, shift, scale, gate_ffn = self._parts(e)
    y = self.o(attended.reshape(x.shape))
    x = x + y.astype(jnp.float32) * gate
    if text is not None:
      x = x + self._cross(x, text).astype(jnp.float32)
    y = self.ffn(_modulate(x, shift, scale, self.cfg))
    x = x + y.astype(jnp.float32) * gate_ffn
    return parallel.constrain(x, self.place, parallel.TOKENS)

  def _cross(self, x, text):
    heads = self.cfg.num_heads
    y = self.cross_norm(x).astype(self.cfg.dtype)
    q = _heads(self.cross_norm_q(self.cross_q(y)), heads)
    k = _heads(self.cross_norm_k(self.cross_k(text)), heads)
    v = _heads(self.cross_v(text), heads)
    out = attention_lib.attend_all(q, k, v, self.place)
    return self.cross_o(out.reshape(y.shape))

  def __call__(self, x, past, e, text, turns):
    """Parallel self-attention of all streams; a nn.scan body.

    With `past`, what a rollout remembers of a history, `x` is the noisy stream
    alone.
    """
    x = checkpoint_name(x, "block")
    rows = x.shape[1]
    chunks = rows // (self.streams if past is None else self.streams - 1)
    sight = masks.sight(
      self.mask,
      chunks,
      self.streams,
      x.shape[2],
      rows,
      self.cfg.attention.sink,
    )
    out = attention.parallel(
      self.cfg.attention,
      *self.qkv(x, e),
      turns,
      sight,
      past,
      self.place,
    )
    return self.finish(x, e, out, text), None


class CausalDiT(nn.Module):
  """The network; see the module docstring.

  Attributes:
    cfg: its shape.
    history: whether a history stream stands before the noisy one. The
      parameters are the same either way.
    place: what the program will run on; see `ops.attention`.
  """

  cfg: DiTConfig
  history: bool = False
  place: Place = None

  def setup(self):
    c = self.cfg
    normal = nn.initializers.normal(0.02)
    embed = functools.partial(
      layers.MLP, c.dim, c.dim, dtype=c.dtype, kernel_init=normal
    )
    self.patch_embedding = layers.dense(c.dim, (None, "embed"), c.dtype)
    if c.text == "bytes":
      self.conditioner = text_lib.ByteConditioner(
        c.text_dim, c.text_tokens, c.dtype
      )
    if c.text != "none":
      self.text_embedding = embed(
        activation=layers.gelu_tanh, axes=(None, None, "embed")
      )
    # The timestep's path stays float32: see layers.sinusoid.
    self.time_embedding = layers.MLP(
      c.dim, c.dim, nn.silu, (None, "heads", "embed"), "float32", normal
    )
    self.time_projection = layers.dense(6 * c.dim, ("embed", None), "float32")
    self.blocks = self._stack()
    self.head = layers.dense(
      c.patch**2 * c.channels,
      ("embed", None),
      c.dtype,
      nn.initializers.zeros,
    )
    self.head_modulation = self.param(
      "head_modulation",
      nn.with_logical_partitioning(_gate_noise(0.0, ()), (None, "embed")),
      (2, c.dim),
    )
    if c.spatial_embedding:
      rows, columns = c.spatial_embedding
      self.places = self.param(
        "spatial_embedding",
        nn.with_logical_partitioning(
          nn.initializers.normal(0.5), (None, "embed")
        ),
        (rows * columns, c.dim),
      )

  def _stack(self):
    c = self.cfg
    block = Block
    if c.remat != "none":
      block = nn.remat(Block, prevent_cse=False, policy=REMAT[c.remat])
    stack = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(0,) + (nn.broadcast,) * 3,
      length=c.num_layers,
      unroll=c.scan_unroll,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    streams = 2 if self.history else 1
    see = c.attention
    mask = masks.history_mask(streams, see.window, see.sink)
    return stack(c, mask, streams, self.place)

  def embed(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b n s e"]:
    """Patches to tokens, chunk by chunk, float32."""
    b, f, h, w, ch = x.shape
    p = self.cfg.patch
    rows, columns = self.cfg.grid(h, w)
    x = x.reshape(b, f, rows, p, columns, p, ch).transpose(0, 1, 2, 4, 3, 5, 6)
    frames = self.cfg.chunk_frames
    x = x.reshape(b, f // frames, frames * rows * columns, -1)
    # Cut while it is small.
    x = parallel.constrain(x, self.place, parallel.TOKENS)
    x = self.patch_embedding(x).astype(jnp.float32)
    if self.cfg.spatial_embedding:
      if self.cfg.spatial_embedding != (rows, columns):
        raise UserError(
          f"model.spatial_embedding {self.cfg.spatial_embedding} does not fit"
          f" frames of {rows}x{columns} tokens"
        )
      x = x + jnp.tile(self.places, (frames, 1))
    return parallel.constrain(x, self.place, parallel.TOKENS)

  def condition(self, t: Float[Array, "b n"], text: Text):
    """(e, modulation e0 [b n 6 e], text context [b m e] or None)."""
    c = self.cfg
    e = self.time_embedding(layers.sinusoid(t, c.freq_dim))
    e0 = self.time_projection(nn.silu(e)).reshape(*e.shape[:-1], 6, c.dim)
    if c.text == "none":
      return e, e0, None
    if c.text == "bytes":
      text = self.conditioner(text)
    context = self.text_embedding(text.astype(c.dtype))
    return e, e0, parallel.constrain(context, self.place, parallel.TEXT)

  def predict(
    self, tokens: Float[Array, "b n s e"], e, x, t
  ) -> Float[Array, "b f h w c"]:
    """Tokens to the velocity of x_t."""
    c = self.cfg
    table = e[:, :, None].astype(jnp.float32) + self.head_modulation
    out = self.head(
      _modulate(tokens, table[:, :, :1], table[:, :, 1:], c)
    ).astype(jnp.float32)
    b, f, h, w, ch = x.shape
    rows, columns = c.grid(h, w)
    out = out.reshape(b, f, rows, columns, c.patch, c.patch, ch)
    out = out.transpose(0, 1, 2, 4, 3, 5, 6).reshape(x.shape)
    if c.prediction == "v":
      return out
    t = jnp.repeat(t, c.chunk_frames, 1)[..., None, None, None]
    return (x - out) / jnp.maximum(t, c.min_t)

  def __call__(self, x, t, text, history: History | None = None):
    """All chunks at once; velocities of the noisy stream."""
    c = self.cfg
    e, e0, context = self.condition(t, text)
    past, seen, e0_all, chunks = None, x, e0, t.shape[1]
    if history is not None and history.cache is not None:
      layers = history.cache.layers()
      past = jax.tree.map(lambda *layer: jnp.stack(layer), *layers)
    elif history is not None:
      _, e0_history, _ = self.condition(history.t, text)
      # Before the embedding: one product for both streams, and two made a TPU
      # compiler abort at Wan's size (libtpu 0.0.50).
      seen = jnp.concatenate([history.x, x], 1)
      e0_all = jnp.concatenate([e0_history, e0], 1)
    frames = jnp.arange(x.shape[1])
    turns = self.angles(x, frames // c.chunk_frames, frames)
    tokens = self.embed(seen)
    tokens, _ = self.blocks(tokens, past, e0_all, context, turns)
    return self.predict(tokens[:, -chunks:], e, x, t)

  def angles(self, x, chunk, frames) -> attention.Angles:
    """Rotary angles of the tokens of `frames` of `x`, in chunks `chunk`."""
    c = self.cfg
    return attention.angles(
      c.attention,
      chunk,
      frames,
      c.chunk_frames,
      height=x.shape[2] // c.patch,
      width=x.shape[3] // c.patch,
      head_dim=c.head_dim,
      theta=c.rope_theta,
    )
