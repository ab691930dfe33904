"""Prompt to frames: torch's numbers all along the chain, in float32.

On one side transformers' tokenizer and umT5, diffusers' transformer under a
plain loop of Euler steps, and its VAE, on the files of a tiny Wan; on the other
our sampler, on what was imported from the same files.
"""

import dataclasses
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("ftfy")

from avd_jax import sampling  # noqa: E402
from avd_jax.models import umt5  # noqa: E402
from avd_jax.sampling import spaces  # noqa: E402
from avd_jax.wan import importing, tokenizer  # noqa: E402

PROMPTS = ("a red ball bounces over a wall", "blurry, still")  # and a negative
TEXT = 512  # tokens
STEPS, SHIFT, GUIDANCE = 4, 5.0, 5.0
FRAMES, HEIGHT, WIDTH = 3, 4, 6  # latents
SEED = 3
CLOSE = 1e-4  # of the largest value


@pytest.fixture(scope="module")
def files(wan_ckpt):
  """The files that `wan_ckpt` was imported from, in diffusers' layout."""
  torch.set_num_threads(1)
  return wan_ckpt.parent / "files"


def noise():
  """Where both start: what our sampler draws for the first chunk."""
  key = jax.random.fold_in(jax.random.key(SEED), 0)
  return jax.random.normal(key, (1, FRAMES, HEIGHT, WIDTH, 16))


def turned(x):
  """[b f h w c] to torch's [b c f h w]."""
  return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def their_text(files):
  """Embeddings [2 m d], zeroed past each prompt."""
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(files / "tokenizer" / "tokenizer.json"),
    pad_token="<pad>",
  )
  tokens = fast(
    list(PROMPTS), padding="max_length", max_length=TEXT, return_tensors="pt"
  )
  encoder = transformers.UMT5EncoderModel.from_pretrained(
    files / "text_encoder", dtype=torch.float32
  )
  seen = tokens.attention_mask
  out = encoder(tokens.input_ids, attention_mask=seen).last_hidden_state
  return out * seen[..., None]


def their_latents(files, text):
  """Euler's steps down the shifted levels, guided."""
  model = diffusers.WanTransformer3DModel.from_pretrained(files / "transformer")
  levels = torch.linspace(1, 0, STEPS + 1)
  levels = SHIFT * levels / (1 + (SHIFT - 1) * levels)
  x = turned(noise())
  for t, t_next in itertools.pairwise(levels):
    both = model(torch.cat([x, x]), (1000 * t).expand(2), text).sample
    full, null = both.chunk(2)
    x = x + (t_next - t) * (null + GUIDANCE * (full - null))
  return x


def their_frames(files, latents):
  """As Wan's pipeline in diffusers calls its VAE."""
  vae = diffusers.AutoencoderKLWan.from_pretrained(files / "vae")
  mean, std = (
    torch.tensor(values)[:, None, None, None]
    for values in (vae.config.latents_mean, vae.config.latents_std)
  )
  return vae.decode(latents * std + mean).sample


def theirs(files):
  """(embeddings, latents, frames), arranged as ours."""
  with torch.no_grad():
    text = their_text(files)
    latents = their_latents(files, text)
    frames = their_frames(files, latents)
  ours = lambda x: np.moveaxis(x.numpy(), 1, -1)
  return text.numpy(), ours(latents), ours(frames)


def our_text(wan_ckpt):
  cfg, params = importing.load_text_encoder(wan_ckpt)
  cfg = dataclasses.replace(cfg, dtype="float32")
  params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  prompts = [tokenizer.clean(prompt) for prompt in PROMPTS]
  tokens = tokenizer.load(wan_ckpt).encode(prompts, TEXT)
  return np.asarray(umt5.encode(params, cfg, *tokens))


def ours(wan_ckpt):
  """(embeddings, latents, frames): all of the video one chunk."""
  options = {
    "model.dtype": "float32",
    "model.chunk_frames": FRAMES,
    "sampling.steps": STEPS,
    "sampling.shift": SHIFT,
    "sampling.guidance": GUIDANCE,
  }
  sampler = sampling.load(
    wan_ckpt, [f"--config.{name}={value}" for name, value in options.items()]
  )
  text = our_text(wan_ckpt)
  sampler = dataclasses.replace(sampler, null_text=text[1])
  start = np.zeros((1, 0, HEIGHT, WIDTH, 16), np.float32)
  latents = sampler.extend(start, text[:1], FRAMES, SEED)
  space = spaces.of(sampler.config, wan_ckpt, None)
  decode = space.decode(HEIGHT * 8, WIDTH * 8)
  frames = np.concatenate(decode(jnp.asarray(latents)))
  return text, latents, frames[None]


def test_a_prompt_becomes_the_frames_of_torch(files, wan_ckpt):
  found, wanted = ours(wan_ckpt), theirs(files)
  names = ("embeddings", "latents", "frames")
  errors = {}
  for name, a, b in zip(names, found, wanted, strict=True):
    assert a.shape == b.shape, name
    errors[name] = np.abs(a - b).max() / np.abs(b).max()
  assert max(errors.values()) <= CLOSE, errors
  # The prompt was heard, and not all pixels are cut to [-1, 1].
  assert np.abs(wanted[1] - np.asarray(noise())).max() > 0.1
  assert (np.abs(wanted[2]) < 1).mean() > 0.05
