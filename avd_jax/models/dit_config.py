"""The shape of a CausalDiT: one config, tiny to 14B."""

import dataclasses

import jax
import jax.numpy as jnp

from avd_jax.errors import UserError
from avd_jax.models.attention import AttentionConfig
from avd_jax.ops import rope

_policies = jax.checkpoint_policies
# What a block keeps for its backward pass.
REMAT = {
  "block": None,
  "dots": _policies.dots_with_no_batch_dims_saveable,
  "offload": _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=["block"],
    offload_src="device",
    offload_dst="pinned_host",
  ),
}


@dataclasses.dataclass(frozen=True)
class DiTConfig:
  """Everything that shapes the network. Defaults are Wan2.1-T2V-1.3B's.

  Attributes:
    dim: width. num_heads must divide it.
    ffn_dim: width of the feed-forward.
    num_heads: attention heads.
    num_layers: blocks.
    patch: pixels (latents) a token spans in height and width.
    channels: channels of a frame, in and out.
    text: "embeddings" (made beforehand), "bytes" (small trained conditioner)
      or "none" (no cross-attention at all).
    text_dim: width of the text vectors.
    text_tokens: text vectors that the byte conditioner makes.
    freq_dim: sinusoids of the timestep.
    chunk_frames: latent frames in a chunk, the autoregressive unit.
    attention: what a query sees of the history, and who computes it.
    prediction: "v" or "x0" (v is then (x - x0) / max(t, min_t)).
    min_t: where the x0 form stops dividing.
    spatial_embedding: (rows, columns) of a learned embedding, or None. Rotary
      positions alone are relative; a small model learns walls sooner with it.
    gate_init: value that gates start from, in addition to Wan's noise.
    rope_theta: base of the rotary frequencies.
    eps: of every norm.
    remat: what the backward pass recomputes of a block: "none" of it; "block",
      all but its input; "dots", all but what linear layers gave; "offload", as
      "block", with the inputs kept in the host's memory.
    scan_unroll: layers unrolled per scan iteration; all of them is fastest
      where a layer is so small that the loop's bookkeeping shows.
    dtype: compute dtype; parameters and norms are float32.
  """

  dim: int = 1536
  ffn_dim: int = 8960
  num_heads: int = 12
  num_layers: int = 30
  patch: int = 2
  channels: int = 16
  text: str = "embeddings"
  text_dim: int = 4096
  text_tokens: int = 8
  freq_dim: int = 256
  chunk_frames: int = 3
  attention: AttentionConfig = dataclasses.field(
    default_factory=AttentionConfig
  )
  prediction: str = "v"
  min_t: float = 0.05
  spatial_embedding: tuple[int, int] | None = None
  gate_init: float = 0.0
  rope_theta: float = 10_000.0
  eps: float = 1e-6
  remat: str = "block"
  scan_unroll: int = 1
  dtype: str = "float32"

  def __post_init__(self):
    for field in (
      "dim",
      "ffn_dim",
      "num_heads",
      "num_layers",
      "patch",
      "channels",
      "text_dim",
      "text_tokens",
      "chunk_frames",
      "min_t",
      "scan_unroll",
    ):
      if getattr(self, field) <= 0:
        raise UserError(f"model.{field} {getattr(self, field)}: not positive")
    if self.freq_dim < 2 or self.freq_dim % 2:
      raise UserError(f"model.freq_dim {self.freq_dim}: give an even number")
    if self.dim % self.num_heads:
      raise UserError(
        f"model.dim {self.dim} is not divisible by model.num_heads"
        f" {self.num_heads}"
      )
    rope.axis_dims(self.head_dim)
    for field, allowed in (
      ("prediction", ("v", "x0")),
      ("text", ("embeddings", "bytes", "none")),
      ("remat", ("none", *REMAT)),
      ("dtype", ("float32", "bfloat16")),
    ):
      if getattr(self, field) not in allowed:
        raise UserError(
          f"model.{field} {getattr(self, field)!r} is not one of"
          f" {', '.join(allowed)}"
        )

  @property
  def head_dim(self) -> int:
    return self.dim // self.num_heads

  def text_struct(self, *shape: int) -> jax.ShapeDtypeStruct:
    """What text of `shape` ([b m], say) is: token ids, or embeddings."""
    if self.text == "embeddings":
      return jax.ShapeDtypeStruct((*shape, self.text_dim), jnp.float32)
    return jax.ShapeDtypeStruct(shape, jnp.int32)

  def grid(self, height: int, width: int) -> tuple[int, int]:
    """Tokens along height and width.

    Raises:
      UserError: a frame that patches do not tile.
    """
    if height % self.patch or width % self.patch:
      raise UserError(
        f"frames of {height}x{width} are not divisible by model.patch"
        f" {self.patch}; change data.height and data.width"
      )
    return height // self.patch, width // self.patch
