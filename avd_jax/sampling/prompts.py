"""Prompts in time: what is said, and from which second on."""

import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from avd_jax.errors import UserError

_TIMED = re.compile(r"(.*)@(\d+(?:\.\d+)?)s", re.DOTALL)


class Prompt(NamedTuple):
  """A text, and the second of the video from which it holds."""

  at: float
  text: str


def parse(arguments: Sequence[str]) -> list[Prompt]:
  """Prompts as they are given on a command line: "a boat", "a storm@5s".

  Raises:
    UserError: the first is not at 0 s, or times do not increase.
  """
  prompts = []
  for i, argument in enumerate(arguments):
    timed = _TIMED.fullmatch(argument)
    if timed is not None:
      prompts.append(Prompt(float(timed[2]), timed[1]))
    elif i == 0:
      prompts.append(Prompt(0.0, argument))
    else:
      raise UserError(
        f"prompt {argument!r} is not the first: say from when it holds,"
        f' "{argument}@5s"'
      )
  return _checked(prompts)


def read(file: str | Path) -> list[Prompt]:
  """Prompts from a file: JSON, a list of {"at": seconds, "prompt": text}.

  Raises:
    UserError: no such file, not such a list, or as `parse`.
  """
  try:
    entries = json.loads(Path(file).read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"--prompts {file}: no such file") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(f"--prompts {file}: not valid JSON: {error}") from None
  wanted = f'--prompts {file}: give a list of {{"at": seconds, "prompt": text}}'
  if not isinstance(entries, list) or not entries:
    raise UserError(wanted)
  for entry in entries:
    whole = isinstance(entry, dict) and set(entry) == {"at", "prompt"}
    if not whole or not isinstance(entry["prompt"], str):
      raise UserError(f"{wanted}, not {entry!r}")
    at = entry["at"]
    if isinstance(at, bool) or not isinstance(at, int | float):
      raise UserError(f"{wanted}, not {entry!r}")
  return _checked([Prompt(float(e["at"]), e["prompt"]) for e in entries])


def _checked(prompts: list[Prompt]) -> list[Prompt]:
  if prompts and prompts[0].at != 0:
    raise UserError(
      f"the first prompt is at {prompts[0].at:g} s: it must be at 0 s"
    )
  for before, after in itertools.pairwise(prompts):
    if not before.at < after.at < math.inf:
      raise UserError(
        f"a prompt at {after.at:g} s follows one at {before.at:g} s: times must"
        " increase"
      )
  return prompts


def starts(
  prompts: Sequence[Prompt], begins: Callable[[int], float], chunks: int
) -> tuple[int, ...]:
  """The chunk from which each prompt holds: the first that begins at its time
  or later.

  Args:
    prompts: at least one.
    begins: the second at which a chunk begins.
    chunks: of the video.

  Raises:
    UserError: a prompt that no chunk would hear.
  """
  found = []
  for prompt in prompts:
    later = (i for i in range(chunks) if begins(i) >= prompt.at - 1e-6)
    first = next(later, None)
    if first is None:
      raise UserError(
        f"the prompt at {prompt.at:g} s comes too late: the last chunk begins"
        f" at {begins(chunks - 1):g} s"
      )
    if first in found:
      raise UserError(
        f"the prompt at {prompt.at:g} s begins with the same chunk as the one"
        f" before it: chunks begin {begins(1) - begins(0):g} s apart or more"
      )
    found.append(first)
  return tuple(found)
