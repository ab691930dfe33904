"""umT5's encoder: what Wan reads a prompt with.

A T5 encoder whose every layer has a relative position bias of its own. As in
any T5, attention logits are not scaled (the queries' initialization holds the
factor), norms have no mean and linear layers no bias.

The residual stream is float32 whatever the compute dtype: bfloat16 has
float32's range, so nothing overflows there, but the stream grows with depth and
would round small contributions away. Norms, logits and softmax are float32 too.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from avd_jax.errors import UserError
from avd_jax.models.layers import gelu_tanh
from avd_jax.typing import Params

# The logit of a key behind the prompt: finite, so that a prompt of no tokens
# gives numbers (which are then zeroed), not NaN.
UNSEEN = -1e30


@dataclasses.dataclass(frozen=True)
class UMT5Config:
  """Shape of the encoder; the defaults are umt5-xxl as Wan uses it.

  Attributes:
    vocab_size: rows of the embedding; a tokenizer may use fewer.
    dim: width.
    attention_dim: width of all heads together.
    ffn_dim: width inside the feed-forward.
    num_heads: attention heads.
    num_layers: blocks.
    num_buckets: of relative positions, half of them for keys to the right.
    max_distance: from here on all distances share the last bucket.
    eps: of every norm.
    dtype: of parameters and computation. The encoder is not trained, and Wan's
      file is bfloat16, so that holding more would gain nothing.
  """

  vocab_size: int = 256_384
  dim: int = 4096
  attention_dim: int = 4096
  ffn_dim: int = 10_240
  num_heads: int = 64
  num_layers: int = 24
  num_buckets: int = 32
  max_distance: int = 128
  eps: float = 1e-6
  dtype: str = "bfloat16"

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.name != "dtype" and value <= 0:
        raise UserError(f"text_encoder.{field.name} {value}: not positive")
    if self.attention_dim % self.num_heads:
      raise UserError(
        f"text_encoder.attention_dim {self.attention_dim} is not divisible by"
        f" text_encoder.num_heads {self.num_heads}"
      )
    if self.num_buckets % 4:
      raise UserError(
        f"text_encoder.num_buckets {self.num_buckets}: not divisible by 4"
      )
    if self.max_distance <= self.num_buckets // 4:
      raise UserError(
        f"text_encoder.max_distance {self.max_distance}: give more than a"
        f" quarter of text_encoder.num_buckets {self.num_buckets}"
      )
    if self.dtype not in ("float32", "bfloat16"):
      raise UserError(
        f"text_encoder.dtype {self.dtype!r} is not one of float32, bfloat16"
      )


def _bucket_starts(cfg: UMT5Config) -> list[int]:
  """First distance of each of one side's buckets.

  The first half of them hold one distance each; bucket j of the other half
  starts where exact * (max_distance / exact)^(j / exact) does. Decided in whole
  numbers: 16, 32 and 64 start a bucket exactly, where a rounded logarithm may
  fall to either side.
  """
  exact = cfg.num_buckets // 4
  starts = list(range(exact))
  for j in range(exact):
    bound = exact ** (exact - j) * cfg.max_distance**j
    starts.append(next(n for n in range(exact, bound) if n**exact >= bound))
  return starts


def buckets(cfg: UMT5Config, tokens: int) -> np.ndarray:
  """Bucket of (query, key), int32 [tokens, tokens].

  Keys to the right of a query have buckets from num_buckets / 2 on.
  """
  place = np.arange(tokens)
  offset = place[None, :] - place[:, None]
  side = cfg.num_buckets // 2
  near = np.searchsorted(_bucket_starts(cfg), np.abs(offset), "right") - 1
  return (near + side * (offset > 0)).astype(np.int32)


def _normal(std: float, axes: tuple[str | None, ...]):
  return nn.with_logical_partitioning(nn.initializers.normal(std), axes)


def _norm(cfg: UMT5Config, name: str) -> nn.RMSNorm:
  return nn.RMSNorm(
    cfg.eps,
    dtype=jnp.float32,
    param_dtype=cfg.dtype,
    scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
    name=name,
  )


class Block(nn.Module):
  """Self-attention with its own position bias, then a gated feed-forward."""

  cfg: UMT5Config

  def _linear(self, name, features, std, axes):
    return nn.Dense(
      features,
      use_bias=False,
      dtype=self.cfg.dtype,
      param_dtype=self.cfg.dtype,
      kernel_init=_normal(std, axes),
      name=name,
    )

  def _attention(self, y, seen, bucket):
    c = self.cfg
    head_dim = c.attention_dim // c.num_heads
    into, out_of = ("embed", "heads"), ("heads", "embed")

    def heads(name, std):
      z = self._linear(name, c.attention_dim, std, into)(y)
      return z.reshape(*z.shape[:-1], c.num_heads, head_dim)

    q = heads("q", (c.dim * head_dim) ** -0.5)
    k, v = heads("k", c.dim**-0.5), heads("v", c.dim**-0.5)
    table = self.param(
      "position_bias",
      _normal(c.dim**-0.5, (None, "heads")),
      (c.num_buckets, c.num_heads),
      c.dtype,
    )
    bias = jnp.moveaxis(table.astype(jnp.float32)[bucket], -1, 0)
    logits = jnp.einsum(
      "bqad,bkad->baqk", q, k, preferred_element_type=jnp.float32
    )
    logits = jnp.where(seen[:, None, None], logits + bias, UNSEEN)
    weight = jax.nn.softmax(logits, -1).astype(c.dtype)
    out = jnp.einsum("baqk,bkad->bqad", weight, v)
    out = out.reshape(*y.shape[:-1], c.attention_dim)
    return self._linear("o", c.dim, c.attention_dim**-0.5, out_of)(out)

  def _ffn(self, y):
    c = self.cfg
    into, out_of = ("embed", "mlp"), ("mlp", "embed")
    gate = self._linear("gate", c.ffn_dim, c.dim**-0.5, into)(y)
    up = self._linear("up", c.ffn_dim, c.dim**-0.5, into)(y)
    down = self._linear("down", c.dim, c.ffn_dim**-0.5, out_of)
    return down(gelu_tanh(gate) * up)

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b m e"],
    seen: Bool[Array, "b m"],
    bucket: Int[Array, "m m"],
  ) -> tuple[Float[Array, "b m e"], None]:
    """A nn.scan body."""
    y = _norm(self.cfg, "norm_attention")(x).astype(self.cfg.dtype)
    x = x + self._attention(y, seen, bucket).astype(jnp.float32)
    y = _norm(self.cfg, "norm_ffn")(x).astype(self.cfg.dtype)
    return x + self._ffn(y).astype(jnp.float32), None


class UMT5Encoder(nn.Module):
  """The encoder; see the module docstring."""

  cfg: UMT5Config

  @nn.compact
  def __call__(
    self, tokens: Int[Array, "b m"], seen: Bool[Array, "b m"]
  ) -> Float[Array, "b m e"]:
    """Vectors of every token, padding included, in the compute dtype.

    Args:
      tokens: ids.
      seen: which of them are the prompt's; queries see no others.
    """
    c = self.cfg
    embedding = self.param(
      "token_embedding",
      _normal(1.0, ("vocab", "embed")),
      (c.vocab_size, c.dim),
      c.dtype,
    )
    blocks = nn.scan(
      Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=c.num_layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(c, name="blocks")
    x = embedding[tokens].astype(jnp.float32)
    x, _ = blocks(x, seen, jnp.asarray(buckets(c, tokens.shape[1])))
    return _norm(c, "norm")(x).astype(c.dtype)


def init(cfg: UMT5Config, key: Array) -> Params:
  """Random parameters, boxed with their logical axes (`flax.linen.meta`)."""
  tokens = jnp.zeros((1, 1), jnp.int32)
  seen = jnp.ones((1, 1), bool)
  return UMT5Encoder(cfg).init(key, tokens, seen)["params"]


def abstract_params(cfg: UMT5Config) -> Params:
  """Shapes and types of the parameters, nothing allocated."""
  boxed = jax.eval_shape(functools.partial(init, cfg), jax.random.key(0))
  return nn.meta.unbox(boxed)


def encode(
  params: Params,
  cfg: UMT5Config,
  tokens: Int[Array | np.ndarray, "b m"],
  lengths: Int[Array | np.ndarray, "b"],
) -> Float[Array, "b m e"]:
  """Prompts as Wan's DiT reads them: zeros past each prompt's end.

  Args:
    params: as `init` makes them, unboxed.
    cfg: the encoder.
    tokens: ids, padded; Wan pads to 512. Ids must lie below vocab_size.
    lengths: tokens of each prompt, its end-of-sentence token included.
  """
  seen = jnp.arange(tokens.shape[1]) < jnp.asarray(lengths)[:, None]
  tokens = jnp.asarray(tokens)
  out = UMT5Encoder(cfg).apply({"params": params}, tokens, seen)
  return jnp.where(seen[..., None], out, 0)
