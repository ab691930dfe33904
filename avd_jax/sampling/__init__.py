"""Sampling: videos of any length from a trained model, and into files."""

from avd_jax.sampling.loading import (
  CHANGEABLE,
  check,
  load,
  read_config,
)
from avd_jax.sampling.sampler import Sampler
from avd_jax.sampling.texts import Texts

__all__ = [
  "CHANGEABLE",
  "Sampler",
  "Texts",
  "check",
  "load",
  "read_config",
]
