"""A tiny Wan from its files to frames: prompt, latents, pixels."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax import sampling
from avd_jax.errors import UserError
from avd_jax.models import umt5, vae
from avd_jax.training import loop
from avd_jax.wan import importing, tiny, tokenizer

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
