"""The video VAE's tensors in Wan2.1_VAE.pth and in the diffusers layout."""

from typing import NamedTuple

from avd_jax.models.vae import VAEConfig, down_layers, up_layers
from avd_jax.models.vae_layers import Layer
from avd_jax.wan.names import Tensor

_CUBE = (3, 3, 3)
_POINT = (1, 1, 1)


class _Names(NamedTuple):
  """A module's names in our tree and in the two kinds of files."""

  path: str
  original: str
  diffusers: str

  def part(self, path: str, original: str, diffusers: str) -> "_Names":
    """The names of a module in this one."""
    return _Names(
      f"{self.path}/{path}",
      f"{self.original}.{original}",
      f"{self.diffusers}.{diffusers}",
    )


def tensors(cfg: VAEConfig) -> list[Tensor]:
  """Every tensor of a VAE: names, shapes and places."""
  encoder = _Names(*["encoder"] * 3)
  decoder = _Names(*["decoder"] * 3)
  z = cfg.z_dim
  top = cfg.base_dim * cfg.dim_mult[-1]
  return [
    *_conv(_into(encoder), 3, cfg.base_dim, _CUBE),
    *_down(encoder, cfg),
    *_middle(encoder, top),
    *_head(encoder, top, 2 * z),
    # Wan has these two beside encoder and decoder, not inside.
    *_dense(_Names("encoder/moments", "conv1", "quant_conv"), 2 * z, 2 * z),
    *_dense(_Names("decoder/latents", "conv2", "post_quant_conv"), z, z),
    *_conv(_into(decoder), z, top, _CUBE),
    *_middle(decoder, top),
    *_up(decoder, cfg),
    *_head(decoder, cfg.base_dim * cfg.dim_mult[0], 3),
  ]


def _into(at: _Names) -> _Names:
  return at.part("conv_in", "conv1", "conv_in")


def _down(at: _Names, cfg: VAEConfig) -> list[Tensor]:
  found = []
  for i, layer in enumerate(down_layers(cfg)):
    names = at.part(f"down_{i}", f"downsamples.{i}", f"down_blocks.{i}")
    found += _layer(names, layer, layer.outputs)
  return found


def _up(at: _Names, cfg: VAEConfig) -> list[Tensor]:
  """diffusers puts the layers of a resolution into a block; Wan does not."""
  found = []
  size = cfg.num_res_blocks + 2
  for i, layer in enumerate(up_layers(cfg)):
    block, j = divmod(i, size)
    place = "upsamplers.0" if layer.resample else f"resnets.{j}"
    names = at.part(f"up_{i}", f"upsamples.{i}", f"up_blocks.{block}.{place}")
    found += _layer(names, layer, 2 * layer.inputs)
  return found


def _layer(at: _Names, layer: Layer, timed: int) -> list[Tensor]:
  """A residual block or a resampling, whose convolution over time makes
  `timed` channels."""
  if not layer.resample:
    return _residual(at, layer.inputs, layer.outputs)
  space = at.part("space", "resample.1", "resample.1")
  found = _conv(space, layer.inputs, layer.outputs, (3, 3))
  if layer.time:
    time = at.part("time", "time_conv", "time_conv")
    found += _conv(time, layer.inputs, timed, (3, 1, 1))
  return found


def _residual(at: _Names, inputs: int, outputs: int) -> list[Tensor]:
  # Wan numbers what it runs in a row; 1, 4 and 5 have no tensors.
  found = [
    *_norm(at.part("norm1", "residual.0", "norm1"), inputs),
    *_conv(at.part("conv1", "residual.2", "conv1"), inputs, outputs, _CUBE),
    *_norm(at.part("norm2", "residual.3", "norm2"), outputs),
    *_conv(at.part("conv2", "residual.6", "conv2"), outputs, outputs, _CUBE),
  ]
  if inputs != outputs:
    shortcut = at.part("shortcut", "shortcut", "conv_shortcut")
    found += _dense(shortcut, inputs, outputs)
  return found


def _middle(at: _Names, width: int) -> list[Tensor]:
  at = at.part("middle", "middle", "mid_block")
  attention = at.part("attention", "1", "attentions.0")
  qkv = attention.part("qkv", "to_qkv", "to_qkv")
  proj = attention.part("proj", "proj", "proj")
  return [
    *_residual(at.part("residual_0", "0", "resnets.0"), width, width),
    # The attention is one of images, hence an axis less.
    *_norm(attention.part("norm", "norm", "norm"), width, _POINT[1:]),
    *_dense(qkv, width, 3 * width, _POINT[1:]),
    *_dense(proj, width, width, _POINT[1:]),
    *_residual(at.part("residual_1", "2", "resnets.1"), width, width),
  ]


def _head(at: _Names, inputs: int, outputs: int) -> list[Tensor]:
  return [
    *_norm(at.part("head/norm", "head.0", "norm_out"), inputs),
    *_conv(at.part("head/conv", "head.2", "conv_out"), inputs, outputs, _CUBE),
  ]


def _norm(
  at: _Names, width: int, axes: tuple[int, ...] = _POINT
) -> list[Tensor]:
  return [
    Tensor(
      f"{at.path}/scale",
      None,
      f"{at.original}.gamma",
      f"{at.diffusers}.gamma",
      (width, *axes),
      reshape=(width,),
    )
  ]


def _conv(
  at: _Names,
  inputs: int,
  outputs: int,
  kernel: tuple[int, ...],
  reshape: tuple[int, ...] | None = None,
) -> list[Tensor]:
  return [
    Tensor(
      f"{at.path}/kernel",
      None,
      f"{at.original}.weight",
      f"{at.diffusers}.weight",
      (outputs, inputs, *kernel),
      "conv",
      reshape,
    ),
    Tensor(
      f"{at.path}/bias",
      None,
      f"{at.original}.bias",
      f"{at.diffusers}.bias",
      (outputs,),
    ),
  ]


def _dense(
  at: _Names, inputs: int, outputs: int, kernel: tuple[int, ...] = _POINT
) -> list[Tensor]:
  """A convolution of single points, which we have as a linear layer."""
  return _conv(at, inputs, outputs, kernel, (inputs, outputs))
