"""umT5: against a plain NumPy encoder, its masks, and its names in files."""

import collections
import dataclasses
import functools
import json
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax import parallel
from avd_jax.errors import UserError
from avd_jax.models import umt5
from avd_jax.wan import umt5_names

TINY = umt5.UMT5Config(
  vocab_size=50,
  dim=8,
  attention_dim=12,
  ffn_dim=16,
  num_heads=2,
  num_layers=3,
  dtype="float32",
)
LENGTHS = np.array([150, 4], np.int32)
FULL = umt5.UMT5Config()

encode = functools.partial(jax.jit, static_argnums=1)(umt5.encode)


def random_params(cfg, seed=0):
  """Random everywhere: no scale is one, no bias too small to be seen."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: jnp.asarray(
      rng.normal(size=s.shape) / max(s.shape[-2:]) ** 0.3, s.dtype
    ),
    umt5.abstract_params(cfg),
  )


def random_tokens(seed=1):
  rng = np.random.default_rng(seed)
  shape = (len(LENGTHS), LENGTHS.max())
  return rng.integers(0, TINY.vocab_size, shape).astype(np.int32)


@functools.cache
def encoded():
  """(params, tokens, what becomes of them)."""
  params, tokens = random_params(TINY), random_tokens()
  return params, tokens, encode(params, TINY, tokens, LENGTHS)


def log_bucket(offset, cfg=TINY):
  """T5's bucket of a key `offset` to the right, by logarithms."""
  side = cfg.num_buckets // 2
  exact, distance = side // 2, abs(offset)
  if distance >= exact:
    ratio = math.log(distance / exact) / math.log(cfg.max_distance / exact)
    distance = min(exact + int(ratio * exact + 1e-9), side - 1)
  return distance + side * (offset > 0)


def rms_norm(x, scale, cfg):
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + cfg.eps) * scale


def plain_encoder(params, cfg, tokens):
  """One prompt without padding, float64, a loop for every layer and head."""
  params = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
  x = params["token_embedding"][tokens]
  places = range(len(tokens))
  bucket = np.array([[log_bucket(k - q, cfg) for k in places] for q in places])
  for i in range(cfg.num_layers):
    w = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
    y = rms_norm(x, w["norm_attention"]["scale"], cfg)
    outs = []
    for head in range(cfg.num_heads):
      width = cfg.attention_dim // cfg.num_heads
      cut = slice(head * width, (head + 1) * width)
      q, k, v = (y @ w[name]["kernel"][:, cut] for name in "qkv")
      weight = np.exp(q @ k.T + w["position_bias"][bucket, head])
      outs.append(weight / weight.sum(-1, keepdims=True) @ v)
    x = x + np.concatenate(outs, -1) @ w["o"]["kernel"]
    y = rms_norm(x, w["norm_ffn"]["scale"], cfg)
    gate = y @ w["gate"]["kernel"]
    cubic = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    gelu = 0.5 * gate * (1 + np.tanh(cubic))
    x = x + (gelu * (y @ w["up"]["kernel"])) @ w["down"]["kernel"]
  return rms_norm(x, params["norm"]["scale"], cfg)


def test_the_encoder_is_a_plain_one():
  params, tokens, out = encoded()
  for row, length in enumerate(LENGTHS):
    wanted = plain_encoder(params, TINY, tokens[row, :length])
    error = np.abs(out[row, :length] - wanted).max() / np.abs(wanted).max()
    assert error < 1e-4


def test_past_a_prompt_are_zeros_that_nothing_depends_on():
  params, tokens, out = encoded()
  assert not np.any(out[1, LENGTHS[1] :])
  other = tokens.copy()
  other[1, LENGTHS[1] :] = 7
  np.testing.assert_array_equal(encode(params, TINY, other, LENGTHS), out)
  short = encode(params, TINY, tokens[1:, :10], LENGTHS[1:])
  np.testing.assert_allclose(short[0], out[1, :10], atol=1e-5)


def test_a_prompt_of_no_tokens_is_zeros():
  params, tokens, _ = encoded()
  assert not np.any(encode(params, TINY, tokens, np.zeros(2, np.int32)))


def test_every_layer_has_a_position_bias_of_its_own():
  params, tokens, out = encoded()
  for layer in range(TINY.num_layers):
    blocks = dict(params["blocks"])
    blocks["position_bias"] = blocks["position_bias"].at[layer, 3].add(1.0)
    changed = encode(params | {"blocks": blocks}, TINY, tokens, LENGTHS)
    assert np.abs(changed - out).max() > 1e-3


def test_buckets():
  bucket = umt5.buckets(FULL, 300)
  to_the_left = bucket[:, 0]
  starts = np.flatnonzero(np.diff(to_the_left, prepend=-1))
  wanted = [*range(9), 12, 16, 23, 32, 46, 64, 91]
  assert list(starts) == wanted
  assert to_the_left[-1] == 15
  for q, k in ((0, 299), (299, 0), (20, 24), (24, 20), (0, 32), (64, 0)):
    assert bucket[q, k] == log_bucket(k - q)


def test_bfloat16_keeps_small_contributions_to_a_large_stream():
  low = dataclasses.replace(TINY, dtype="bfloat16")
  params = jax.tree.map(lambda w: w[0], random_params(low)["blocks"])
  rng = np.random.default_rng(2)
  x = jnp.asarray(300 * rng.normal(size=(1, 6, TINY.dim)), jnp.float32)
  seen, bucket = jnp.ones((1, 6), bool), jnp.asarray(umt5.buckets(TINY, 6))
  adds = {}
  for cfg in (TINY, low):
    y, _ = umt5.Block(cfg).apply({"params": params}, x, seen, bucket)
    assert y.dtype == jnp.float32
    adds[cfg.dtype] = y - x
  error = np.abs(adds["bfloat16"] - adds["float32"]).max()
  assert error < 0.03 * np.abs(adds["float32"]).max()


def test_sharded_parameters_encode_alike():
  params, tokens, out = encoded()
  mesh = parallel.make_mesh(jax.devices()[:4], (1, 2, 1, 2))
  boxed = jax.eval_shape(functools.partial(umt5.init, TINY), jax.random.key(0))
  shardings = parallel.state_shardings(boxed, mesh)
  specs = {
    "token_embedding": ("tensor", "fsdp"),
    "q": (None, "fsdp", "tensor"),
    "o": (None, "tensor", "fsdp"),
    "down": (None, "tensor", "fsdp"),
    "position_bias": (None, None, "tensor"),
  }
  flat = {umt5_path(p): s for p, s in jax.tree.leaves_with_path(shardings)}
  for name, spec in specs.items():
    found = [tuple(s.spec) for p, s in flat.items() if name in p.split("/")]
    assert found == [spec]
  placed = jax.device_put(params, shardings)
  sharded = encode(placed, TINY, tokens, LENGTHS)
  np.testing.assert_allclose(sharded, out, atol=1e-5)


def test_init_makes_what_abstract_params_says():
  made = nn.meta.unbox(umt5.init(TINY, jax.random.key(0)))
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), made)
  wanted = jax.tree.map(
    lambda x: (x.shape, x.dtype), umt5.abstract_params(TINY)
  )
  assert shapes == wanted
  out = encode(made, TINY, random_tokens(), LENGTHS)
  assert np.isfinite(out).all()


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"num_layers": 0}, "text_encoder.num_layers 0"),
    ({"eps": -1.0}, "text_encoder.eps"),
    ({"num_heads": 5}, "text_encoder.num_heads 5"),
    ({"num_buckets": 30}, "text_encoder.num_buckets 30"),
    ({"max_distance": 8}, "text_encoder.max_distance 8"),
    ({"dtype": "float16"}, "text_encoder.dtype 'float16'"),
  ],
)
def test_impossible_encoders_are_refused(change, words):
  with pytest.raises(UserError, match=words):
    umt5.UMT5Config(**change)


def umt5_path(path):
  return "/".join(str(key.key) for key in path)


@pytest.mark.parametrize(
  ("field", "file"),
  [("original", "names_t5_orig"), ("diffusers", "names_umt5_hf")],
)
def test_names_and_shapes_are_those_of_the_files(field, file):
  path = Path(__file__).parent / "wan" / f"{file}.json"
  wanted = {n: tuple(s) for n, (s, _) in json.loads(path.read_text()).items()}
  rows = umt5_names.tensors(FULL)
  found = {getattr(row, field): row.shape for row in rows}
  assert len(found) == len(rows)
  if field == "diffusers":
    found |= {a: found[name] for a, name in umt5_names.ALIASES.items()}
  assert found == wanted


def test_both_names_mean_the_same_tensor():
  rows = umt5_names.tensors(TINY)
  pairs = {row.original: row.diffusers for row in rows}
  block = "encoder.block.1.layer."
  for original, other in {
    "norm1": "0.layer_norm",
    "attn.q": "0.SelfAttention.q",
    "attn.k": "0.SelfAttention.k",
    "attn.v": "0.SelfAttention.v",
    "attn.o": "0.SelfAttention.o",
    "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias",
    "norm2": "1.layer_norm",
    "ffn.gate.0": "1.DenseReluDense.wi_0",
    "ffn.fc1": "1.DenseReluDense.wi_1",
    "ffn.fc2": "1.DenseReluDense.wo",
  }.items():
    assert pairs[f"blocks.1.{original}.weight"] == f"{block}{other}.weight"


@pytest.mark.parametrize("cfg", [TINY, FULL], ids=["tiny", "full"])
def test_every_leaf_and_layer_has_one_tensor(cfg):
  leaves = jax.tree.leaves_with_path(umt5.abstract_params(cfg))
  wanted = {}
  for path, leaf in leaves:
    name = umt5_path(path)
    if name.startswith("blocks/"):
      for layer in range(cfg.num_layers):
        wanted[name, layer] = leaf.shape[1:]
    else:
      wanted[name, None] = leaf.shape
  rows = umt5_names.tensors(cfg)
  places = collections.Counter((row.path, row.layer) for row in rows)
  assert set(places.values()) == {1}
  # A view of one number: nothing of the full size is allocated.
  empty = lambda shape: np.broadcast_to(np.zeros((), np.int8), shape)
  ours = {
    (row.path, row.layer): row.ours(empty(row.shape)).shape for row in rows
  }
  assert ours == wanted
  assert all(
    row.theirs(empty(ours[row.path, row.layer])).shape == row.shape
    for row in rows
  )
