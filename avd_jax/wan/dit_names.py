"""Wan2.1's transformer in files: the original's names and diffusers'."""

from avd_jax.models.dit_config import DiTConfig
from avd_jax.wan.names import Tensor

_EMBEDDER = "condition_embedder."
# (ours, original, diffusers) of the linear layers of a block; mind that what
# the original calls norm3, of the cross-attention, is norm2 in diffusers.
_ATTENTION = (
  ("q", "self_attn.q", "attn1.to_q"),
  ("k", "self_attn.k", "attn1.to_k"),
  ("v", "self_attn.v", "attn1.to_v"),
  ("o", "self_attn.o", "attn1.to_out.0"),
  ("cross_q", "cross_attn.q", "attn2.to_q"),
  ("cross_k", "cross_attn.k", "attn2.to_k"),
  ("cross_v", "cross_attn.v", "attn2.to_v"),
  ("cross_o", "cross_attn.o", "attn2.to_out.0"),
)
_NORMS = (
  ("norm_q/scale", "self_attn.norm_q.weight", "attn1.norm_q.weight"),
  ("norm_k/scale", "self_attn.norm_k.weight", "attn1.norm_k.weight"),
  ("cross_norm_q/scale", "cross_attn.norm_q.weight", "attn2.norm_q.weight"),
  ("cross_norm_k/scale", "cross_attn.norm_k.weight", "attn2.norm_k.weight"),
  ("cross_norm/scale", "norm3.weight", "norm2.weight"),
  ("cross_norm/bias", "norm3.bias", "norm2.bias"),
)


def tensors(cfg: DiTConfig) -> list[Tensor]:
  """Every tensor of the transformer.

  Args:
    cfg: of a model with text embeddings; its text_dim, unlike in our own
      network, must be the encoder's width.
  """
  d, p, ch = cfg.dim, cfg.patch, cfg.channels
  text, time = _EMBEDDER + "text_embedder.", _EMBEDDER + "time_embedder."
  m, k = cfg.text_dim, cfg.freq_dim
  rows = (
    ("text_embedding/up", "text_embedding.0", text + "linear_1", m, d),
    ("text_embedding/down", "text_embedding.2", text + "linear_2", d, d),
    ("time_embedding/up", "time_embedding.0", time + "linear_1", k, d),
    ("time_embedding/down", "time_embedding.2", time + "linear_2", d, d),
    ("time_projection", "time_projection.1", _EMBEDDER + "time_proj", d, 6 * d),
    ("head", "head.head", "proj_out", d, p * p * ch),
  )
  return [
    Tensor(
      "patch_embedding/kernel",
      None,
      *("patch_embedding.weight",) * 2,
      (d, ch, 1, p, p),
      "conv",
      # A convolution whose stride is its size: a linear layer over the pixels
      # of a patch, row by row, channels last.
      (p * p * ch, d),
    ),
    Tensor("patch_embedding/bias", None, *("patch_embedding.bias",) * 2, (d,)),
    *(t for row in rows for t in _linear(None, *row)),
    *(t for i in range(cfg.num_layers) for t in _block(cfg, i)),
    Tensor(
      "head_modulation",
      None,
      "head.modulation",
      "scale_shift_table",
      (1, 2, d),
      reshape=(2, d),
    ),
  ]


def _linear(
  layer: int | None,
  path: str,
  original: str,
  diffusers: str,
  rows: int,
  to: int,
) -> list[Tensor]:
  return [
    Tensor(
      f"{path}/kernel",
      layer,
      f"{original}.weight",
      f"{diffusers}.weight",
      (to, rows),
      "linear",
    ),
    Tensor(
      f"{path}/bias", layer, f"{original}.bias", f"{diffusers}.bias", (to,)
    ),
  ]


def _block(cfg: DiTConfig, layer: int) -> list[Tensor]:
  d, prefix = cfg.dim, f"blocks.{layer}."
  rows = [(*names, d, d) for names in _ATTENTION]
  rows += [
    ("ffn/up", "ffn.0", "ffn.net.0.proj", d, cfg.ffn_dim),
    ("ffn/down", "ffn.2", "ffn.net.2", cfg.ffn_dim, d),
  ]
  out = [
    t
    for path, original, other, n, to in rows
    for t in _linear(
      layer, f"blocks/{path}", prefix + original, prefix + other, n, to
    )
  ]
  out += [
    Tensor(f"blocks/{path}", layer, prefix + original, prefix + other, (d,))
    for path, original, other in _NORMS
  ]
  out.append(
    Tensor(
      "blocks/modulation",
      layer,
      prefix + "modulation",
      prefix + "scale_shift_table",
      (1, 6, d),
      reshape=(6, d),
    )
  )
  return out
