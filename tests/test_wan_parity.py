"""CausalDiT is Wan's network: the same numbers as diffusers, in float32.

Needs the extra parity (torch, diffusers, transformers); skipped without.
"""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from avd_jax.errors import UserError  # noqa: E402
from avd_jax.models import denoiser  # noqa: E402
from avd_jax.wan import (  # noqa: E402
  dit_names,
  exporting,
  importing,
  readers,
  sources,
  tiny,
  writers,
)

FRAMES, HEIGHT, WIDTH = 4, 6, 8  # latents: odd grids, no square
TEXT = 512
CLOSE = 1e-4  # of the largest value


def perturbed(model):
  """Nothing zero or one: Wan's head starts at zero, its norms at one."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      parameter.add_(0.1 * noise)
  return model.eval()


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
  """(diffusers' tiny model, the directory it is saved in)."""
  torch.set_num_threads(1)
  torch.manual_seed(0)
  model = diffusers.WanTransformer3DModel(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=28,  # 12 for time, 8 for height and width
    in_channels=16,
    out_channels=16,
    text_dim=32,
    freq_dim=64,
    ffn_dim=96,
    num_layers=2,
    cross_attn_norm=True,
    qk_norm="rms_norm_across_heads",
  )
  path = tmp_path_factory.mktemp("wan") / "transformer"
  perturbed(model).save_pretrained(path)
  return model, path


@pytest.fixture(scope="module")
def inputs():
  """(latents [b f h w c], text [b m d])."""
  rng = np.random.default_rng(1)
  x = rng.standard_normal((2, FRAMES, HEIGHT, WIDTH, 16), np.float32)
  text = rng.standard_normal((2, TEXT, 32), np.float32)
  text[:, 20:] = 0  # as after a prompt of 20 tokens
  return x, text


def theirs(model, x, timestep, text):
  with torch.no_grad():
    out = model(
      hidden_states=torch.from_numpy(x).permute(0, 4, 1, 2, 3),
      timestep=torch.from_numpy(timestep),
      encoder_hidden_states=torch.from_numpy(text),
    ).sample
  return out.permute(0, 2, 3, 4, 1).numpy()


def ours(path, chunk_frames, x, t, text):
  cfg, params = importing.load_dit(path)
  cfg = dataclasses.replace(cfg, chunk_frames=chunk_frames)
  run = jax.jit(denoiser.make(cfg).parallel)
  return np.asarray(run(params, *map(jnp.asarray, (x, t, text))))


def error(a, b):
  return np.abs(a - b).max() / np.abs(b).max()


def test_one_chunk_is_wan(wan, inputs):
  model, path = wan
  x, text = inputs
  t = np.array([[0.731], [0.05]], np.float32)
  want = theirs(model, x, 1000 * t[:, 0], text)
  got = ours(path, FRAMES, x, t, text)
  assert np.abs(want).max() > 0.1
  assert error(got, want) < CLOSE


@pytest.fixture
def causal(wan):
  """diffusers' model, whose self-attention sees no later frame."""
  model, _ = wan
  tokens = HEIGHT * WIDTH // 4
  frame = torch.arange(FRAMES * tokens) // tokens
  sees = frame[:, None] >= frame[None, :]
  kept = [block.attn1.forward for block in model.blocks]

  def masked(forward):
    return lambda x, text, mask, turns: forward(x, text, sees, turns)

  for block, forward in zip(model.blocks, kept, strict=True):
    block.attn1.forward = masked(forward)
  yield model
  for block, forward in zip(model.blocks, kept, strict=True):
    block.attn1.forward = forward


def test_every_chunk_has_its_own_level(wan, causal, inputs):
  """Against diffusers' timestep of each token, under our mask."""
  x, text = inputs
  t = np.random.default_rng(2).uniform(size=(2, FRAMES)).astype(np.float32)
  each = np.repeat(1000 * t, HEIGHT * WIDTH // 4, axis=1)
  want = theirs(causal, x, each, text)
  assert error(ours(wan[1], 1, x, t, text), want) < CLOSE
  # It was the mask, and the levels, that made them equal.
  one = np.repeat(t[:, :1], FRAMES, 1)
  assert error(ours(wan[1], FRAMES, x, t[:, :1], text), want) > 0.01
  assert error(ours(wan[1], 1, x, one, text), want) > 0.01


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """A tiny original Wan, imported and exported again."""
  root = tmp_path_factory.mktemp("exported")
  tiny.run(root / "tiny", "original")
  importing.run(root / "tiny", root / "ckpt")
  exporting.run(root / "ckpt", root / "out")
  return root / "out"


def loaded(cls, path):
  """A model of a library, and that nothing was missing or left over."""
  model, info = cls.from_pretrained(
    path, torch_dtype="auto", output_loading_info=True
  )
  assert not any(info.values()), info
  return model


@pytest.mark.parametrize(
  ("library", "name", "component"),
  [
    (diffusers, "WanTransformer3DModel", "dit"),
    (diffusers, "AutoencoderKLWan", "vae"),
    (transformers, "UMT5EncoderModel", "text"),
  ],
)
def test_the_libraries_load_what_is_exported(
  exported, library, name, component
):
  folder = exported / exporting.FOLDERS[component]
  state = loaded(getattr(library, name), folder).state_dict()
  for key, want in tiny.weights(component, "diffusers", 0).items():
    got = state[key].float().numpy()
    if component == "text":
      want = want.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(got, want.astype(np.float32))


def test_what_the_libraries_save_is_imported(exported, tmp_path):
  for cls, name in (
    (diffusers.AutoencoderKLWan, "vae"),
    (transformers.UMT5EncoderModel, "text"),
  ):
    folder = exported / exporting.FOLDERS[name]
    cls.from_pretrained(folder).save_pretrained(tmp_path / name)
    again, found = importing.read(sources.find(tmp_path / name)[0])
    cfg, leaves = importing.read(sources.find(folder)[0])
    assert dataclasses.replace(again, dtype=cfg.dtype) == cfg
    for path, leaf in leaves.items():
      np.testing.assert_array_equal(
        found[path].read().astype(leaf.dtype), leaf.read()
      )


@pytest.mark.parametrize("component", ["dit", "vae"])
def test_diffusers_has_the_same_map_of_names(component):
  from diffusers.loaders import single_file_utils

  convert = {
    "dit": single_file_utils.convert_wan_transformer_to_diffusers,
    "vae": single_file_utils.convert_wan_vae_to_diffusers,
  }[component]
  cfg, names, _ = sources.NAMES[component]
  tensors = names(cfg())
  marks = {t.original: torch.tensor(i) for i, t in enumerate(tensors)}
  converted = {name: int(i) for name, i in convert(marks).items()}
  assert converted == {t.diffusers: i for i, t in enumerate(tensors)}


def test_torch_reads_what_is_written_without_it(tmp_path):
  tree = {
    "a": {"x": np.arange(6, dtype=np.float32).reshape(2, 3)},
    "b": np.ones((3, 1, 2), ml_dtypes.bfloat16),
    "c": np.array(7, np.float32),
  }
  writers.write_torch(tmp_path / "t.pth", tree)
  got = torch.load(tmp_path / "t.pth", weights_only=True)
  np.testing.assert_array_equal(got["a"]["x"].numpy(), tree["a"]["x"])
  assert got["b"].dtype == torch.bfloat16
  assert got["b"].shape == (3, 1, 2)
  assert got["b"].float().sum() == 6
  assert got["c"].item() == 7


def test_what_torch_writes_is_read(tmp_path):
  base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
  module = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
  saved = {
    "whole": base,
    "turned": base.permute(2, 0, 1),
    "part": base[1, 1:, ::2],
    "parameter": torch.nn.Parameter(base[0]),
    "half": base.half(),
    "scalar": base.sum(),
    "empty": torch.zeros(0, 3),
    "inner": module.state_dict(),
    "step": 7,
  }
  torch.save(saved, tmp_path / "t.pt")
  read = readers.read(tmp_path / "t.pt")
  inner = {f"inner.{k}": v for k, v in read.pop("inner").items()}
  wanted = {f"inner.{k}": v for k, v in saved.pop("inner").items()}
  assert read.pop("step") == saved.pop("step")
  for name, want in (saved | wanted).items():
    got = (read | inner)[name].view()
    assert str(want.dtype) == f"torch.{got.dtype}", name
    np.testing.assert_array_equal(
      got.astype(np.float32), want.detach().float().numpy()
    )


@pytest.mark.parametrize(
  ("saved", "kwargs", "words"),
  [
    (lambda: {"m": torch.nn.Linear(2, 2)}, {}, "wants to run torch.nn"),
    (lambda: {"m": torch.zeros(2).to(torch.float8_e4m3fn)}, {}, "8-bit"),
    (
      lambda: {"m": torch.zeros(2)},
      {"_use_new_zipfile_serialization": False},
      "an old torch file",
    ),
    (lambda: [torch.zeros(2)], {}, "no state dict"),
  ],
)
def test_other_torch_files_are_refused(tmp_path, saved, kwargs, words):
  torch.save(saved(), tmp_path / "t.pt", **kwargs)
  with pytest.raises(UserError, match=words):
    sources.find(tmp_path / "t.pt")


def test_a_sharded_training_run_of_self_forcing_is_read(wan, tmp_path):
  """As its trainer saves it: wrapped, float32, no average yet."""
  model, path = wan
  cfg, tensors = importing.read(sources.find(path)[0])
  state = model.state_dict()
  original = {
    "model._fsdp_wrapped_module." + t.original.replace(
      f"blocks.{t.layer}.", f"blocks.{t.layer}._fsdp_wrapped_module."
    ): state[t.diffusers]
    for t in dit_names.tensors(cfg)
  }  # fmt: skip
  torch.save({"generator": original, "generator_ema": None}, tmp_path / "m.pt")
  (tmp_path / "config.json").write_text(
    json.dumps({"_class_name": "WanModel", "num_heads": 2})
  )
  again, found = importing.read(sources.find(tmp_path / "m.pt")[0])
  assert again == cfg
  for name, leaf in tensors.items():
    np.testing.assert_array_equal(found[name].read(), leaf.read())
