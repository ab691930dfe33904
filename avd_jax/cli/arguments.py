"""Values of arguments that are wrong before anything is computed."""

import argparse
import math
from pathlib import Path

from avd_jax.errors import UserError


def positive_number(text: str) -> float:
  """A finite number above 0, as a type of argparse.

  Raises:
    argparse.ArgumentTypeError: it is none.
  """
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not 0 < value < math.inf:
    raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
  return value


def check_file(option: str, file: str | None) -> None:
  """Refuses a file that could not be written.

  Args:
    option: that names it.
    file: its path; None is none.

  Raises:
    UserError: its directory does not exist, or it is one itself.
  """
  if file is None:
    return
  path = Path(file)
  if path.is_dir():
    raise UserError(f"{option} {file}: this is a directory; name a file")
  if not path.parent.is_dir():
    raise UserError(f"{option} {file}: there is no directory {path.parent}")
