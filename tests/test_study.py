"""Studies: what they say, and what they refuse."""

import dataclasses
import functools
import runpy
from pathlib import Path

import numpy as np
import pytest

from avd_jax import config as config_lib
from avd_jax.cli import main as cli
from avd_jax.errors import UserError
from avd_jax.evaluation import study_chart
from avd_jax.studies import study as study_lib
from avd_jax.studies import study_cost, study_keys

ROOT = Path(__file__).parents[1]
TOY = str(Path(__file__).parent / "studies" / "toy.py")
ABOUT = {"command": "avd study toy", "device": "a test"}
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.py"))


@functools.cache
def toy():
  """The toy study as it is run."""
  return study_lib.load(TOY)[1]


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_every_study_is_sound(path):
  name, study = study_lib.load(str(path))
  assert name == path.stem
  # Every model that is trained is shown, or is somebody's parent.
  used = {row.branch for row in study.rows} | {b.parent for b in study.branches}
  assert {b.name for b in study.branches} <= used
  keys = [study_keys.row_key(study, row) for row in study.rows]
  assert len(set(keys)) == len(keys), "two rows are the same"


def test_studies_share_what_is_the_same():
  (_, one), (_, two) = (
    study_lib.load(str(ROOT / "configs" / "studies" / f"{name}.py"))
    for name in ("strategies", "shift")
  )
  for branch in ("warmup", "teacher_forcing", "resampling"):
    assert study_keys.digest(one, branch) == study_keys.digest(two, branch)


def test_a_digest_is_of_what_weights_depend_on():
  raw = runpy.run_path(TOY)["get_study"]()

  def digest(*overrides, branch="teacher"):
    return study_keys.digest(study_lib.resolve(raw, overrides), branch)

  for same in (
    "sampling.steps=9", "evaluation.videos=1", "log.every=9", "seed=3",
    "data.seed=3", "bagger.share=0.25", "stage.resampled.steps=9",
  ):  # fmt: skip
    assert digest(f"--config.{same}") == digest(), same
  for other in (
    "loss.shift=2", "data.radius=1", "stage.teacher.steps=9",
    "stage.warmup.steps=9",
  ):  # fmt: skip
    assert digest(f"--config.{other}") != digest(), other
  # Rounds of BAgger are trained on rollouts.
  for other in ("bagger.share=0.25", "sampling.steps=9"):
    changed = digest(f"--config.{other}", branch="bagger")
    assert changed != digest(branch="bagger"), other


def test_a_row_depends_on_how_it_is_sampled():
  raw = runpy.run_path(TOY)["get_study"]()

  def key(*overrides, row=2):
    study = study_lib.resolve(raw, overrides)
    return study_keys.row_key(study, study.rows[row])

  assert len({key(row=i) for i in range(5)}) == 5
  for other in ("sampling.shift=2", "evaluation.videos=1", "loss.shift=2"):
    assert key(f"--config.{other}") != key(), other
  assert key("--config.log.every=9") == key()


def test_rounds_of_bagger_are_rows():
  raw = changed(runpy.run_path(TOY)["get_study"](), "bagger", rounds=2)
  two = study_lib.resolve(raw, [])
  labels = [row.label for row in two.rows]
  assert labels[-2:] == ["BAgger round 1", "BAgger round 2"]
  # Another round leaves those before it what they were.
  assert study_keys.row_key(two, two.rows[4]) == study_keys.row_key(
    toy(), toy().rows[4]
  )
  assert study_keys.row_key(two, two.rows[4]) != study_keys.row_key(
    two, two.rows[5]
  )


def changed(study, branch, **changes):
  """The study with a branch changed."""
  branches = [
    dataclasses.replace(b, **changes) if b.name == branch else b
    for b in study.branches
  ]
  return dataclasses.replace(study, branches=tuple(branches))


def refuse(message, study):
  with pytest.raises(UserError, match=message) as error:
    study_lib.check(study_lib.resolve(study, []))
  assert "\n" not in str(error.value)


def test_what_a_study_refuses():
  study = toy()
  row, branch = study.rows[0], study.branches[1]
  one = lambda **changes: dataclasses.replace(study, **changes)
  rows = lambda **changes: one(rows=(dataclasses.replace(row, **changes),))
  refuse("no branch 'x'; there are warmup, teacher", rows(branch="x"))
  refuse("parent 'x' is no branch", changed(study, "teacher", parent="x"))
  refuse("each other's parents", changed(study, "warmup", parent="long"))
  refuse("two branches are called", one(branches=(branch, branch)))
  refuse("only a-z, 0-9 and _", changed(study, "teacher", name="a b"))
  refuse("'A-b' and 'a b' share", one(
    rows=tuple(dataclasses.replace(row, label=x) for x in ("A-b", "a b"))
  ))  # fmt: skip
  refuse("compared with 'x', which is no row", one(baseline="x"))
  refuse("compared with 'y', which is no row", rows(against="y"))
  refuse("seeds 0: at least 1", one(seeds=0))
  refuse("unknown plots 'x'; there are frontier", one(plots=("x",)))
  refuse("unknown shown 'x'; there are failed", one(shown=("x",)))
  refuse("unknown analysis 'x'; there are", one(analysis="x"))
  refuse(
    "branch teacher: --config.loss.x: unknown config field",
    changed(study, "teacher", changes={"loss.x": 1}),
  )
  refuse(
    "branch teacher: stage.teacher.history 'x' is not one of",
    changed(study, "teacher", stage=config_lib.stage("x", 1)),
  )
  refuse(
    r"its parent is another model \(model.dim: 16 -> 8\)",
    changed(study, "teacher", changes={"model.dim": 8}),
  )
  refuse("it has none", changed(study, "bagger", parent=""))
  refuse(
    "two ordinary trainings", changed(study, "long", equal_time_to="bagger")
  )
  refuse(
    "row 'teacher forcing': --config.evaluation.videos: cannot change",
    rows(changes={"evaluation.videos": 1}),
  )
  refuse(
    "row 'teacher forcing': sampling.solver 'x'",
    rows(changes={"sampling.solver": "x"}),
  )
  refuse("no round 3; bagger has 1", rows(branch="bagger", round=3))


def test_the_command_refuses_before_it_starts(tmp_path, capsys, monkeypatch):
  def said(*arguments):
    code = cli.main(["study", *arguments, "--workdir", str(tmp_path / "w")])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.count("\n") == 1
    return captured.err

  broken = tmp_path / "broken.py"
  broken.write_text("def get_study():\n  return 1 / 0\n")
  assert "ZeroDivisionError" in said(str(broken))
  broken.write_text("def get_study():\n  return 1\n")
  assert "must return a Study" in said(str(broken))
  assert "unknown config field" in said(TOY, "--config.x=1")
  assert "no row 'x'; there are 'teacher forcing'" in said(TOY, "--rows", "x")
  assert "--seeds -1" in said(TOY, "--seeds", "-1")
  monkeypatch.chdir(ROOT)
  assert "configs/studies has" in said("none")
  assert not (tmp_path / "w").exists()


def test_a_longer_branch_keeps_its_schedule():
  stage = config_lib.stage("ground_truth", 10, warmup_steps=2, decay_steps=8)
  study = changed(toy(), "teacher", stage=stage)
  longer = study_cost.with_steps(study, "teacher", 25).branch("teacher").stage
  assert (longer.steps, longer.warmup_steps, longer.decay_steps) == (25, 5, 20)
  assert stage.steps == 10


def test_numbers_in_a_chart_do_not_meet():
  rng = np.random.default_rng(0)
  points = np.concatenate(
    [rng.uniform(100, 500, (8, 2)), 300 + rng.normal(size=(6, 2))]
  )
  places = study_chart.apart(points, (0, 0, 600, 600))
  others = np.concatenate([places, points])
  distance = np.linalg.norm(places[:, None] - others[None], axis=-1)
  distance[np.arange(14), np.arange(14)] = np.inf
  assert distance.min() > 11  # two digits are that high and wide
  assert places.min() > 0
  assert places.max() < 600
