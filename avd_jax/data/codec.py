"""Codecs: between the pixels that people see and what a model is trained on."""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np

from avd_jax.errors import UserError


@runtime_checkable
class Codec(Protocol):
  """Pixels to latents and back.

  Several frames of pixels may become one latent frame, so what is done to
  frames (reversing them) is done to pixels.

  Attributes:
    name: as in `bagger.codec` and in the stores that hold its latents.
    encode: pixels [b F H W 3] in [-1, 1] -> latents [b f h w c], float32.
    decode: the way back, to the F pixel frames of these f latent frames.
  """

  @property
  def name(self) -> str: ...

  def encode(self, pixels: np.ndarray) -> np.ndarray: ...

  def decode(self, latents: np.ndarray) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Pixels:
  """The codec of models that are trained on pixels: nothing happens."""

  name: str = "pixels"

  def encode(self, pixels: np.ndarray) -> np.ndarray:
    """Gives back what it is given."""
    return pixels

  def decode(self, latents: np.ndarray) -> np.ndarray:
    """Gives back what it is given."""
    return latents


PIXELS = Pixels()
# By name, made when asked for: a codec may have weights to load. Wan's, whose
# files this room knows nothing of, is wan.codec.Encoder.
CODECS: dict[str, Callable[[], Codec]] = {PIXELS.name: lambda: PIXELS}


def codec(name: str) -> Codec:
  """The codec of that name.

  Raises:
    UserError: there is none.
  """
  if name not in CODECS:
    known = ", ".join(sorted(CODECS))
    raise UserError(f"codec {name!r}: give one of {known}, or wan:CKPT")
  return CODECS[name]()
