"""Small files that others read: whole or not there at all.

Writing is to a part beside the file, then a rename: whoever looks, and however
the writer ends, sees the old content or the new.
"""

import json
import os
import uuid
from pathlib import Path
from typing import Any

from avd_jax.errors import UserError


def read_json(path: Path, missing: str = "") -> Any:
  """A JSON file.

  Args:
    path: of the file.
    missing: what to say where there is none.

  Raises:
    UserError: missing or not JSON.
  """
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise UserError(missing or f"{path} does not exist") from None
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise UserError(f"{path} is not valid JSON: {error}") from None


def write(path: Path, content: str | bytes, several: bool = False) -> None:
  """Writes a file, and makes it last.

  Args:
    path: of the file; its directory is made.
    content: all of it.
    several: other processes may be writing it too. Else a part that a killed
      process left behind is written over, and none stays.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(_own(path) if several else f"{path.name}.part")
  _fill(part, content)
  part.replace(path)


def write_json(path: Path, values: Any, several: bool = False) -> None:
  """As `write`, of values."""
  write(path, _text(values), several)


def create_json(path: Path, values: Any) -> bool:
  """Writes a JSON file unless there is one; whether it did.

  Of several processes that try at once, one does.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.exists():
    return False
  part = path.with_name(_own(path))
  _fill(part, _text(values))
  try:
    os.link(part, path)  # unlike a rename, it replaces nothing
  except FileExistsError:
    return False
  except OSError:  # a file system without links
    return _exclusive(path, _text(values))
  finally:
    part.unlink()
  return True


def _exclusive(path: Path, content: str) -> bool:
  try:
    with path.open("x") as file:
      file.write(content)
  except FileExistsError:
    return False
  return True


def _own(path: Path) -> str:
  # Not by process id: writers on several machines may have the same.
  return f"{path.name}.{uuid.uuid4().hex[:8]}.part"


def _text(values: Any) -> str:
  return json.dumps(values, indent=2) + "\n"


def _fill(part: Path, content: str | bytes) -> None:
  with part.open("wb") as file:
    file.write(content.encode() if isinstance(content, str) else content)
    file.flush()
    os.fsync(file.fileno())  # the name must not survive a crash without it
