"""The layers of Wan2.1's video VAE, causal in time, with what they remember.

A layer that looks back keeps the last frames it saw in the collection "cache":
applied with that collection mutable, it goes on where the chunk before it
ended; without, what it is given is a whole video. Both are one computation,
since a video starts behind frames of zeros and so does a fresh cache.

Videos are [b f h w c]; kernels [(time) height width in out].
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avd_jax.ops.attention import attend_all

Video = Float[Array, "b f h w c"]

_INIT = nn.initializers.lecun_normal()


class Layer(NamedTuple):
  """A layer on the way down or up.

  Attributes:
    resample: whether it changes the resolution; else a residual block.
    inputs: channels in.
    outputs: channels out.
    time: whether frames are resampled too.
  """

  resample: bool
  inputs: int
  outputs: int
  time: bool = False


class Norm(nn.Module):
  """x / |x| sqrt(c) times a learned scale, over channels, in float32."""

  @nn.compact
  def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
    channels = x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (channels,))
    x32 = x.astype(jnp.float32)
    # The square of Wan's bound of 1e-12 on the norm, and taken before the
    # root, whose gradient at zero would be NaN.
    square = jnp.maximum(jnp.sum(x32 * x32, -1, keepdims=True), 1e-24)
    return (x32 * jax.lax.rsqrt(square) * channels**0.5 * scale).astype(x.dtype)


def _convolve(x, kernel, stride, pad):
  """[b f h w c] by [t h w c o]: space keeps its size, time has no padding.

  On a CPU XLA runs three dimensions five times slower than as many steps of
  two: there, a kernel's places in time are taken one by one.
  """
  around = tuple((n, n) for n in pad)

  def at_once(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (stride, 1, 1),
      ((0, 0), *around),
      dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )

  def one_by_one(x, kernel):
    b, f = x.shape[:2]
    g = (f - len(kernel)) // stride + 1
    total = 0.0
    for i, flat in enumerate(kernel):
      seen = x[:, i : i + stride * (g - 1) + 1 : stride]
      total = total + jax.lax.conv_general_dilated(
        seen.reshape(b * g, *x.shape[2:]),
        flat,
        (1, 1),
        around,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
      )
    return total.reshape(b, g, *total.shape[1:])

  return jax.lax.platform_dependent(x, kernel, cpu=one_by_one, default=at_once)


class CausalConv(nn.Module):
  """A convolution over time and space that sees no later frame.

  Attributes:
    features: channels out.
    dtype: of the computation.
    kernel: its extent in time, height and width; space keeps its size.
    stride: in time. Chunks come in multiples of it.
  """

  features: int
  dtype: str
  kernel: tuple[int, int, int] = (3, 3, 3)
  stride: int = 1

  @nn.compact
  def __call__(
    self, x: Video, alone: bool = False
  ) -> Float[Array, "b g h w o"]:
    """Frames out: g = f / stride.

    Args:
      x: the frames.
      alone: nothing stands before the first of them, not even zeros: results
        begin where the kernel has frames for all of its extent.
    """
    time, height, width = self.kernel
    kernel = self.param(
      "kernel", _INIT, (*self.kernel, x.shape[-1], self.features)
    )
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    y = _convolve(
      self._behind_past(x, time - self.stride, alone).astype(self.dtype),
      kernel.astype(self.dtype),
      self.stride,
      (height // 2, width // 2),
    )
    return y + bias.astype(self.dtype)

  def _behind_past(self, x, frames, alone):
    """`x` behind the `frames` frames that came before, or zeros."""
    if not self.is_mutable_collection("cache"):
      start = 0 if alone else frames
      return jnp.pad(x, ((0, 0), (start, 0), (0, 0), (0, 0), (0, 0)))
    shape = (x.shape[0], frames, *x.shape[2:])
    past = self.variable("cache", "past", jnp.zeros, shape, x.dtype)
    if not alone:
      x = jnp.concatenate([past.value, x], 1)
    past.value = x[:, x.shape[1] - frames :]
    return x


class Residual(nn.Module):
  """Two normed, causal convolutions around a shortcut."""

  features: int
  dtype: str

  @nn.compact
  def __call__(self, x: Video) -> Float[Array, "b f h w o"]:
    y = nn.silu(Norm(name="norm1")(x))
    y = CausalConv(self.features, self.dtype, name="conv1")(y)
    y = nn.silu(Norm(name="norm2")(y))
    y = CausalConv(self.features, self.dtype, name="conv2")(y)
    if x.shape[-1] != self.features:
      x = nn.Dense(self.features, dtype=self.dtype, name="shortcut")(x)
    return x + y


class FrameAttention(nn.Module):
  """Every place of a frame attends to that frame, with a single head."""

  dtype: str

  @nn.compact
  def __call__(self, x: Video) -> Video:
    b, f, h, w, c = x.shape
    y = Norm(name="norm")(x).reshape(b * f, h * w, 1, c)
    y = nn.Dense(3 * c, dtype=self.dtype, name="qkv")(y)
    y = attend_all(*jnp.split(y, 3, -1)).reshape(x.shape)
    # Zeros at first, as in Wan: the block starts as the identity.
    out = nn.Dense(
      c, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="proj"
    )
    return x + out(y)


class Middle(nn.Module):
  """What stands at the lowest resolution of encoder and decoder."""

  dtype: str

  @nn.compact
  def __call__(self, x: Video) -> Video:
    width = x.shape[-1]
    x = Residual(width, self.dtype, name="residual_0")(x)
    x = FrameAttention(self.dtype, name="attention")(x)
    return Residual(width, self.dtype, name="residual_1")(x)


class Head(nn.Module):
  """The last norm and convolution of encoder and decoder."""

  features: int
  dtype: str

  @nn.compact
  def __call__(self, x: Video) -> Float[Array, "b f h w o"]:
    x = nn.silu(Norm(name="norm")(x))
    return CausalConv(self.features, self.dtype, name="conv")(x)


class Down(nn.Module):
  """Halves height and width and, with `time`, the frames after the first."""

  time: bool
  dtype: str

  @nn.compact
  def __call__(self, x: Video, first: bool) -> Float[Array, "b g i j c"]:
    """1 + 2n frames become 1 + n where `first`, else 2n become n."""
    width = x.shape[-1]
    # Padded at the end only: Wan's, and not what "SAME" would do.
    x = nn.Conv(
      width,
      (3, 3),
      strides=2,
      padding=((0, 1), (0, 1)),
      dtype=self.dtype,
      name="space",
    )(x)
    if not self.time:
      return x
    conv = CausalConv(width, self.dtype, (3, 1, 1), stride=2, name="time")
    if not first:
      return conv(x)
    # The first frame stays itself; the next result takes it, and two more.
    return jnp.concatenate([x[:, :1], conv(x, alone=True)], 1)


class Up(nn.Module):
  """Doubles height and width, halves the channels and, with `time`, doubles
  the frames after the first."""

  time: bool
  dtype: str

  @nn.compact
  def __call__(self, x: Video, first: bool) -> Float[Array, "b g i j o"]:
    """1 + n frames become 1 + 2n where `first`, else n become 2n."""
    if self.time:
      # Wan's first frame goes around this convolution and is no context to
      # the frames after it either: they start behind two frames of zeros.
      around, x = (x[:, :1], x[:, 1:]) if first else (x[:, :0], x)
      x = jnp.concatenate([around, self._twice(x)], 1)
    x = jnp.repeat(jnp.repeat(x, 2, 2), 2, 3)
    return nn.Conv(
      x.shape[-1] // 2, (3, 3), padding=1, dtype=self.dtype, name="space"
    )(x)

  def _twice(self, x):
    """Two frames of each, made as twice the channels."""
    b, f, h, w, c = x.shape
    x = CausalConv(2 * c, self.dtype, (3, 1, 1), name="time")(x)
    x = x.reshape(b, f, h, w, 2, c).transpose(0, 1, 4, 2, 3, 5)
    return x.reshape(b, 2 * f, h, w, c)


class Encoder(nn.Module):
  """Pixels to the mean and the log variance of their latents.

  Attributes:
    layers: on the way down.
    z_dim: channels of a latent frame.
    dtype: of the computation.
  """

  layers: tuple[Layer, ...]
  z_dim: int
  dtype: str

  @nn.compact
  def __call__(
    self, x: Float[Array, "b F H W 3"], first: bool
  ) -> Float[Array, "b f h w {2*self.z_dim}"]:
    """`first`: whether these frames begin a video."""
    x = x.astype(self.dtype)
    x = CausalConv(self.layers[0].inputs, self.dtype, name="conv_in")(x)
    for i, layer in enumerate(self.layers):
      if layer.resample:
        x = Down(layer.time, self.dtype, name=f"down_{i}")(x, first)
      else:
        x = Residual(layer.outputs, self.dtype, name=f"down_{i}")(x)
    x = Middle(self.dtype, name="middle")(x)
    x = Head(2 * self.z_dim, self.dtype, name="head")(x)
    x = nn.Dense(2 * self.z_dim, dtype=self.dtype, name="moments")(x)
    return x.astype(jnp.float32)


class Decoder(nn.Module):
  """Latents, in their own units, to pixels.

  Attributes:
    layers: on the way up.
    z_dim: channels of a latent frame.
    dtype: of the computation.
  """

  layers: tuple[Layer, ...]
  z_dim: int
  dtype: str

  @nn.compact
  def __call__(
    self, x: Float[Array, "b f h w {self.z_dim}"], first: bool
  ) -> Float[Array, "b F H W 3"]:
    """`first`: whether these frames begin a video."""
    x = nn.Dense(self.z_dim, dtype=self.dtype, name="latents")(
      x.astype(self.dtype)
    )
    x = CausalConv(self.layers[0].inputs, self.dtype, name="conv_in")(x)
    x = Middle(self.dtype, name="middle")(x)
    for i, layer in enumerate(self.layers):
      if layer.resample:
        x = Up(layer.time, self.dtype, name=f"up_{i}")(x, first)
      else:
        x = Residual(layer.outputs, self.dtype, name=f"up_{i}")(x)
    return Head(3, self.dtype, name="head")(x).astype(jnp.float32)
