"""What a study is: models that differ in one thing, rolled out and compared.

A file of configs/studies/ defines one in `get_study()`. A **branch** is a
model: one stage of training that starts from its parent branch's EMA weights. A
**row** is a line of the study's table: rollouts of a branch, sampled in one
way. Everything a study can get wrong is refused here, before any compute;
`study_run` runs it, `study_report` writes it down.
"""

import contextlib
import dataclasses
import functools
import re
import runpy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from avd_jax import config as config_lib
from avd_jax import sampling
from avd_jax.bagger import rounds
from avd_jax.errors import UserError
from avd_jax.studies import analyses

FOLDER = Path("configs/studies")
PLOTS = ("frontier", "curves")
# What charts can show, by its key in a summary.
SHOWN = {
  "failed": "failed frames (%)",
  "background_error": "background error",
  "hue_error": "hue error",
  "violation": "frames that break a law (%)",
  "state_error": "state error",
  "sharpness": "sharpness, as a share of the start's",
}

# The same for all rows of a study, or they could not be compared.
_NOT_IN_ROWS = ("evaluation.", "mesh.context", "mesh.tensor")


@dataclasses.dataclass(frozen=True)
class Branch:
  """A model: one stage of training.

  Attributes:
    name: of the stage, and of the directory of its runs.
    stage: a `config.stage`.
    parent: branch whose EMA weights it starts from; "" is from scratch.
    changes: fields of the study's config with other values here, by dotted
      name.
    rounds: of BAgger, whose base is the parent; 0 is ordinary training.
    equal_time_to: branch whose training time this one gets: its steps are that
      branch's, times the measured ratio of the costs of a step.
  """

  name: str
  stage: ConfigDict
  parent: str = ""
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  rounds: int = 0
  equal_time_to: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
  """Rollouts of a branch, measured.

  Attributes:
    label: its name in the table and in the charts.
    branch: whose model is rolled out.
    changes: how to sample it, or what attention sees, by dotted name.
    round: of a branch of BAgger, from 1; 0 there stands for a row a round.
    against: label of the row it is compared with; "" is the study's baseline.
  """

  label: str
  branch: str
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  round: int = 0
  against: str = ""


@dataclasses.dataclass(frozen=True)
class Study:
  """A question, the models that answer it, and what came out.

  Attributes:
    title: a few words.
    question: a sentence.
    config: what all branches share; its stages are not used.
    branches: every model, parents included.
    rows: of the table, in order.
    baseline: label of the row that others are compared with.
    claims: what the papers report, as theirs.
    found: what came out, in two sentences; "" before the runs.
    seeds: how many independent repetitions, 0, 1, ...
    plots: some of PLOTS.
    shown: what they show, some of SHOWN.
    thirds: what is tabled by thirds of the rollout, some of SHOWN.
    analysis: something else to measure, of `analyses.ANALYSES`; "" is nothing.
  """

  title: str
  question: str
  config: ConfigDict
  branches: tuple[Branch, ...]
  rows: tuple[Row, ...]
  baseline: str
  claims: str = ""
  found: str = ""
  seeds: int = 3
  plots: tuple[str, ...] = PLOTS
  shown: tuple[str, ...] = ("failed", "background_error")
  thirds: tuple[str, ...] = ()
  analysis: str = ""

  def branch(self, name: str) -> Branch:
    """The branch of that name."""
    return next(b for b in self.branches if b.name == name)

  def reference(self, row: Row) -> str:
    """The label of the row that this one is compared with; its own for one
    that others are compared with."""
    return row.against or self.baseline

  @functools.cached_property
  def _known(self) -> dict[Any, Any]:
    return {}


def load(where: str, overrides: Sequence[str] = ()) -> tuple[str, Study]:
  """Reads and checks a study.

  Args:
    where: a name in configs/studies/, or the path of a file that ends in .py.
    overrides: `--config.field=value` arguments, for all branches. The stage of
      a branch is `--config.stage.NAME`.

  Returns:
    Its name and the study, a row a round of BAgger.

  Raises:
    UserError: no such study, or the first thing wrong with it.
  """
  path = Path(where) if where.endswith(".py") else FOLDER / f"{where}.py"
  if not path.is_file():
    known = ", ".join(p.stem for p in sorted(FOLDER.glob("*.py"))) or "none"
    raise UserError(f"no study {where}; {FOLDER} has {known}")
  try:
    study = runpy.run_path(str(path))["get_study"]()
  except Exception as error:  # it is a program: anything may be wrong with it
    reason = " ".join(str(error).split())[:300]
    raise UserError(f"{path}: {type(error).__name__}: {reason}") from error
  if not isinstance(study, Study):
    raise UserError(f"{path}: get_study must return a Study")
  study = resolve(study, overrides)
  check(study)
  return path.stem, study


def resolve(study: Study, overrides: Sequence[str]) -> Study:
  """The study with overrides applied, and a row a round of BAgger.

  Raises:
    UserError: an override that config refuses, a row of no branch.
  """
  _check_names(study)
  config = _copy(study.config)
  stages = {b.name: _copy_stage(b.stage) for b in study.branches}
  config.stage = ConfigDict(stages)
  if overrides:
    config_lib.override(config, list(overrides))
  branches = tuple(
    dataclasses.replace(b, stage=config.stage[b.name]) for b in study.branches
  )
  study = dataclasses.replace(study, config=config, branches=branches)
  rows: list[Row] = []
  for row in study.rows:
    count = study.branch(row.branch).rounds
    if not 0 <= row.round <= count:
      raise UserError(
        f"row {row.label!r}: no round {row.round}; {row.branch} has {count}"
      )
    if not count or row.round:
      rows.append(row)
      continue
    for k in range(1, count + 1):
      label = f"{row.label} round {k}"
      rows.append(dataclasses.replace(row, label=label, round=k))
  return dataclasses.replace(study, rows=tuple(rows))


def check(study: Study) -> None:
  """Refuses what cannot run.

  Raises:
    UserError: the first thing found.
  """
  slugs: dict[str, str] = {}
  for row in study.rows:
    other = slugs.setdefault(slug(row.label), row.label)
    if other is not row.label:
      raise UserError(f"rows {other!r} and {row.label!r} share a file name")
  labels = tuple(row.label for row in study.rows)
  for label in (study.baseline, *(row.against for row in study.rows)):
    if label and label not in labels:
      raise UserError(
        f"rows are compared with {label!r}, which is no row; there are"
        f" {', '.join(labels)}"
      )
  if study.seeds < 1:
    raise UserError(f"seeds {study.seeds}: at least 1")
  for field, known in (
    ("plots", PLOTS),
    ("shown", SHOWN),
    ("thirds", SHOWN),
    ("analysis", analyses.ANALYSES),
  ):
    value = getattr(study, field)
    chosen = [value] if value and isinstance(value, str) else value
    if unknown := [name for name in chosen if name not in known]:
      raise UserError(
        f"unknown {field} {unknown[0]!r}; there are {', '.join(known)}"
      )
  for branch in study.branches:
    _check_branch(study, branch)
  for row in study.rows:
    with _named(f"row {row.label!r}"):
      config_lib.check(row_config(study, row))


def _check_names(study: Study) -> None:
  """Names that are one thing's, and that are somebody's."""
  names = [b.name for b in study.branches]
  for name in names:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
      raise UserError(f"branch {name!r}: only a-z, 0-9 and _ make a name")
    if names.count(name) > 1:
      raise UserError(f"two branches are called {name}")
  known = f"there are {', '.join(names)}"
  for branch in study.branches:
    for field in ("parent", "equal_time_to"):
      value = getattr(branch, field)
      if value and value not in names:
        raise UserError(
          f"branch {branch.name}: {field} {value!r} is no branch; {known}"
        )
  for row in study.rows:
    if row.branch not in names:
      raise UserError(f"row {row.label!r}: no branch {row.branch!r}; {known}")
  for branch in study.branches:
    ancestors(study, branch)


def ancestors(study: Study, branch: Branch) -> list[str]:
  """A branch's name, its parent's, and so on.

  Raises:
    UserError: they go round in a circle.
  """
  line = [branch.name]
  while branch.parent:
    if branch.parent in line:
      raise UserError(f"branches {', '.join(line)} are each other's parents")
    line.append(branch.parent)
    branch = study.branch(branch.parent)
  return line


def _check_branch(study: Study, branch: Branch) -> None:
  with _named(f"branch {branch.name}"):
    config = config_of(study, branch.name)
    config_lib.check(config)
    if branch.rounds:
      config_lib.check_bagger(config)
    if branch.rounds and not branch.parent:
      raise UserError("BAgger's base is its parent, and it has none")
    if branch.parent:
      old, new = (
        _values_of(study, name)["model"]
        for name in (branch.parent, branch.name)
      )
      changed = config_lib.differences(
        old, new, "model.", config_lib.WEIGHTLESS
      )
      if changed:
        raise UserError(f"its parent is another model ({'; '.join(changed)})")
    if branch.equal_time_to:
      other = study.branch(branch.equal_time_to)
      if branch.rounds or other.rounds or other.equal_time_to:
        raise UserError(
          "equal_time_to needs two ordinary trainings, one of a known length"
        )


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
  """Says in whose settings a mistake is."""
  try:
    yield
  except UserError as error:
    raise UserError(f"{name}: {error}") from error


def _copy(config: ConfigDict) -> ConfigDict:
  return config_lib.from_json(config_lib.to_json(config))


def _change(
  config: ConfigDict, changes: Mapping[str, Any], may: tuple[str, ...] = ("",)
) -> None:
  arguments = [f"--config.{name}={value}" for name, value in changes.items()]
  if arguments:  # reading none takes as long as reading some
    config_lib.override(config, arguments, may)


def remembered(function):
  """Keeps what a function of (study, name) gave: configs take long to read."""

  @functools.wraps(function)
  def call(study, name):
    key = function.__name__, name
    if key not in study._known:
      study._known[key] = function(study, name)
    return study._known[key]

  return call


def config_of(study: Study, name: str) -> ConfigDict:
  """The config that a branch trains with, but for seeds and `init_from`.

  Raises:
    UserError: a change that config refuses.
  """
  return config_lib.from_json(_values_of(study, name))


@remembered
def _values_of(study: Study, name: str) -> dict[str, Any]:
  """The same as plain values."""
  branch, config = study.branch(name), _copy(study.config)
  stages = {name: _copy_stage(branch.stage)}
  if branch.rounds:
    # Its base is the parent as it is: one step at learning rate 0.
    base = _copy_stage(branch.stage, steps=1, learning_rate=0.0)
    stages = {rounds.BASE: base, rounds.ROUND: stages[name]}
    config.bagger.rounds = branch.rounds
  config.stages, config.stage = tuple(stages), ConfigDict(stages)
  if branch.parent:
    config.init_from = ""
  _change(config, branch.changes)
  return config_lib.to_json(config)


def _copy_stage(stage: ConfigDict, **changes: Any) -> ConfigDict:
  return ConfigDict(stage.to_dict() | changes)


def row_config(study: Study, row: Row) -> ConfigDict:
  """The config that a row is sampled and measured with.

  Raises:
    UserError: a change of what cannot differ between a study's rows.
  """
  config = config_of(study, row.branch)
  may = tuple(n for n in sampling.CHANGEABLE if n not in _NOT_IN_ROWS)
  _change(config, row.changes, may)
  return config


def slug(label: str) -> str:
  """A label as part of a file's name."""
  return re.sub(r"[^a-z0-9.]+", "_", label.lower()).strip("_")
