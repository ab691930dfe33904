"""Studies: what they run, and what they leave behind."""

import dataclasses
import functools
import json
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from avd_jax import config as config_lib
from avd_jax import parallel, sampling
from avd_jax.cli import main as cli
from avd_jax.cli import study as study_cli
from avd_jax.errors import UserError
from avd_jax.studies import (
  analyses,
  race,
  study_cost,
  study_files,
  study_report,
  study_run,
)
from avd_jax.studies import study as study_lib
from avd_jax.studies.study_files import Files
from avd_jax.training import loop

ROOT = Path(__file__).parents[1]
TOY = str(Path(__file__).parent / "studies" / "toy.py")
ABOUT = {"command": "avd study toy", "device": "a test"}
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.py"))


@functools.cache
def toy():
  """The toy study as it is run."""
  return study_lib.load(TOY)[1]


def mesh() -> Mesh:
  return parallel.make_mesh(jax.devices()[:1], [1, 1, 1, 1])


def run(files, seeds, labels=()):
  study_run.run(toy(), files, mesh(), seeds=seeds, labels=labels, about=ABOUT)


def fake_race(contenders, rounds, progress=True):
  """A step of each, and times that are the same on every machine."""
  jax.block_until_ready([call() for call in contenders.values()])
  return {"long": [1.0] * rounds, "teacher": [2.0] * rounds}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """The toy study: all rows of seed 1, and two of a seed 0 that is made up."""
  files, study = Files(tmp_path_factory.mktemp("studies"), "toy"), toy()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(race, "run", fake_race)
    run(files, [1])
  for row, share in ((study.rows[0], 0.9), (study.rows[3], 0.6)):
    values = files.measured(study, row)[1]
    thirds = values["summary"]["background_error"]
    values["summary"]["background_error"] = [share * x for x in thirds]
    values["seed"] = 0
    study_files.write_json(files.row(row, 0), values)
  study_report.write(study, files)
  return files


@pytest.fixture
def no_compute(monkeypatch):
  """Fails a test that trains or races."""

  def never(*args, **kwargs):
    raise AssertionError("computed again")

  monkeypatch.setattr(loop, "train", never)
  monkeypatch.setattr(race, "run", never)


def report_of(files):
  return json.loads((files.place / "toy.json").read_text())


# --- what it runs ------------------------------------------------------------


def test_models_lie_where_they_should(files):
  study = toy()
  path = files.run(study, "teacher", 1) / "config.json"
  config = json.loads(path.read_text())
  assert config["seed"] == config["data"]["seed"] == 1001
  parent = files.run(study, "warmup", 1).resolve()
  assert Path(config["init_from"]) == parent
  # Seed 0 was made up.
  assert not files.run(study, "teacher", 0).exists()


def test_a_row_says_how_it_was_made(files):
  study = toy()
  values = files.measured(study, study.rows[3])[1]
  assert values["label"] == "resampled, 2 steps"
  assert values["changes"] == {"sampling.steps": "2"}
  assert values["steps"] == 2
  assert values["command"] == ABOUT["command"]
  assert len(values["curves"]["failed"]) == study.config.evaluation.frames
  one_step = files.measured(study, study.rows[2])[1]
  assert one_step["digest"] == values["digest"]
  assert one_step["summary"] != values["summary"]


def test_rounds_start_from_the_parent(files):
  study = toy()
  base = sampling.load(files.run(study, "bagger", 1) / "base")
  parent = sampling.load(files.run(study, "warmup", 1))
  # An EMA of equal weights rounds.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7),
    base.params,
    parent.params,
  )
  values = files.measured(study, study.rows[4])[1]
  assert values["round"] == 1


def test_equal_time_is_measured_once(files, no_compute):
  study = toy()
  cost = json.loads(files.cost(study, "long").read_text())
  assert (cost["ratio"], cost["steps"]) == (2.0, 4)
  settled = study_cost.settle(study, files, mesh(), ["long"])
  assert settled.branch("long").stage.steps == 4
  assert files.measured(settled, settled.rows[1])[1]["steps"] == 4
  run = files.run(settled, "long", 1)
  assert [p.name for p in (run / "checkpoints").iterdir()][-1:] == ["4"]


def test_nothing_is_done_twice(files, no_compute):
  place = files.place / "rows"
  before = {path: path.stat().st_mtime_ns for path in place.iterdir()}
  report = (files.place / "toy.md").read_bytes()
  run(files, [1])
  assert before == {path: path.stat().st_mtime_ns for path in place.iterdir()}
  assert (files.place / "toy.md").read_bytes() == report


def test_a_row_of_other_weights_is_made_anew(files, no_compute):
  study = toy()
  path = files.row(study.rows[2], 1)
  good = path.read_text()
  path.write_text(good.replace(json.loads(good)["key"], "0" * 8))
  assert files.measured(study, study.rows[2]) == {}
  study_report.write(study, files)
  labels = [row["label"] for row in report_of(files)["rows"]]
  assert "resampled" not in labels
  run(files, [1], ["resampled"])
  assert json.loads(path.read_text())["summary"] == json.loads(good)["summary"]
  labels = [row["label"] for row in report_of(files)["rows"]]
  assert "resampled" in labels


def test_an_interrupted_training_goes_on(tmp_path, monkeypatch):
  files, calls = Files(tmp_path, "toy"), []

  def train(config, workdir, mesh):
    calls.append((workdir, config.seed, config.data.seed))
    study_files.write_json(workdir / "config.json", config_lib.to_json(config))
    if len(calls) == 1:
      raise loop.Interrupted("stopped")

  monkeypatch.setattr(loop, "train", train)
  runner = study_run.Runner(toy(), files, mesh(), ABOUT)
  with pytest.raises(loop.Interrupted):
    runner.train("warmup", 2)
  assert runner.train("warmup", 2) == [calls[0][0]]
  assert runner.train("warmup", 2) == [calls[0][0]]
  assert len(calls) == 2
  assert calls[0][1:] == (2, 2)
  # A child sees other clips and other noise than its parent's first steps.
  runner.train("teacher", 2)
  assert calls[2][1:] == (1002, 1002)
  # A default that has changed since is found out.
  record = calls[0][0] / "config.json"
  values = json.loads(record.read_text())
  values["loss"]["shift"] += 1
  record.write_text(json.dumps(values))
  with pytest.raises(UserError, match=r"loss.shift: .*; move it away"):
    runner.train("warmup", 2)
  # What configs have learned to say since is not.
  del values["loss"]["shift"]
  record.write_text(json.dumps(values))
  assert runner.train("warmup", 2) == [calls[0][0]]


def test_one_at_a_time(tmp_path, capsys):
  order = []

  def other():
    with study_files.alone(tmp_path, "works"):
      order.append("other")

  with study_files.alone(tmp_path, "works"):
    thread = threading.Thread(target=other)
    thread.start()
    time.sleep(0.2)
    order.append("first")
  thread.join()
  assert order == ["first", "other"]
  assert "another process works" in capsys.readouterr().out


# --- what it leaves behind ---------------------------------------------------


def test_the_report_has_the_numbers_of_the_rows(files, tmp_path, capsys):
  arguments = ["study", TOY, "--workdir", str(files.workdir), "--report"]
  assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
  assert "| BAgger round 1 |" in capsys.readouterr().out
  names = ["toy.json", "toy.md", "toy.png", "toy_curves.png"]
  assert sorted(path.name for path in tmp_path.iterdir()) == names
  for name in names:
    copy = (tmp_path / name).read_bytes()
    assert copy == (files.place / name).read_bytes()
  report, study = report_of(files), toy()
  assert [row["label"] for row in report["rows"]] == [
    row.label for row in study.rows
  ]
  row = report["rows"][3]
  assert row["seeds"] == [0, 1]
  made = [m["summary"] for m in files.measured(study, study.rows[3]).values()]
  theirs = [m["summary"] for m in files.measured(study, study.rows[0]).values()]
  drifts = [m["delta_db"] for m in made]
  assert row["summary"]["delta_db"] == pytest.approx(np.mean(drifts))
  assert row["summary"]["range"]["delta_db"] == [min(drifts), max(drifts)]
  ratios = [
    a["background_error"][2] / b["background_error"][2]
    for a, b in zip(made, theirs, strict=True)
  ]
  compared = row["compared"]["background_error.2"]
  assert compared[1:] == [min(ratios), max(ratios)]
  assert min(ratios) < compared[0] < max(ratios)


def test_the_report_reads_well(files):
  study_report.write(toy(), files)
  text = (files.place / "toy.md").read_text()
  for words in (
    "# A toy\n",
    "Does the engine run?",
    "    avd study toy\n",
    "Seeds 0, 1; a test",
    "## What the papers report\n\nNothing is claimed",
    "## What was found here\n\nIt runs.",
    "![toy.png](toy.png)",
    "failed (%)",
    "PSNR, frame 1",
  ):
    assert words in text
  tables = [line for line in text.splitlines() if line.startswith("|")]
  assert sum(line.startswith("| resampled |") for line in tables) == 3
  assert sum(line.startswith("| teacher forcing |") for line in tables) == 2
  # Worlds of this kind have no such thing.
  assert "sharpness" not in text
  assert "nan" not in text.lower()


def test_an_empty_report_says_so(tmp_path):
  path = study_report.write(toy(), Files(tmp_path, "toy"))
  assert "Nothing was measured yet." in path.read_text()


def test_a_world_of_another_kind_shows_what_it_has(files, tmp_path):
  """Summaries with a key more and many keys less."""
  study, there = toy(), Files(tmp_path, "toy")
  for row in (study.rows[0], study.rows[2]):
    values = files.measured(study, row)[1]
    values["summary"] = {
      "violation": [0.1, 0.2, 0.3 if row is study.rows[0] else 0.15],
      "seeds": 1,
    }
    values["curves"] = {"violation": [0.1] * 7}
    study_files.write_json(there.row(row, 1), values)
  text = study_report.write(study, there).read_text()
  assert "violation" in text
  assert "hue" not in text
  assert "| resampled | 15.0 |" in text
  assert "| resampled | ×0.50 |" in text
  assert "Not measured yet: teacher forcing, long; resampled, 2" in text


def test_an_analysis_looks_at_all_rows(files, no_compute, monkeypatch):
  def measure(subject):
    assert all(path.is_dir() for path in subject.workdirs.values())
    assert subject.workdirs["BAgger round 1"].name == "train"
    return {"rows": float(len(subject.configs))}

  def write(values, failed):
    assert set(failed) == {row.label for row in toy().rows}
    return f"{len(values)} of {values[0]['rows']:.0f} rows.", b"a picture"

  fake = analyses.Analysis(measure, write)
  monkeypatch.setitem(analyses.ANALYSES, "count", fake)
  study = dataclasses.replace(toy(), analysis="count")
  for _ in range(2):  # the second finds it done
    study_run.run(study, files, mesh(), seeds=[1], about=ABOUT)
    fake = analyses.Analysis(lambda subject: 1 / 0, write)
    monkeypatch.setitem(analyses.ANALYSES, "count", fake)
  assert "\n1 of 5 rows.\n" in (files.place / "toy.md").read_text()
  assert (files.place / "toy_count.png").read_bytes() == b"a picture"
  assert report_of(files)["analysis"] == {"1": {"rows": 5.0}}


def test_rows_are_compared_within_their_world(files):
  study = toy()
  rows = [
    dataclasses.replace(row, against="resampled")
    if row.label.startswith("resampled")
    else row
    for row in study.rows
  ]
  study_report.write(dataclasses.replace(study, rows=tuple(rows)), files)
  _, one, two = (files.place / "toy.md").read_text().split("\nAgainst ")
  assert one.startswith("teacher forcing:")
  assert "resampled" not in one
  assert two.startswith("resampled:")
  assert "| resampled, 2 steps |" in two
  assert "BAgger" not in two


def test_evidence_names_no_place_of_a_machine(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert study_cli.public("runs/studies") == "runs/studies"
  assert study_cli.public(str(tmp_path / "runs/studies")) == "runs/studies"
  assert study_cli.public("/somewhere/else/studies") == "studies"
