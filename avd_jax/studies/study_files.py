"""Where a study's files lie, and how several processes share them.

  workdir/runs/<branch>-<digest>/seed_<i>/      a training, shared by studies
  workdir/<study>/rows/<row>-seed_<i>.json      what was measured
  workdir/<study>/analysis-seed_<i>.json        what else was looked at
  workdir/<study>/cost-<branch>-<digest>.json   ratio of two steps' costs
  workdir/<study>/<study>.{md,json,png}         the report

A file appears whole or not at all.
"""

import contextlib
import dataclasses
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from avd_jax import disk
from avd_jax.studies import study as study_lib
from avd_jax.studies import study_keys
from avd_jax.studies.study import Row, Study


@dataclasses.dataclass(frozen=True)
class Files:
  """The files of one study.

  Attributes:
    workdir: may hold several studies.
    name: of the study.
  """

  workdir: Path
  name: str

  @property
  def place(self) -> Path:
    """The study's own directory."""
    return self.workdir / self.name

  def run(self, study: Study, branch: str, seed: int) -> Path:
    """The training workdir of a branch."""
    name = f"{branch}-{study_keys.digest(study, branch)}"
    return self.workdir / "runs" / name / f"seed_{seed}"

  def row(self, row: Row, seed: int) -> Path:
    """The file of a measured row."""
    slug = study_lib.slug(row.label)
    return self.place / "rows" / f"{slug}-seed_{seed}.json"

  def cost(self, study: Study, branch: str) -> Path:
    """The file of an equal-time branch's measured cost.

    Its digest is that of the branch before its steps are known.
    """
    name = f"{branch}-{study_keys.digest(study, branch)}"
    return self.place / f"cost-{name}.json"

  def analysis(self, seed: int) -> Path:
    """The file of an analysis of all rows."""
    return self.place / f"analysis-seed_{seed}.json"

  def measured(self, study: Study, row: Row) -> dict[int, dict[str, Any]]:
    """What was measured of a row as it is defined now, by seed."""
    pattern = f"rows/{study_lib.slug(row.label)}-seed_*.json"
    return self._by_seed(pattern, study_keys.row_key(study, row))

  def analysed(self, study: Study) -> dict[int, dict[str, Any]]:
    """What the analysis gave of the rows as they are now, by seed."""
    if not study.analysis:
      return {}
    return self._by_seed("analysis-seed_*.json", study_keys.analysis_key(study))

  def _by_seed(self, pattern: str, key: str) -> dict[int, dict[str, Any]]:
    every = [disk.read_json(path) for path in self.place.glob(pattern)]
    found = {values["seed"]: values for values in every if values["key"] == key}
    return dict(sorted(found.items()))


def write(path: Path, content: str | bytes) -> None:
  """Writes a file that others may be reading, or writing."""
  disk.write(path, content, several=True)


def write_json(path: Path, values: Any) -> None:
  """Writes values that others may be reading, or writing."""
  disk.write_json(path, values, several=True)


@contextlib.contextmanager
def alone(place: Path, doing: str) -> Iterator[None]:
  """One process at a time works in a directory; the others wait, and say so.

  Args:
    place: made where it is missing.
    doing: what is waited for.
  """
  place.mkdir(parents=True, exist_ok=True)
  with open(place / ".lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f"another process {doing}: waiting for it", flush=True)
      fcntl.flock(file, fcntl.LOCK_EX)
    yield  # the lock ends with the file
