"""Prompts to what the transformer is told, with umT5 in memory only meanwhile.

The encoder of Wan2.1 is larger than its small transformer: what is encoded
before a long run is encoded first, and the encoder let go.
"""

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from avd_jax.data import latent_store
from avd_jax.errors import UserError
from avd_jax.models import umt5
from avd_jax.models.umt5 import UMT5Config
from avd_jax.typing import Params
from avd_jax.wan import importing, tokenizer


def check(
  checkpoint: str | Path,
  prompts: Sequence[str],
  length: int,
  cut: bool = False,
) -> list[str]:
  """Refuses prompts that cannot be encoded; no weights are read.

  Args:
    checkpoint: what `importing.run` wrote.
    prompts: texts.
    length: tokens that a prompt may have, its end among them.
    cut: whether longer ones may be cut.

  Returns:
    A line for each that will be, with how many tokens it loses.

  Raises:
    UserError: no text encoder or tokenizer there, the extra wan is missing, or
      a prompt that is too long.
  """
  importing.component(checkpoint, "text")
  tokens = tokenizer.load(checkpoint)
  notes = []
  for prompt in dict.fromkeys(prompts):
    count = len(tokens.ids(tokenizer.clean(prompt)))
    notes += check_length(prompt, count, length, cut)
  return notes


def check_length(
  prompt: str, count: int, length: int, cut: bool, unit: str = "tokens"
) -> list[str]:
  """What is to be said of a prompt of `count` tokens where `length` fit.

  Raises:
    UserError: it is too long, and may not be cut.
  """
  if count <= length:
    return []
  shown = prompt if len(prompt) <= 60 else f"{prompt[:57]}..."
  line = (
    f"prompt {shown!r}: it has {count} {unit}, at most {length} fit:"
    f" {count - length}"
  )
  if not cut:
    raise UserError(f"{line} would be cut; shorten it, or --cut-prompts")
  return [f"{line} are cut"]


class TextEncoder:
  """umT5 of a checkpoint: captions of a store and a sampler's prompts alike.

  Weights and tokenizer are loaded when first needed, and stay until this object
  is let go.

  Args:
    checkpoint: what `importing.run` wrote.
    length: tokens that a prompt may have, its end among them.
  """

  def __init__(self, checkpoint: str | Path, length: int):
    self._checkpoint, self._length = checkpoint, length

  @functools.cached_property
  def weights(self) -> tuple[UMT5Config, Params]:
    """(sizes, parameters)."""
    return importing.load_text_encoder(self._checkpoint)

  @functools.cached_property
  def _tokenizer(self) -> tokenizer.Tokenizer:
    return tokenizer.load(self._checkpoint)

  @functools.cached_property
  def _encode(self):
    return jax.jit(umt5.encode, static_argnums=1)

  def __call__(self, prompt: str) -> tuple[np.ndarray, int]:
    """(embedding [tokens d] bfloat16 up to the prompt's end, tokens cut)."""
    prompt = tokenizer.clean(prompt)
    cut = max(0, len(self._tokenizer.ids(prompt)) - self._length)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # what was cut is told to the caller
      ids, lengths = self._tokenizer.encode([prompt], self._length)
    cfg, params = self.weights
    out = np.asarray(self._encode(params, cfg, ids, lengths)[0])
    return out.astype(latent_store.DTYPE)[: lengths[0]], cut


def embed(
  checkpoint: str | Path, prompts: Sequence[str], length: int
) -> Float[np.ndarray, "n m d"]:
  """Embeddings of prompts, float32, zeros behind each prompt's end.

  What is too long is cut; ask `check` first, which says so without weights.

  Args:
    checkpoint: what `importing.run` wrote.
    prompts: texts.
    length: tokens that a prompt may have, its end among them.

  Raises:
    UserError: no text encoder or tokenizer there, or the extra wan is missing.
  """
  encoder = TextEncoder(checkpoint, length)
  found = {prompt: encoder(prompt)[0] for prompt in dict.fromkeys(prompts)}
  out = np.zeros((len(prompts), length, encoder.weights[0].dim), np.float32)
  for row, prompt in zip(out, prompts, strict=True):
    row[: len(found[prompt])] = found[prompt]
  return out
