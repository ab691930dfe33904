"""Runs of BAgger that tests share, and what two of them must have in common."""

import atexit
import contextlib
import functools
import json
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import programs
import pytest
from bagger_config import get_config

from avd_jax import config as config_lib
from avd_jax import parallel, sampling
from avd_jax.bagger import rounds
from avd_jax.bagger.rollouts import Rollouts
from avd_jax.data import aggregate
from avd_jax.training import loop
from avd_jax.training.program import Program

CONFIG = str(Path(__file__).parent / "bagger_config.py")
PLACES = ("base", "round_1/train", "round_2/train")


def run(config, workdir):
  """A run on one device."""
  mesh = parallel.make_mesh(jax.devices()[:1], (1, 1, 1, 1))
  return rounds.run(config, workdir, mesh, progress=False)


@functools.cache
def _steps(key):
  return {}


@contextlib.contextmanager
def shared_programs():
  """Trainings of one config share their compiled steps."""

  def make(config, mesh):
    program = Program(config, mesh)
    values = config_lib.to_json(config)
    same = {name: values[name] for name in ("model", "loss", "optimizer")}
    program.__dict__["_steps"] = _steps(json.dumps(same, sort_keys=True))
    return program

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "Program", make)
    yield


@functools.cache
def whole():
  """The workdir of a run that nothing interrupted."""
  workdir = Path(tempfile.mkdtemp())
  atexit.register(shutil.rmtree, workdir)
  with shared_programs():
    assert run(get_config(), workdir) == [workdir / p for p in PLACES[1:]]
  return workdir


def contents(workdir):
  """Every file below, with its bytes."""
  return {
    str(path.relative_to(workdir)): path.read_bytes()
    for path in sorted(Path(workdir).rglob("*"))
    if path.is_file()
  }


def manifest(workdir, round):
  """What a round says of itself."""
  return json.loads((workdir / f"round_{round}" / "manifest.json").read_text())


def assert_same_result(workdir, other):
  """Trajectories, losses and weights, bit for bit."""
  for place in PLACES:
    one, two = (sampling.load(w / place).params for w in (workdir, other))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    rows = [programs.rows(w / place) for w in (workdir, other)]
    for row in (*rows[0], *rows[1]):
      row.pop("steps_per_second")
    assert rows[0] == rows[1]
  for round in (1, 2):
    one, two = manifest(workdir, round), manifest(other, round)
    for name in ("shards", "error_by_frame", "source", "step"):
      assert one[name] == two[name]


def assert_each_once(workdir, config):
  """Two rounds of six trajectories, none missing, none twice."""
  found = aggregate.Aggregate(workdir / "store", 2)
  headers = [found.header(i) for i in range(len(found))]
  rollouts = Rollouts(config, workdir / "store")
  for round in (1, 2):
    clips = [h["clip"] for h in headers if h["round"] == round]
    assert sorted(clips) == sorted(rollouts.clips(round))
    assert len(set(clips)) == len(clips) == 6
  assert len(headers) == 12
  assert not list((workdir / "store").glob("*.part"))
