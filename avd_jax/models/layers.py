"""The layers a DiT is made of, with logical axes on every parameter.

Logical axes: "embed" (the model's width), "heads" (width seen as heads),
"mlp" (the feed-forward's width), "layers" (stacked by nn.scan); an axis
without a name is never sharded. `parallel.RULES` maps them to a mesh.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Init = Callable[..., jax.Array]


def dense(
  features: int,
  axes: tuple[str | None, str | None],
  dtype: str,
  kernel_init: Init = nn.initializers.xavier_uniform(),
  name: str | None = None,
) -> nn.Dense:
  """A linear layer whose kernel carries logical axes (in, out)."""
  return nn.Dense(
    features,
    dtype=dtype,
    kernel_init=nn.with_logical_partitioning(kernel_init, axes),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
    name=name,
  )


def layer_norm(x: Float[Array, "... e"], eps: float) -> Float[Array, "... e"]:
  """LayerNorm without parameters, float32 in and out."""
  x = x.astype(jnp.float32)
  x = x - jnp.mean(x, -1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)


class RMSNorm(nn.Module):
  """RMSNorm over the full width, before heads are split: Wan's qk norm.

  Computed in float32, cast back, then scaled.
  """

  eps: float
  dtype: str

  @nn.compact
  def __call__(self, x: Float[Array, "... e"]) -> Float[Array, "... e"]:
    scale = self.param(
      "scale",
      nn.with_logical_partitioning(nn.initializers.ones, ("heads",)),
      (x.shape[-1],),
    )
    x32 = x.astype(jnp.float32)
    rms = jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
    return (x32 * rms).astype(self.dtype) * scale.astype(self.dtype)


def sinusoid(t: Float[Array, "*n"], dim: int) -> Float[Array, "*n {dim}"]:
  """[cos | sin] of 1000 t at dim / 2 frequencies, in float32.

  Never through bfloat16: there 999 rounds to 1000.
  """
  half = dim // 2
  freqs = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = 1000.0 * t.astype(jnp.float32)[..., None] * freqs
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class MLP(nn.Module):
  """Two linear layers around an activation."""

  hidden: int
  features: int
  activation: Callable[[jax.Array], jax.Array]
  axes: tuple[str | None, str | None, str | None]
  dtype: str
  kernel_init: Init = nn.initializers.xavier_uniform()

  @nn.compact
  def __call__(self, x: Float[Array, "... e"]) -> Float[Array, "... o"]:
    wide = dense(
      self.hidden, self.axes[:2], self.dtype, self.kernel_init, name="up"
    )
    narrow = dense(
      self.features, self.axes[1:], self.dtype, self.kernel_init, name="down"
    )
    return narrow(self.activation(wide(x)))


def gelu_tanh(x: jax.Array) -> jax.Array:
  """GELU in the tanh form that Wan's weights were trained with."""
  return nn.gelu(x, approximate=True)
