"""Captions as bytes: the tokens of models too small for a text encoder.

A token is a UTF-8 byte plus one, so that 0 is left for padding and the
vocabulary has 257 entries.
"""

import numpy as np

from avd_jax.errors import UserError

VOCABULARY = 257


def encode_bytes(caption: str, length: int) -> np.ndarray:
  """Encodes a caption as byte tokens.

  Args:
    caption: any text.
    length: number of tokens to return.

  Returns:
    int32 [length]: bytes plus one, padded with zeros.

  Raises:
    UserError: the caption has more than `length` bytes. It is not cut, since a
      caption cut in the middle says something else.
  """
  data = caption.encode()
  if len(data) > length:
    raise UserError(
      f"caption of {len(data)} bytes does not fit text_length={length}: "
      f"{caption[:60]!r}; shorten it or raise text_length"
    )
  tokens = np.zeros(length, np.int32)
  tokens[: len(data)] = np.frombuffer(data, np.uint8)
  tokens[: len(data)] += 1
  return tokens


def beginning(caption: str, length: int) -> str:
  """As much of a caption, from its start, as has at most `length` bytes."""
  return caption.encode()[:length].decode(errors="ignore")


def decode_bytes(tokens: np.ndarray) -> str:
  """Inverts `encode_bytes`; int [m] -> text, broken UTF-8 shown as U+FFFD."""
  tokens = np.asarray(tokens)
  data = (tokens[tokens > 0] - 1).astype(np.uint8)
  return data.tobytes().decode(errors="replace")
