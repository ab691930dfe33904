"""Wan2.1's video VAE: pixels to latents and back, whole or as a stream.

The network is Wan2.1's WanVAE to the letter: causal in time, so that encoding
a prefix of a video gives the prefix of its latents. The first frame becomes
one latent frame, every four after it another; space shrinks by eight.

Three ways to run it, one result:

- `chunk=None`: the whole video at once, the definition; memory grows with it.
- `chunk=n`: a scan over n latent frames at a time behind causal caches; memory
  beyond the video and its latents stays that of a chunk.
- `encode_step` and `decode_step`: a chunk at a time, for streams without end:

    step = jax.jit(
      vae.decode_step,
      static_argnames=("cfg", "first", "clamp"),
      donate_argnames="cache",
    )
    cache = vae.decoder_cache(cfg, batch, height, width)
    frames, cache = step(cfg, params, latents, cache, first=True)
    frames, cache = step(cfg, params, more, cache)  # and so on

Parameters are a tree {"encoder": ..., "decoder": ...} of plain arrays; a
program that only decodes needs only the decoder's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avd_jax.errors import UserError
from avd_jax.models.vae_layers import Decoder, Encoder, Layer
from avd_jax.typing import Params

Video = Float[Array, "b F H W 3"]
Latents = Float[Array, "b f h w c"]
# What layers remember of earlier chunks; opaque, updated in place if donated.
Cache = Any

# Of each latent channel over Wan's training videos.
WAN_MEAN = (
  *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
  *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN_STD = (
  *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
  *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """Everything that shapes the network. Defaults are Wan2.1's.

  Attributes:
    base_dim: channels at full resolution; even.
    z_dim: channels of a latent frame.
    dim_mult: channels at each resolution, in base_dims; one halving of height
      and width stands between two of them.
    num_res_blocks: residual blocks at each resolution of the encoder; the
      decoder has one more.
    temporal_downsample: which of those halvings halve time too.
    latents_mean: of each latent channel; what a model sees has mean 0 ...
    latents_std: ... and deviation 1.
    dtype: compute dtype; parameters, norms and results are float32.
  """

  base_dim: int = 96
  z_dim: int = 16
  dim_mult: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  temporal_downsample: tuple[bool, ...] = (False, True, True)
  latents_mean: tuple[float, ...] = WAN_MEAN
  latents_std: tuple[float, ...] = WAN_STD
  dtype: str = "float32"

  def __post_init__(self):
    for field in ("base_dim", "z_dim", "num_res_blocks"):
      if getattr(self, field) <= 0:
        raise UserError(f"vae.{field} {getattr(self, field)}: not positive")
    if self.base_dim % 2:
      raise UserError(f"vae.base_dim {self.base_dim}: give an even number")
    if not self.dim_mult or min(self.dim_mult) <= 0:
      raise UserError(
        f"vae.dim_mult {self.dim_mult}: give a positive number for each"
        " resolution"
      )
    if len(self.temporal_downsample) != len(self.dim_mult) - 1:
      raise UserError(
        f"vae.temporal_downsample has {len(self.temporal_downsample)} values;"
        f" give one less than vae.dim_mult, {len(self.dim_mult) - 1}"
      )
    for field in ("latents_mean", "latents_std"):
      if len(getattr(self, field)) != self.z_dim:
        raise UserError(
          f"vae.{field} has {len(getattr(self, field))} values; give one for"
          f" each of vae.z_dim {self.z_dim}"
        )
    if min(self.latents_std) <= 0:
      raise UserError(f"vae.latents_std {min(self.latents_std)}: not positive")
    if self.dtype not in ("float32", "bfloat16"):
      raise UserError(
        f"vae.dtype {self.dtype!r} is not one of float32, bfloat16"
      )

  @property
  def spatial_factor(self) -> int:
    """Pixels along height (and width) that become one latent: 8."""
    return 2 ** (len(self.dim_mult) - 1)

  @property
  def temporal_factor(self) -> int:
    """Frames that become one latent frame, after the first: 4."""
    return 2 ** sum(self.temporal_downsample)

  def latent_frames(self, frames: int) -> int:
    """Latent frames of a video.

    Raises:
      UserError: a length that is not 1 + a multiple of the temporal factor.
    """
    factor = self.temporal_factor
    if frames < 1 or (frames - 1) % factor:
      below = max(1, frames - (frames - 1) % factor)
      raise UserError(
        f"a video of {frames} frames: the VAE takes 1 + a multiple of {factor},"
        f" such as {below} or {below + factor}"
      )
    return 1 + (frames - 1) // factor

  def frames(self, latent_frames: int) -> int:
    """Frames of a video of so many latent frames.

    Raises:
      UserError: fewer than one.
    """
    if latent_frames < 1:
      raise UserError(f"{latent_frames} latent frames: give at least 1")
    return 1 + (latent_frames - 1) * self.temporal_factor

  def grid(self, height: int, width: int) -> tuple[int, int]:
    """Latents along height and width.

    Raises:
      UserError: a size that the spatial factor does not divide.
    """
    factor = self.spatial_factor
    if height < 1 or width < 1 or height % factor or width % factor:
      raise UserError(
        f"frames of {height}x{width}: the VAE takes multiples of {factor}"
      )
    return height // factor, width // factor


def down_layers(cfg: VAEConfig) -> tuple[Layer, ...]:
  """The encoder's layers between its first convolution and its middle."""
  layers, width = [], cfg.base_dim
  for i, mult in enumerate(cfg.dim_mult):
    for _ in range(cfg.num_res_blocks):
      layers.append(Layer(False, width, cfg.base_dim * mult))
      width = cfg.base_dim * mult
    if i < len(cfg.temporal_downsample):
      layers.append(Layer(True, width, width, cfg.temporal_downsample[i]))
  return tuple(layers)


def up_layers(cfg: VAEConfig) -> tuple[Layer, ...]:
  """The decoder's layers between its middle and its head."""
  layers, width = [], cfg.base_dim * cfg.dim_mult[-1]
  times = cfg.temporal_downsample[::-1]
  for i, mult in enumerate(reversed(cfg.dim_mult)):
    for _ in range(cfg.num_res_blocks + 1):
      layers.append(Layer(False, width, cfg.base_dim * mult))
      width = cfg.base_dim * mult
    if i < len(times):
      layers.append(Layer(True, width, width // 2, times[i]))
      width //= 2
  return tuple(layers)


def encoder(cfg: VAEConfig) -> Encoder:
  """The network from pixels to moments."""
  return Encoder(down_layers(cfg), cfg.z_dim, cfg.dtype)


def decoder(cfg: VAEConfig) -> Decoder:
  """The network from latents, in their own units, to pixels."""
  return Decoder(up_layers(cfg), cfg.z_dim, cfg.dtype)


def init(cfg: VAEConfig, key: jax.Array) -> Params:
  """Random parameters."""
  down, up = jax.random.split(key)
  side = cfg.spatial_factor
  pixels = jnp.zeros((1, 1, side, side, 3))
  latents = jnp.zeros((1, 1, 1, 1, cfg.z_dim))
  return {
    "encoder": encoder(cfg).init(down, pixels, True)["params"],
    "decoder": decoder(cfg).init(up, latents, True)["params"],
  }


def normalize(cfg: VAEConfig, mu: Latents) -> Latents:
  """Latents in their own units to what a model sees: (mu - mean) / std."""
  mean, std = jnp.array(cfg.latents_mean), jnp.array(cfg.latents_std)
  return (mu - mean) / std


def denormalize(cfg: VAEConfig, latents: Latents) -> Latents:
  """The way back from `normalize`."""
  mean, std = jnp.array(cfg.latents_mean), jnp.array(cfg.latents_std)
  return latents * std + mean


def moments(
  cfg: VAEConfig, params: Params, video: Video, chunk: int | None = None
) -> tuple[Latents, Latents]:
  """Mean and log variance of a video's latents, in their own units.

  What training a VAE needs. Wan clips the log variance to [-30, 20] before it
  samples; here it is as the network has it.

  Args:
    cfg: the network.
    params: its parameters.
    video: pixels in [-1, 1].
    chunk: latent frames a step; None takes all at once.

  Raises:
    UserError: a size or length that the network cannot take.
  """
  _check_video(cfg, video, first=True)
  run = _runner(encoder(cfg), params["encoder"])
  if chunk is None:
    both, _ = run(video, None, True)
  else:
    cache = encoder_cache(cfg, video.shape[0], *video.shape[2:4])
    both = _in_chunks(run, video, cache, _frames_of(chunk, cfg))
  mu, logvar = jnp.split(both, 2, -1)
  return mu, logvar


def encode(
  cfg: VAEConfig, params: Params, video: Video, chunk: int | None = 1
) -> Latents:
  """A video to its latents: the mean, as a model sees it.

  Arguments and errors are those of `moments`; 1 + 4n frames of HxW become
  1 + n of H/8 x W/8.
  """
  return normalize(cfg, moments(cfg, params, video, chunk)[0])


def decode(
  cfg: VAEConfig,
  params: Params,
  latents: Latents,
  chunk: int | None = 1,
  clamp: bool = True,
) -> Video:
  """Latents to their video; 1 + n frames become 1 + 4n.

  Args:
    cfg: the network.
    params: its parameters; only the decoder's are used.
    latents: as a model sees them.
    chunk: latent frames a step; None takes all at once.
    clamp: cut pixels to [-1, 1], as Wan does at inference. Training a VAE
      wants them, and their gradient, uncut.

  Raises:
    UserError: latents of other channels than the network's.
  """
  _check_latents(cfg, latents)
  run = _runner(decoder(cfg), params["decoder"])
  z = denormalize(cfg, latents)
  if chunk is None:
    video, _ = run(z, None, True)
  else:
    height, width = (n * cfg.spatial_factor for n in z.shape[2:4])
    cache = decoder_cache(cfg, z.shape[0], height, width)
    _frames_of(chunk, cfg)
    video = _in_chunks(run, z, cache, chunk)
  return _clamp(video) if clamp else video


def encoder_cache(cfg: VAEConfig, batch: int, height: int, width: int) -> Cache:
  """The memory of an encoder before the first frame, for HxW pixels.

  Raises:
    UserError: a size that the network cannot take.
  """
  cfg.grid(height, width)
  shape = jax.ShapeDtypeStruct((batch, 1, height, width, 3), jnp.float32)
  return _fresh(encoder(cfg), shape)


def decoder_cache(cfg: VAEConfig, batch: int, height: int, width: int) -> Cache:
  """The memory of a decoder before the first frame, for HxW pixels.

  Raises:
    UserError: a size that the network cannot take.
  """
  grid = cfg.grid(height, width)
  shape = jax.ShapeDtypeStruct((batch, 1, *grid, cfg.z_dim), jnp.float32)
  return _fresh(decoder(cfg), shape)


def encode_step(
  cfg: VAEConfig,
  params: Params,
  video: Video,
  cache: Cache,
  first: bool = False,
) -> tuple[Latents, Cache]:
  """The next frames of a stream to latents, as a model sees them.

  Args:
    cfg: the network.
    params: its parameters.
    video: the stream's first 1 + 4n frames, or 4n more.
    cache: of `encoder_cache`, or of the step before.
    first: whether the stream starts here; static under jit.

  Returns:
    (1 + n latent frames, or n more; the cache for the next step).

  Raises:
    UserError: a size or length that the network cannot take.
  """
  _check_video(cfg, video, first)
  both, cache = _runner(encoder(cfg), params["encoder"])(video, cache, first)
  return normalize(cfg, jnp.split(both, 2, -1)[0]), cache


def decode_step(
  cfg: VAEConfig,
  params: Params,
  latents: Latents,
  cache: Cache,
  first: bool = False,
  clamp: bool = True,
) -> tuple[Video, Cache]:
  """The next latents of a stream to frames.

  Args:
    cfg: the network.
    params: its parameters; only the decoder's are used.
    latents: n latent frames, as a model sees them.
    cache: of `decoder_cache`, or of the step before.
    first: whether the stream starts here; static under jit.
    clamp: cut pixels to [-1, 1].

  Returns:
    (4n frames, 1 + 4 (n - 1) where `first`; the cache for the next step).

  Raises:
    UserError: latents of other channels than the network's.
  """
  _check_latents(cfg, latents)
  run = _runner(decoder(cfg), params["decoder"])
  video, cache = run(denormalize(cfg, latents), cache, first)
  return (_clamp(video) if clamp else video), cache


def _runner(module: nn.Module, params: Params) -> Callable[..., Any]:
  """`(x, cache, first) -> (y, cache)`; without a cache, x is all there is."""

  def run(x, cache, first):
    if cache is None:
      return module.apply({"params": params}, x, first), None
    y, kept = module.apply(
      {"params": params, "cache": cache}, x, first, mutable=["cache"]
    )
    return y, kept["cache"]

  return run


def _fresh(module: nn.Module, x: jax.ShapeDtypeStruct) -> Cache:
  key = jax.random.key(0)
  shapes = jax.eval_shape(lambda x: module.init(key, x, True)["cache"], x)
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _in_chunks(run, x, cache, size):
  """The first frame by itself, then `size` frames a step under a scan."""
  start, cache = run(x[:, :1], cache, True)
  batch, frames = x.shape[0], x.shape[1] - 1
  if not frames:
    return start
  steps = -(-frames // size)
  # Frames that fill up the last step change none before them: all is causal.
  room = ((0, 0), (0, steps * size - frames), (0, 0), (0, 0), (0, 0))
  rest = jnp.pad(x[:, 1:], room).reshape(batch, steps, size, *x.shape[2:])

  def body(cache, x):
    y, cache = run(x, cache, False)
    return cache, y

  _, rest = jax.lax.scan(body, cache, rest.swapaxes(0, 1))
  rest = rest.swapaxes(0, 1).reshape(batch, -1, *rest.shape[3:])
  kept = frames * rest.shape[1] // (steps * size)
  return jnp.concatenate([start, rest[:, :kept]], 1)


def _frames_of(chunk: int, cfg: VAEConfig) -> int:
  if chunk < 1:
    raise UserError(f"chunks of {chunk} latent frames: give at least 1")
  return chunk * cfg.temporal_factor


def _check_video(cfg: VAEConfig, video: jax.Array, first: bool) -> None:
  _, frames, height, width, _ = video.shape
  cfg.grid(height, width)
  if first:
    cfg.latent_frames(frames)
  elif frames < 1 or frames % cfg.temporal_factor:
    raise UserError(
      f"a later chunk of {frames} frames: the VAE takes a multiple of"
      f" {cfg.temporal_factor}"
    )


def _check_latents(cfg: VAEConfig, latents: jax.Array) -> None:
  if latents.shape[-1] != cfg.z_dim or not latents.shape[1]:
    raise UserError(
      f"latents of {latents.shape[1]} frames of {latents.shape[-1]} channels:"
      f" the VAE takes 1 or more frames of vae.z_dim {cfg.z_dim} channels"
    )


def _clamp(video: Video) -> Video:
  return jnp.clip(video, -1, 1)
