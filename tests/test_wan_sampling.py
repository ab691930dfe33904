"""A tiny Wan from its files to frames: prompt, latents, pixels."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax import sampling
from avd_jax.errors import UserError
from avd_jax.models import umt5, vae
from avd_jax.training import loop
from avd_jax.wan import importing, tiny, tokenizer, trees

pytest.importorskip("tokenizers")
pytest.importorskip("ftfy")

LENGTH = 512  # of a prompt, in tokens


def embed(wan_ckpt, prompts):
  """What the transformer is told: embeddings [b m d]."""
  cfg, params = importing.load_text_encoder(wan_ckpt)
  prompts = [tokenizer.clean(prompt) for prompt in prompts]
  ids, lengths = tokenizer.load(wan_ckpt).encode(prompts, LENGTH)
  return np.asarray(umt5.encode(params, cfg, ids, lengths), np.float32)


def test_a_prompt_becomes_a_video(wan_ckpt):
  text = embed(wan_ckpt, ["a red ball", "a  blue ball &amp; a wall"])
  assert text.shape == (2, LENGTH, tiny.TEXT.dim)
  assert np.abs(text[0] - text[1]).max() > 1e-3
  options = ("steps=1", "segment=1", "guidance=2.0")
  sampler = sampling.load(
    wan_ckpt,
    [f"--config.sampling.{option}" for option in options],
  )
  start = np.zeros((2, 0, 4, 6, 16), np.float32)
  with pytest.raises(UserError, match="needs null_text"):
    sampler.extend(start, text, 6)
  null = embed(wan_ckpt, [""])[0]
  sampler = dataclasses.replace(sampler, null_text=null)
  latents = sampler.extend(start, text, 6)
  assert latents.shape == (2, 6, 4, 6, 16)
  assert np.isfinite(latents).all()
  assert np.abs(latents[0] - latents[1]).max() > 1e-3  # the prompt is heard
  cfg, params = importing.load_vae(wan_ckpt)
  video = np.asarray(vae.decode(cfg, params, jnp.asarray(latents[:1])))
  assert video.shape == (1, 21, 32, 48, 3)
  assert np.abs(video).max() <= 1


def test_an_import_is_no_run_to_go_on_with(wan_ckpt):
  """Training there would begin at random, over its weights."""
  config = sampling.load(wan_ckpt).config
  with pytest.raises(UserError, match=r"imported weights.*init_from"):
    loop._claim(wan_ckpt, config, {"config": {}, "imported": "x"})


def dead(*args):
  raise KeyboardInterrupt


def test_what_is_no_whole_import_is_told_what_to_do(
  wan_ckpt, tmp_path, monkeypatch
):
  files, half = tmp_path / "files", tmp_path / "half"
  tiny.run(files)
  for place in (files, files / "diffusion_pytorch_model.safetensors"):
    with pytest.raises(
      UserError, match=f"first avd import-wan --source {place}"
    ):
      sampling.read_config(place)
  with monkeypatch.context() as patch:
    patch.setattr(trees, "_write", dead)
    with pytest.raises(KeyboardInterrupt):
      importing.run(files, half)
  with pytest.raises(UserError, match=f"not finished: .* --out {half} again"):
    sampling.read_config(half)
  alone = tmp_path / "alone"
  importing.run(files, alone, "vae")
  with pytest.raises(UserError, match=r"no transformer: .* --component dit"):
    sampling.load(alone)
  # The file with the values, not those that say where they are.
  largest = max((alone / "vae").rglob("d/*"), key=lambda p: p.stat().st_size)
  largest.write_bytes(bytes(largest.stat().st_size))
  with pytest.raises(UserError, match=r"vae/params cannot be read") as error:
    importing.load_vae(alone)
  assert "bound method" not in str(error.value)
  assert "tensorstore_spec" not in str(error.value)
  (alone / "vae" / "config.json").unlink()
  with pytest.raises(UserError, match=r"import it again, .* --component vae"):
    importing.load_vae(alone)
