"""Prompts to what the transformer is told, with umT5 in memory only meanwhile.

The encoder of Wan2.1 is larger than its small transformer: what is encoded
before a long run is encoded first, and the encoder let go.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from avd_jax.errors import UserError
from avd_jax.models import umt5
from avd_jax.wan import importing, tokenizer


def check(checkpoint: str | Path, prompts: Sequence[str], length: int) -> None:
  """Refuses prompts that cannot be encoded; no weights are read.

  Args:
    checkpoint: what `importing.run` wrote.
    prompts: texts.
    length: tokens that a prompt may have, its end among them.

  Raises:
    UserError: no text encoder or tokenizer there, the extra wan is missing, or
      a prompt that is too long.
  """
  importing.component(checkpoint, "text")
  tokens = tokenizer.load(checkpoint)
  for prompt in prompts:
    count = len(tokens.ids(tokenizer.clean(prompt)))
    if count > length:
      raise UserError(
        f"prompt {prompt[:57]!r}...: it has {count} tokens, at most {length}"
        " fit"
      )


def embed(
  checkpoint: str | Path, prompts: Sequence[str], length: int
) -> Float[np.ndarray, "n m d"]:
  """Embeddings of prompts, float32, zeros behind each prompt's end.

  Args and errors as `check`; there a prompt that is too long is refused, here
  its end is cut.
  """
  cfg, params = importing.load_text_encoder(checkpoint)
  tokens = tokenizer.load(checkpoint)
  encode = jax.jit(umt5.encode, static_argnums=1)

  @functools.cache
  def one(prompt: str) -> np.ndarray:
    ids, lengths = tokens.encode([tokenizer.clean(prompt)], length)
    return np.asarray(encode(params, cfg, ids, lengths)[0], np.float32)

  return np.stack([one(prompt) for prompt in prompts])
