"""umT5's encoder in files: the original's names and transformers'.

transformers lists the embedding twice, `shared.weight` and, tied to it, what
`ALIASES` holds; Wan's own transformers files hold the first only. A reader
takes either, a writer need not write the alias.
"""

from collections.abc import Mapping

from avd_jax.models.umt5 import UMT5Config
from avd_jax.wan.names import Tensor

# A second name in the transformers layout, and the name it repeats.
ALIASES: Mapping[str, str] = {"encoder.embed_tokens.weight": "shared.weight"}


def tensors(cfg: UMT5Config) -> list[Tensor]:
  """Every tensor of the encoder, once; tied ones under their first name."""
  table = (cfg.vocab_size, cfg.dim)
  embedding = Tensor(
    "token_embedding", None, "token_embedding.weight", "shared.weight", table
  )
  norm = Tensor(
    "norm/scale",
    None,
    "norm.weight",
    "encoder.final_layer_norm.weight",
    (cfg.dim,),
  )
  layers = [t for i in range(cfg.num_layers) for t in _block(cfg, i)]
  return [embedding, *layers, norm]


def _block(cfg: UMT5Config, layer: int) -> list[Tensor]:
  """One layer's; a torch Linear's shape is [out, in]."""
  d, a, f = cfg.dim, cfg.attention_dim, cfg.ffn_dim
  rows = (
    ("norm_attention/scale", "norm1", "0.layer_norm", (d,), "same"),
    ("q/kernel", "attn.q", "0.SelfAttention.q", (a, d), "linear"),
    ("k/kernel", "attn.k", "0.SelfAttention.k", (a, d), "linear"),
    ("v/kernel", "attn.v", "0.SelfAttention.v", (a, d), "linear"),
    ("o/kernel", "attn.o", "0.SelfAttention.o", (d, a), "linear"),
    (
      "position_bias",
      "pos_embedding.embedding",
      "0.SelfAttention.relative_attention_bias",
      (cfg.num_buckets, cfg.num_heads),
      "same",
    ),
    ("norm_ffn/scale", "norm2", "1.layer_norm", (d,), "same"),
    ("gate/kernel", "ffn.gate.0", "1.DenseReluDense.wi_0", (f, d), "linear"),
    ("up/kernel", "ffn.fc1", "1.DenseReluDense.wi_1", (f, d), "linear"),
    ("down/kernel", "ffn.fc2", "1.DenseReluDense.wo", (d, f), "linear"),
  )
  return [
    Tensor(
      f"blocks/{path}",
      layer,
      f"blocks.{layer}.{original}.weight",
      f"encoder.block.{layer}.layer.{other}.weight",
      shape,
      turn,
    )
    for path, original, other, shape, turn in rows
  ]
