"""Every study of configs/studies/, end to end, at the length of a toy."""

import dataclasses
import functools
import json
import os
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from avd_jax import config as config_lib
from avd_jax import parallel
from avd_jax.models import denoiser
from avd_jax.sampling import Sampler
from avd_jax.studies import race, study_run
from avd_jax.studies import study as study_lib
from avd_jax.studies.study_files import Files
from avd_jax.training.program import Program

FOLDER = Path(__file__).parents[1] / "configs" / "studies"
STUDIES = (
  "causality",
  "content_cost",
  "cost",
  "few_step",
  "history",
  "proxy",
  "reversal",
  "shift",
  "strategies",
)
# They have no analysis and no way to train that others lack: minutes saved.
# That their configs are sound is seen in tests/test_study.py.
LONG = ("causality", "content_cost", "history", "reversal", "shift")
ALL = bool(os.environ.get("AVD_TEST_ALL"))
ABOUT = {"command": "avd study x", "device": "a test"}
# One layer, clips of four frames, rollouts of eight.
SMALL = {
  "data.frames": 4,
  "data.batch_size": 4,
  "model.dim": 16,
  "model.num_heads": 1,
  "model.num_layers": 1,
  "model.ffn_dim": 16,
  "model.freq_dim": 8,
  "model.scan_unroll": 1,
  "log.every": 1,
  "sampling.steps": 1,
  "evaluation.videos": 2,
  "evaluation.given": 1,
  "evaluation.frames": 8,
}
# What branches have in place of larger values of their own.
CHANGES = {"data.batch_size": 8, "data.num_videos": 12, "bagger.frames": 5}
STAGE = {
  "steps": 2,
  "warmup_steps": 0,
  "decay_steps": 1,
  "dmd.critic_updates": 1,
}


# Of rows that differ in a number or a world alone, some stand for all.
STAND_IN = {
  "shift": (
    "teacher forcing",
    "s = 0.1",
    "s = 3",
    "noise, s = 0.6",
    "half of the videos",
    "clean prefix 1",
    "told, 0.3 at test",
  ),
  "history": (
    "pan: dense",
    "pan: top-1",
    "pan: window 5",
    "pan: window 4, sink 1",
    "occluder: dense",
    "occluder: top-5",
  ),
}


def needed(study, rows):
  """The branches of some rows, and what those start from."""
  names = {row.branch for row in rows}
  for branch in reversed(study.branches):  # parents come first
    if branch.name in names:
      names |= {branch.parent, branch.equal_time_to}
  return [branch for branch in study.branches if branch.name in names]


def small(name):
  """A study as it is, but for its size."""
  study = runpy.run_path(str(FOLDER / f"{name}.py"))["get_study"]()
  rows = [r for r in study.rows if r.label in STAND_IN.get(name, (r.label,))]
  study = dataclasses.replace(study, rows=tuple(rows))
  branches = [
    dataclasses.replace(
      b, changes={k: CHANGES.get(k, v) for k, v in b.changes.items()}
    )
    for b in needed(study, rows)
  ]
  overrides = [f"--config.{field}={value}" for field, value in SMALL.items()]
  overrides += [
    f"--config.stage.{b.name}.{field}={value}"
    for b in branches
    for field, value in STAGE.items()
  ]
  overrides += [
    f"--config.stage.{b.name}.degradation.clean_prefix=1"
    for b in branches
    if b.stage.objective == "dmd"
  ]
  study = dataclasses.replace(study, branches=tuple(branches))
  study = study_lib.resolve(study, overrides)
  study_lib.check(study)
  return study


def kept(function, key):
  """A method's result, made once for all objects of the same key."""
  made = {}

  def get(self):
    if key(self) not in made:
      made[key(self)] = function(self)
    return made[key(self)]

  return get


def program_key(program):
  """All that a program's compiled functions depend on, but for the stage."""
  values = config_lib.to_json(program.config)
  # Only these have something to keep from step to step.
  kinds = {"error_bank", "consistency", "dmd"}
  stages = values["stage"].values()
  memory = kinds & {
    s[name] for s in stages for name in ("history", "objective")
  }
  parts = [values[part] for part in ("model", "loss", "optimizer")]
  return json.dumps([*parts, sorted(memory)]) + str(program.batch)


def sampler_key(sampler):
  values = config_lib.to_json(sampler.config)
  text = values["data"]["text_length"]
  return json.dumps([values["model"], values["sampling"], text])


@pytest.fixture(scope="module", autouse=True)
def shared():
  """Runs that compute the same share compiled functions.

  Nearly all of the time would go into tracing the same programs anew.
  """
  with pytest.MonkeyPatch.context() as patch:
    for cls, name, key in (
      (Program, "boxed", program_key),
      (Program, "_steps", program_key),
      (Sampler, "_prefill", sampler_key),
      (Sampler, "segment", sampler_key),
    ):
      patch.setattr(cls, name, property(kept(vars(cls)[name].func, key)))
    # All seeds are 0; a step donates its state.
    first = kept(Program.init, program_key)
    copied = lambda self: jax.tree.map(jnp.copy, first(self))
    patch.setattr(Program, "init", copied)
    abstract = functools.cache(denoiser.abstract_params)
    patch.setattr(denoiser, "abstract_params", abstract)
    in_turn = race.run
    patch.setattr(race, "run", lambda calls, rounds: in_turn(calls, 1, False))
    yield


@pytest.fixture(autouse=True)
def _programs_end_with_their_study():
  """As tests/conftest.py does after a file: this one would fill a process."""
  yield
  jax.clear_caches()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """One for all: studies share what they train alike."""
  return tmp_path_factory.mktemp("studies")


def test_every_study_is_run():
  assert tuple(sorted(path.stem for path in FOLDER.glob("*.py"))) == STUDIES


@pytest.mark.parametrize(
  "name", [name for name in STUDIES if ALL or name not in LONG]
)
def test_a_study_runs_from_end_to_end(name, workdir):
  study, files = small(name), Files(workdir, name)
  mesh = parallel.make_mesh(jax.devices()[:1], [1, 1, 1, 1])
  study_run.run(study, files, mesh, seeds=[0], about=ABOUT)

  text = (files.place / f"{name}.md").read_text()
  assert "ot measured yet" not in text
  lines = text.splitlines()
  for row in study.rows:  # in a table of drift and in one of content
    assert sum(line.startswith(f"| {row.label} |") for line in lines) >= 2
  report = json.loads((files.place / f"{name}.json").read_text())
  assert [r["label"] for r in report["rows"]] == [r.label for r in study.rows]
  charts = [name, f"{name}_curves"]
  if study.analysis:
    charts.append(f"{name}_{study.analysis}")
    assert set(report["analysis"]) == {"0"}
  for chart in charts:
    png = (files.place / f"{chart}.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert f"![{chart}.png]({chart}.png)" in text
