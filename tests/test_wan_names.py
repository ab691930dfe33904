"""Wan's transformer in files: names, shapes, and configs read from them."""

import dataclasses
import json
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.errors import UserError
from avd_jax.models import denoiser
from avd_jax.models.dit_config import DiTConfig
from avd_jax.models.umt5 import UMT5Config
from avd_jax.models.vae import VAEConfig
from avd_jax.wan import dit_names, shapes, sources, tiny
from avd_jax.wan.readers import Stored

LARGE = DiTConfig(dim=5120, ffn_dim=13_824, num_heads=40, num_layers=40)
# Another depth, width, and number of halvings than Wan's.
VAE = VAEConfig(
  base_dim=12,
  dim_mult=(1, 3, 2),
  num_res_blocks=3,
  temporal_downsample=(True, False),
)


def in_files(tensors, layout, dtype="float32"):
  """Tensors that lie nowhere, by the names of a layout."""
  kind = np.dtype(jnp.dtype(dtype))
  return {
    getattr(t, layout): Stored(Path("nowhere"), 0, t.shape, kind)
    for t in tensors
  }


def source(cfg, layout="original", config=None, dtype="float32", **changes):
  """A source that consists of a config's tensors, some of them changed."""
  component = {DiTConfig: "dit", VAEConfig: "vae", UMT5Config: "text"}[
    type(cfg)
  ]
  tensors = in_files(sources.NAMES[component][1](cfg), layout, dtype)
  path = Path("nowhere")
  return sources.Source(component, layout, path, tensors | changes, config)


@pytest.mark.parametrize(
  ("layout", "file"),
  [("original", "wan13_orig"), ("diffusers", "diff_transformer")],
)
def test_names_and_shapes_are_those_of_the_files(layout, file):
  path = Path(__file__).parent / "wan" / f"names_{file}.json"
  wanted = {n: tuple(s) for n, (s, _) in json.loads(path.read_text()).items()}
  tensors = dit_names.tensors(DiTConfig())
  assert {getattr(t, layout): t.shape for t in tensors} == wanted
  assert len(tensors) == len(wanted) == 825
  assert sum(math.prod(t.shape) for t in tensors) == 1_418_996_800


@pytest.mark.parametrize("cfg", [DiTConfig(), tiny.DIT, LARGE])
def test_names_cover_every_parameter_once(cfg):
  x = jax.ShapeDtypeStruct((1, 3, 2, 2, 16), jnp.float32)
  text = jax.ShapeDtypeStruct((1, 4, cfg.text_dim), jnp.float32)
  boxed = jax.eval_shape(
    lambda key: denoiser.init(cfg, key, x, text), jax.random.key(0)
  )
  leaves, _ = jax.tree.flatten_with_path(nn.meta.unbox(boxed))
  wanted = {"/".join(k.key for k in path): x.shape for path, x in leaves}
  found = {}
  for t in dit_names.tensors(cfg):
    one = t.ours(np.broadcast_to(np.int8(0), t.shape)).shape
    if t.layer is None:
      assert t.path not in found
      found[t.path] = one
    else:
      layers, *rest = found.get(t.path, (0, *one))
      assert (layers, tuple(rest)) == (t.layer, one)
      found[t.path] = (layers + 1, *rest)
  assert found == wanted


def test_what_is_turned_turns_back():
  for t in dit_names.tensors(dataclasses.replace(tiny.DIT, num_layers=1)):
    x = tiny.random(t, seed=3)
    np.testing.assert_array_equal(t.theirs(t.ours(x)), x)


def test_patches_are_what_the_convolution_makes_of_them():
  kernel = next(
    t for t in dit_names.tensors(tiny.DIT) if t.path.startswith("patch")
  )
  weight = tiny.random(kernel, seed=1)
  x = np.random.default_rng(0).normal(size=(1, 2, 4, 6, 16))
  lhs = x.transpose(0, 4, 1, 2, 3).astype(np.float32)
  want = jax.lax.conv_general_dilated(lhs, weight, (1, 2, 2), "VALID")
  want = np.asarray(want).transpose(0, 2, 3, 4, 1)
  pixels = x.reshape(1, 2, 2, 2, 3, 2, 16).transpose(0, 1, 2, 4, 3, 5, 6)
  got = pixels.reshape(1, 2, 2, 3, 64) @ kernel.ours(weight)
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("layout", sources.LAYOUTS)
@pytest.mark.parametrize(
  "cfg",
  [
    DiTConfig(),
    LARGE,
    tiny.DIT,
    VAEConfig(),
    VAE,
    UMT5Config(),
    tiny.TEXT,
  ],
)
def test_configs_are_read_from_shapes(cfg, layout):
  dtype = "bfloat16" if isinstance(cfg, UMT5Config) else "float32"
  assert shapes.config(source(cfg, layout, dtype=dtype)) == cfg


def test_config_json_adds_what_shapes_do_not_say():
  cfg = dataclasses.replace(tiny.DIT, num_heads=8, eps=1e-5)
  said = {"num_heads": 8, "eps": 1e-5, "dim": cfg.dim, "num_layers": 2}
  assert shapes.config(source(cfg, config=said)) == cfg
  said = {"num_attention_heads": 8, "attention_head_dim": 32, "eps": 1e-5}
  assert shapes.config(source(cfg, "diffusers", said)) == cfg
  mean, std = [0.0] * 4, [2.0] * 4
  vae = dataclasses.replace(
    tiny.VAE, z_dim=4, latents_mean=tuple(mean), latents_std=tuple(std)
  )
  said = {"latents_mean": mean, "latents_std": std, "z_dim": 4}
  assert shapes.config(source(vae, "diffusers", said)) == vae
  with pytest.raises(UserError, match="latents of 4 channels"):
    shapes.config(source(vae))
  text = dataclasses.replace(tiny.TEXT, max_distance=64, dtype="float32")
  said = {"relative_attention_max_distance": 64, "d_model": 32}
  assert shapes.config(source(text, "diffusers", said)) == text


@pytest.mark.parametrize(
  ("said", "words"),
  [
    ({"num_layers": 3}, "num_layers 3, but the tensors have 2"),
    ({"dim": 1536}, "dim 1536, but the tensors have 256"),
    ({"in_channels": 36}, "in_channels 36, but the tensors have 16"),
    (
      {"num_attention_heads": 2, "attention_head_dim": 64},
      "2 heads of 64, but the tensors are 256 wide",
    ),
    ({"num_heads": 3}, "num_heads"),
  ],
)
def test_a_config_json_of_another_model_is_refused(said, words):
  with pytest.raises(UserError, match=words):
    shapes.config(source(tiny.DIT, config=said))


def test_heads_that_nothing_tells_are_asked_for():
  odd = dataclasses.replace(tiny.DIT, dim=96, num_heads=4)
  with pytest.raises(UserError, match=r"multiple of Wan's head dim 128"):
    shapes.config(source(odd))


def test_shapes_that_tell_nothing_are_named():
  lost = source(tiny.DIT)
  del lost.tensors["blocks.0.ffn.0.weight"]
  with pytest.raises(UserError, match=r"lacks blocks\.0\.ffn\.0\.weight"):
    shapes.config(lost)
  flat = Stored(Path("nowhere"), 0, (256, 16), np.dtype(np.float32))
  with pytest.raises(UserError, match="has 5 dimensions"):
    shapes.config(source(tiny.DIT, **{"patch_embedding.weight": flat}))
