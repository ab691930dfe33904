"""Configs of Wan's components, read from their tensors' shapes.

A config.json adds what shapes do not say (heads, epsilons) and is held against
what they do say; without one, what they do not say is Wan2.1's.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from avd_jax.errors import UserError
from avd_jax.models.dit_config import DiTConfig
from avd_jax.models.umt5 import UMT5Config
from avd_jax.models.vae import VAEConfig
from avd_jax.wan import sources
from avd_jax.wan.sources import Source, some

T = TypeVar("T")
HEAD_DIM = 128  # of every Wan2.1
# Keys of config.json, in the original's and in diffusers' words, for fields
# of ours.
_DIT_KEYS = {
  "dim": ("dim",),
  "ffn_dim": ("ffn_dim",),
  "num_layers": ("num_layers",),
  "num_heads": ("num_heads", "num_attention_heads"),
  "channels": ("in_dim", "in_channels"),
  "text_dim": ("text_dim",),
  "freq_dim": ("freq_dim",),
  "eps": ("eps",),
}
_VAE_KEYS = {
  name: (name.replace("temporal", "temperal"),)
  for name in (
    "base_dim",
    "z_dim",
    "dim_mult",
    "num_res_blocks",
    "temporal_downsample",
    "latents_mean",
    "latents_std",
  )
}
_TEXT_KEYS = {
  "vocab_size": ("vocab_size",),
  "dim": ("d_model",),
  "ffn_dim": ("d_ff",),
  "num_heads": ("num_heads",),
  "num_layers": ("num_layers",),
  "num_buckets": ("relative_attention_num_buckets",),
  "max_distance": ("relative_attention_max_distance",),
  "eps": ("layer_norm_epsilon",),
}


def config(source: Source) -> DiTConfig | VAEConfig | UMT5Config:
  """The config of a component, as far as it shapes weights and results.

  Raises:
    UserError: a tensor that tells a size is missing, shapes that no config
      gives, or a config.json that says otherwise than the shapes.
  """
  return {"dit": _dit, "vae": _vae, "text": _text}[source.component](source)


def _dit(source: Source) -> DiTConfig:
  at = _lookup(source)
  embedder = "condition_embedder."
  dim, channels, _, patch, _ = at(5, "patch_embedding.weight")
  freq_dim = at(
    2, "time_embedding.0.weight", f"{embedder}time_embedder.linear_1.weight"
  )[1]
  text_dim = at(
    2, "text_embedding.0.weight", f"{embedder}text_embedder.linear_1.weight"
  )[1]
  ffn_dim = at(2, "blocks.0.ffn.0.weight", "blocks.0.ffn.net.0.proj.weight")[0]
  told = dict(
    dim=dim,
    ffn_dim=ffn_dim,
    num_layers=_count(source, r"blocks\.(\d+)\."),
    patch=patch,
    channels=channels,
    text_dim=text_dim,
    freq_dim=freq_dim,
  )
  said = _said(source, _DIT_KEYS, told)
  if "num_heads" not in said:
    if dim % HEAD_DIM:
      raise UserError(
        f"{source.path}: width {dim} is not a multiple of Wan's head dim"
        f" {HEAD_DIM}; put its config.json, which tells the number of heads,"
        " beside it"
      )
    said["num_heads"] = dim // HEAD_DIM
  heads = said["num_heads"]
  head_dim = (source.config or {}).get("attention_head_dim")
  if head_dim is not None and heads * head_dim != dim:
    raise UserError(
      f"{source.path}: config.json says {heads} heads of {head_dim}, but the"
      f" tensors are {dim} wide; do both belong together?"
    )
  return _made(DiTConfig, source, told | said)


def _vae(source: Source) -> VAEConfig:
  at = _lookup(source)
  base = at(5, "encoder.conv1.weight", "encoder.conv_in.weight")[0]
  z = at(5, "conv2.weight", "post_quant_conv.weight")[0]
  # Layers of the encoder: their last convolution's channels, None for one that
  # halves the frame, and whether it halves time too.
  stem = (
    "encoder.downsamples"
    if source.layout == "original"
    else ("encoder.down_blocks")
  )
  widths: list[int | None] = []
  times = []
  for i in range(_count(source, rf"{re.escape(stem)}\.(\d+)\.")):
    layer = f"{stem}.{i}"
    if f"{layer}.resample.1.weight" in source.tensors:
      widths.append(None)
      times.append(f"{layer}.time_conv.weight" in source.tensors)
    else:
      widths.append(
        at(5, f"{layer}.residual.6.weight", f"{layer}.conv2.weight")[0]
      )
  starts = [0, *(i + 1 for i, width in enumerate(widths) if width is None)]
  told = dict(
    base_dim=base,
    z_dim=z,
    dim_mult=tuple((widths[i] or 0) // base for i in starts if i < len(widths)),
    num_res_blocks=starts[1] - 1 if len(starts) > 1 else len(widths),
    temporal_downsample=tuple(times),
  )
  said = _said(source, _VAE_KEYS, told)
  if z != VAEConfig.z_dim and "latents_mean" not in said:
    raise UserError(
      f"{source.path}: latents of {z} channels, not Wan2.1's"
      f" {VAEConfig.z_dim}; put its config.json, which tells their mean and"
      " deviation, beside it"
    )
  return _made(VAEConfig, source, told | said)


def _text(source: Source) -> UMT5Config:
  at = _lookup(source)
  vocab_size, dim = at(2, "token_embedding.weight", "shared.weight")
  block = "encoder.block.0.layer"
  buckets, heads = at(
    2,
    "blocks.0.pos_embedding.embedding.weight",
    f"{block}.0.SelfAttention.relative_attention_bias.weight",
  )
  told = dict(
    vocab_size=vocab_size,
    dim=dim,
    attention_dim=at(
      2, "blocks.0.attn.q.weight", f"{block}.0.SelfAttention.q.weight"
    )[0],
    ffn_dim=at(
      2, "blocks.0.ffn.fc1.weight", f"{block}.1.DenseReluDense.wi_1.weight"
    )[0],
    num_heads=heads,
    num_layers=_count(source, r"(?:encoder\.)?blocks?\.(\d+)\."),
    num_buckets=buckets,
  )
  said = _said(source, _TEXT_KEYS, told)
  half = all(s.dtype.itemsize == 2 for s in source.tensors.values())
  said["dtype"] = "bfloat16" if half else "float32"
  return _made(UMT5Config, source, told | said)


def _made(cls: type[T], source: Source, values: dict[str, Any]) -> T:
  """The config of these values; who says that they cannot be is named."""
  try:
    return cls(**values)
  except UserError as error:
    file = sources.config_file(source.path)
    where = source.path if source.config is None else file
    raise UserError(f"{where}: {error}") from None


def _lookup(source: Source):
  """(dimensions, original name, diffusers name) -> the tensor's shape."""

  def at(dims: int, original: str, diffusers: str = "") -> tuple[int, ...]:
    name = original
    if source.layout == "diffusers" and diffusers:
      name = diffusers
    if name not in source.tensors:
      raise UserError(
        f"{source.path} lacks {name}: no whole {source.title} (it has"
        f" {some(source.tensors)})"
      )
    shape = source.tensors[name].shape
    if len(shape) != dims:
      raise UserError(
        f"{source.path}: {name} is {shape}, where a {source.title} has {dims}"
        " dimensions"
      )
    return shape

  return at


def _count(source: Source, pattern: str) -> int:
  """One more than the highest number in names that begin like `pattern`."""
  found = [re.match(pattern, name) for name in source.tensors]
  return 1 + max((int(m[1]) for m in found if m), default=-1)


def _said(
  source: Source, keys: Mapping[str, tuple[str, ...]], told: Mapping[str, Any]
) -> dict[str, Any]:
  """What config.json adds to what shapes tell.

  Raises:
    UserError: it says otherwise.
  """
  said = {}
  for field, names in keys.items():
    for name in names:
      value = (source.config or {}).get(name)
      if value is None:
        continue
      if isinstance(value, str | bool | dict):
        file = sources.config_file(source.path)
        raise UserError(f"{file}: {name} is {value!r}: give a number")
      value = tuple(value) if isinstance(value, list) else value
      if field in told and told[field] != value:
        raise UserError(
          f"{source.path}: config.json says {name} {value}, but the tensors"
          f" have {told[field]}; do both belong together?"
        )
      said[field] = value
  return {k: v for k, v in said.items() if k not in told}
