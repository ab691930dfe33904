"""Captions of reversed videos: a template, a file, or a user's function."""

import importlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from avd_jax import disk
from avd_jax.algorithms import bagger
from avd_jax.data import captions as captions_lib
from avd_jax.errors import UserError

# What it gives is looked at in `apply`: it may be a user's program.
Rewrite = Callable[[str], Any]


def make(setting: str) -> Rewrite:
  """What rewrites captions.

  Args:
    setting: "" for the template of algorithms.bagger; a .json file of {caption:
      rewritten caption}; or "module:function", of a caption, giving its
      rewritten form.

  Raises:
    UserError: no such file, module or function, or a file of something else.
  """
  if not setting:
    return bagger.rewrite
  if setting.endswith(".json"):
    return _from_file(setting)
  return _from_function(setting)


def _from_file(setting: str) -> Rewrite:
  pairs = disk.read_json(Path(setting))
  if not isinstance(pairs, dict) or not all(
    isinstance(text, str) for text in pairs.values()
  ):
    raise UserError(
      f"bagger.prompts {setting}: give an object of {{caption: rewritten}},"
      " both text"
    )

  def rewrite(caption: str) -> str:
    if caption in pairs:
      return pairs[caption]
    # A video without caption needs none when reversed.
    if not caption:
      return caption
    raise UserError(
      f"bagger.prompts {setting} lacks the caption {json.dumps(caption)}"
    )

  return rewrite


def _from_function(setting: str) -> Rewrite:
  module, _, name = setting.partition(":")
  if not module or not name:
    raise UserError(
      f"bagger.prompts {setting!r}: give '', a .json file or module:function"
    )
  try:
    function = getattr(importlib.import_module(module), name)
  except Exception as error:  # a user's program: anything may be wrong in it
    raise UserError(f"bagger.prompts {setting}: {error}") from error
  if not callable(function):
    raise UserError(f"bagger.prompts {setting}: not a function")

  def rewrite(caption: str) -> Any:
    try:
      return function(caption)
    except Exception as error:  # a user's program: anything may be wrong in it
      kind = type(error).__name__
      raise UserError(
        f"bagger.prompts {setting} failed on {caption!r}: {kind}: {error}"
      ) from error

  return rewrite


def apply(rewrite: Rewrite, caption: str, length: int | None) -> str:
  """The rewritten caption.

  Args:
    rewrite: as `make` gives it.
    caption: of the video before it was reversed.
    length: data.text_length, in bytes; None where captions become embeddings,
      whose encoder cuts them.

  Raises:
    UserError: there is none, it is not text, says nothing where the caption
      said something, or does not fit.
  """
  rewritten = rewrite(caption)
  if not isinstance(rewritten, str) or (caption and not rewritten):
    raise UserError(
      f"bagger.prompts made {rewritten!r} of {caption!r}; it must be text"
    )
  if length is None:
    return rewritten
  try:
    captions_lib.encode_bytes(rewritten, length)
  except UserError as error:
    raise UserError(
      f"{caption!r} rewritten for its reversal: {error}"
    ) from None
  return rewritten


def check(
  rewrite: Rewrite, captions: Iterable[str], length: int | None
) -> None:
  """Rewrites each of the captions, to see that it can be done.

  Raises:
    UserError: as `apply`.
  """
  for caption in sorted(set(captions)):
    apply(rewrite, caption, length)
