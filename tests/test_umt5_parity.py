"""umT5 and its tokens against transformers."""

import dataclasses
import functools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.models import umt5
from avd_jax.wan import tokenizer, umt5_names

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

torch.set_num_threads(1)
CFG = umt5.UMT5Config(
  vocab_size=300,
  dim=32,
  attention_dim=32,
  ffn_dim=64,
  num_heads=4,
  num_layers=2,
  dtype="float32",
)
LENGTH = 512
PROMPTS = (
  "a red ball bounces over the table.",
  "",
  "A Fox, jumping: 3 times! (slow-motion) 😀👍🏽 #4k",
  "一只红色的球在绿色的草地上滚动，镜头缓慢推进。",
  "Ünïcödé ﬁne ½ × ™ e\u0301",
  "</s> and <pad> typed by hand",
  "the camera follows a lazy dog " * 6,
  "two boats and a yellow umbrella 球 " * 60,  # far more than 512 tokens
)


def their_config(cfg):
  return transformers.UMT5Config(
    vocab_size=cfg.vocab_size,
    d_model=cfg.dim,
    d_kv=cfg.attention_dim // cfg.num_heads,
    d_ff=cfg.ffn_dim,
    num_layers=cfg.num_layers,
    num_heads=cfg.num_heads,
    feed_forward_proj="gated-gelu",
  )


@functools.cache
def peer():
  """Their encoder, random everywhere (norms too)."""
  torch.manual_seed(0)
  model = transformers.UMT5EncoderModel(their_config(CFG)).eval()
  with torch.no_grad():
    for name, weight in model.named_parameters():
      if "layer_norm" in name:
        weight.copy_(1 + 0.3 * torch.randn_like(weight))
      elif "relative_attention_bias" in name:
        weight.copy_(torch.randn_like(weight))
      else:
        weight.copy_(torch.randn_like(weight) * weight.shape[-1] ** -0.5)
  return model


def our_params(cfg):
  """Theirs, through the names."""
  state = {name: x.float().numpy() for name, x in peer().state_dict().items()}
  params = jax.tree.map(
    lambda s: np.zeros(s.shape, s.dtype), umt5.abstract_params(cfg)
  )
  for row in umt5_names.tensors(cfg):
    *parents, last = row.path.split("/")
    leaf = functools.reduce(lambda tree, key: tree[key], parents, params)[last]
    leaf[... if row.layer is None else row.layer] = row.ours(
      state[row.diffusers]
    )
  return jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
  tokenizer.make_tiny(path, CFG.vocab_size)
  return path


@pytest.fixture(scope="module")
def prompts(file):
  """(tokens, lengths) of PROMPTS."""
  with pytest.warns(UserWarning, match="are cut"):
    return tokenizer.load(file).encode(PROMPTS, LENGTH)


def theirs(model, tokens, lengths):
  """Their output, zeroed past each prompt as Wan's pipeline does."""
  seen = np.arange(tokens.shape[1]) < lengths[:, None]
  with torch.no_grad():
    out = model(
      torch.from_numpy(tokens).long(),
      attention_mask=torch.from_numpy(seen).long(),
    ).last_hidden_state
  return np.where(seen[..., None], out.float().numpy(), 0)


def error(ours, wanted):
  ours = np.asarray(ours, np.float32)
  return np.abs(ours - wanted).max() / np.abs(wanted).max()


def test_tokens_are_those_of_transformers(file, prompts):
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(file),
    pad_token="<pad>",
    eos_token="</s>",
    unk_token="<unk>",
  )
  wanted = fast(
    list(PROMPTS), padding="max_length", truncation=True, max_length=LENGTH
  )
  tokens, lengths = prompts
  np.testing.assert_array_equal(tokens, wanted["input_ids"])
  np.testing.assert_array_equal(lengths, np.sum(wanted["attention_mask"], 1))
  assert len(set(lengths.tolist())) > 5
  assert lengths.max() == LENGTH


def test_the_encoder_is_that_of_transformers(prompts):
  wanted = theirs(peer(), *prompts)
  ours = umt5.encode(our_params(CFG), CFG, *prompts)
  found = error(ours, wanted)
  print(f"float32: max relative error {found:.1e}")
  # Both are 7e-6 from float64: unscaled logits sharpen what rounding does.
  assert found <= 5e-5


def test_bfloat16_is_no_further_from_float32_than_theirs(prompts):
  wanted = theirs(peer(), *prompts)
  cfg = dataclasses.replace(CFG, dtype="bfloat16")
  ours = error(umt5.encode(our_params(cfg), cfg, *prompts), wanted)
  low = transformers.UMT5EncoderModel(their_config(CFG)).eval()
  low.load_state_dict(peer().state_dict())
  other = error(theirs(low.bfloat16(), *prompts), wanted)
  print(f"bfloat16: max relative error {ours:.1e}, transformers' {other:.1e}")
  assert ours < min(0.05, 1.2 * other)


def test_positions_have_their_buckets():
  offset = torch.arange(LENGTH)[None] - torch.arange(LENGTH)[:, None]
  attention = peer().encoder.block[0].layer[0].SelfAttention
  wanted = attention._relative_position_bucket(offset).numpy()
  np.testing.assert_array_equal(umt5.buckets(CFG, LENGTH), wanted)


def test_full_size_has_the_names_and_shapes_of_transformers():
  cfg = umt5.UMT5Config()
  with torch.device("meta"):
    model = transformers.UMT5EncoderModel(their_config(cfg))
  wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
  found = {row.diffusers: row.shape for row in umt5_names.tensors(cfg)}
  found |= {a: found[name] for a, name in umt5_names.ALIASES.items()}
  assert found == wanted
