"""What two kinds of stores share: a store.json that says what all records are.

Whoever comes first writes it; all others must want the same.
"""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from avd_jax import disk
from avd_jax.errors import UserError

T = TypeVar("T")
NAME = "store.json"


def read(path: str | Path, cls: type[T], what: str, remedy: str = "") -> T:
  """What a store holds.

  Args:
    path: the store's directory.
    cls: a dataclass with the fields `shape` and others.
    what: of which it should be a store.
    remedy: what to do where there is none.

  Raises:
    UserError: no store there, or one of something else.
  """
  file = Path(path) / NAME
  missing = f"{path}: no store of {what} (no {NAME}){remedy and '; ' + remedy}"
  values = disk.read_json(file, missing)
  try:
    return cls(**(values | {"shape": tuple(values["shape"])}))
  except (TypeError, KeyError) as error:
    raise UserError(f"{file} does not describe {what}: {error}") from None


def create(path: str | Path, wanted: Any) -> None:
  """Writes what a store will hold, unless somebody has."""
  disk.create_json(Path(path) / NAME, dataclasses.asdict(wanted))


def check_same(path: str | Path, found: Any, wanted: Any) -> None:
  """Refuses to add to a store what it does not hold.

  Raises:
    UserError: naming every field that differs.
  """
  different = [
    f"{field.name} {getattr(found, field.name)!r}, not"
    f" {getattr(wanted, field.name)!r}"
    for field in dataclasses.fields(wanted)
    if getattr(found, field.name) != getattr(wanted, field.name)
  ]
  if different:
    raise UserError(
      f"{path} was begun with {'; '.join(different)}; repeat its settings or"
      " use another directory"
    )
