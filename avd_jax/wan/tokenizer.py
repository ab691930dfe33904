"""Prompts to umT5's tokens, as Wan does it: cleaned, cut, ended, padded.

The tokenizer that is shipped with the weights is used as it is. Rebuilding one
from its sentencepiece model can lose byte_fallback, without which what the
vocabulary does not know becomes one unknown token instead of its bytes.
"""

import collections
import dataclasses
import html
import importlib
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import Int32

from avd_jax.errors import UserError

Pieces = list[tuple[str, float]]

PAD, EOS, UNKNOWN = 0, 1, 2
_SPECIAL = ("<pad>", "</s>", "<unk>")
_FILES = ("tokenizer.json", "spiece.model")
# What tiny tokenizers are made from; every letter occurs.
_TINY_TEXT = (
  "a red ball bounces over a green field and then it rolls under the table.",
  "two blue boats move slowly past the old bridge in the morning light.",
  "the camera follows a quick brown fox, which jumps over the lazy dog.",
  "a woman with a yellow umbrella walks through the rain at night.",
  "an extreme close up of a cat that plays with a ball of white wool.",
)


def _library(name: str) -> ModuleType:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise UserError(
      f"{name} is missing: Wan's text needs the extra wan: pip install"
      " 'avd_jax[wan]'"
    ) from error


def clean(prompt: str) -> str:
  """A prompt as Wan cleans it, in training and in sampling.

  Broken encodings are mended, HTML entities read (twice: prompts from the web
  hold doubly escaped ones), and white space squeezed to single spaces.

  Raises:
    UserError: the extra wan is not installed.
  """
  fixed = _library("ftfy").fix_text(prompt)
  return re.sub(r"\s+", " ", html.unescape(html.unescape(fixed))).strip()


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A loaded tokenizer.

  Attributes:
    ids: tokens of a prompt, EOS at the end, however many they are.
    vocab_size: all ids lie below it.
  """

  ids: Callable[[str], list[int]]
  vocab_size: int

  def encode(
    self, prompts: Sequence[str], length: int = 512
  ) -> tuple[Int32[np.ndarray, "b m"], Int32[np.ndarray, "b"]]:
    """Tokens of prompts, which should have gone through `clean`.

    Of a prompt that is too long the end is cut, keeping EOS; a warning says how
    much, once for each such prompt.

    Returns:
      (tokens [b length], PAD behind EOS; lengths [b], EOS included).

    Raises:
      UserError: `length` leaves no room for EOS.
    """
    if length < 1:
      raise UserError(f"text length {length}: give at least 1 token")
    tokens = np.full((len(prompts), length), PAD, np.int32)
    lengths = np.zeros(len(prompts), np.int32)
    for i, prompt in enumerate(prompts):
      ids = self.ids(prompt)
      if len(ids) > length:
        warnings.warn(
          f"prompt {_short(prompt)!r}: {len(ids)} tokens do not fit"
          f" {length}, the last {len(ids) - length} are cut",
          stacklevel=2,
        )
        ids = [*ids[: length - 1], EOS]
      tokens[i, : len(ids)] = ids
      lengths[i] = len(ids)
    return tokens, lengths


def _short(prompt: str) -> str:
  return prompt if len(prompt) <= 60 else prompt[:57] + "..."


def load(path: str | os.PathLike) -> Tokenizer:
  """The tokenizer in a file, or in a directory.

  Args:
    path: a tokenizer.json, a sentencepiece model, or the directory of one;
      tokenizer.json is preferred.

  Raises:
    UserError: there is none, it is damaged or not umT5's, or the extra wan is
      not installed.
  """
  path = _find(Path(path))
  read = _read_json if path.suffix == ".json" else _read_sentencepiece
  return read(path)


def _find(path: Path) -> Path:
  if path.is_file():
    return path
  for name in _FILES:
    if (path / name).is_file():
      return path / name
  raise UserError(
    f"no tokenizer at {path}: give a tokenizer.json, a sentencepiece model"
    " (spiece.model) or a directory that holds one"
  )


def _read_json(path: Path) -> Tokenizer:
  tokenizers = _library("tokenizers")
  try:
    loaded = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises no narrower type
    raise _damaged(path, error) from error
  # Files may bring their own; what was cut could not be counted.
  loaded.no_truncation()
  loaded.no_padding()
  _check_special(path, [loaded.id_to_token(i) for i in (PAD, EOS)])
  ids = lambda prompt: loaded.encode(prompt).ids
  if ids("")[-1:] != [EOS]:
    raise UserError(
      f"tokenizer {path} does not end prompts with {_SPECIAL[EOS]}: give umT5's"
    )
  return Tokenizer(ids, loaded.get_vocab_size())


def _read_sentencepiece(path: Path) -> Tokenizer:
  sentencepiece = _library("sentencepiece")
  try:
    loaded = sentencepiece.SentencePieceProcessor(model_file=str(path))
  except (OSError, RuntimeError) as error:
    raise _damaged(path, error) from error
  _check_special(path, [loaded.id_to_piece(i) for i in (PAD, EOS)])
  ids = lambda prompt: [*loaded.encode(prompt), EOS]
  return Tokenizer(ids, loaded.get_piece_size())


def _damaged(path: Path, error: Exception) -> UserError:
  reason = str(error).splitlines()[0]
  return UserError(f"tokenizer {path} cannot be read: {reason}")


def _check_special(path: Path, found: Sequence[str | None]) -> None:
  if tuple(found) != _SPECIAL[: len(found)]:
    raise UserError(
      f"tokenizer {path} is not umT5's: its first tokens are {found}, not"
      f" {list(_SPECIAL[: len(found)])}"
    )


def make_tiny(path: str | os.PathLike, vocab_size: int) -> None:
  """Writes a small real tokenizer.json, in the layout of umT5's.

  Special tokens, the 256 bytes, then letters and frequent pieces of a few
  English sentences; everything else becomes bytes. The same file every time,
  which pieces from the library's trainer are not.

  Args:
    path: of the file; its directory is made.
    vocab_size: tokens in all.

  Raises:
    UserError: a size that bytes and letters exceed or that the sentences cannot
      fill, or the extra wan is not installed.
  """
  tokenizers = _library("tokenizers")
  certain = [(token, 0.0) for token in _SPECIAL]
  certain += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
  letters, pieces = _tiny_pieces()
  least = len(certain) + len(letters)
  if not least <= vocab_size <= least + len(pieces):
    raise UserError(
      f"tiny vocab_size {vocab_size}: give {least} to {least + len(pieces)}"
    )
  vocabulary = [*certain, *letters, *pieces][:vocab_size]
  tiny = tokenizers.Tokenizer(
    tokenizers.models.Unigram(vocabulary, UNKNOWN, byte_fallback=True)
  )
  tiny.normalizer = tokenizers.normalizers.NFKC()
  tiny.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  tiny.post_processor = tokenizers.processors.TemplateProcessing(
    single=f"$A {_SPECIAL[EOS]}", special_tokens=[(_SPECIAL[EOS], EOS)]
  )
  tiny.add_special_tokens(list(_SPECIAL))
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  tiny.save(str(path))


def _tiny_pieces() -> tuple[Pieces, Pieces]:
  """Letters, and longer pieces most useful first; each with its log share."""
  seen = collections.Counter()
  for word in " ".join(_TINY_TEXT).split():
    word = f"▁{word}"
    ends = range(1, len(word) + 1)
    seen.update(word[i:j] for j in ends for i in range(j))
  useful = sorted(seen, key=lambda piece: (-seen[piece] * len(piece), piece))
  scored = [(p, math.log(seen[p] / seen.total())) for p in useful]
  letters = [(p, score) for p, score in scored if len(p) == 1]
  return letters, [(p, score) for p, score in scored if len(p) > 1]
