"""BAgger ends the same wherever it is killed, and by whatever."""

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import bagger_runs
import jax
import programs
import pytest
from bagger_config import get_config
from bagger_runs import assert_each_once, assert_same_result, manifest, run

from avd_jax import disk, sampling
from avd_jax.bagger.rollouts import Rollouts
from avd_jax.data import aggregate, pipeline
from avd_jax.training import loop


@pytest.fixture(scope="module", autouse=True)
def compiled():
  """Trainings of one config share their compiled steps."""
  with bagger_runs.shared_programs():
    yield


@pytest.fixture
def whole():
  """The workdir of a run that nothing interrupted."""
  return bagger_runs.whole()


class Killed(BaseException):
  """Stands for a process that ends here."""


def before(module, name, which):
  """Ends the process where it would call a function."""
  real = getattr(module, name)

  def dying(*args, **options):
    if which(*args):
      raise Killed
    return real(*args, **options)

  return module, name, dying


def after(module, name, which):
  """Ends the process when a function has returned."""
  real = getattr(module, name)

  def dying(*args, **options):
    out = real(*args, **options)
    if which(*args):
      raise Killed
    return out

  return module, name, dying


def torn_shard(name):
  """Ends the process when half of a shard is written."""
  real = aggregate.write_shard

  def dying(file, records):
    def half():
      yield records[0]
      raise Killed

    real(file, half() if file.name.startswith(name) else records)

  return aggregate, "write_shard", dying


def at_batch(index, rounds):
  """Ends the process at a batch of a round's training."""
  real = pipeline.batches

  def batches(cfg, source, start, *share):
    for step, batch in enumerate(real(cfg, source, start, *share), start):
      if step == index and cfg.aggregate_rounds == rounds:
        raise Killed
      yield batch

  return pipeline, "batches", batches


def written(file):
  return lambda path, values: str(path).endswith(file)


def of_shard(name):
  return lambda file, records: file.name.startswith(name)


KILLS = {
  "training the base": lambda: at_batch(3, 0),
  "planning": lambda: before(disk, "write_json", written("1/plan.json")),
  "writing a shard": lambda: torn_shard("round_01_batch_00000"),
  "rolling out": lambda: before(
    aggregate, "write_shard", of_shard("round_01_batch_00001")
  ),
  "finishing the store": lambda: before(
    disk, "write_json", written("store/round_01.json")
  ),
  "after the store": lambda: after(
    disk, "write_json", written("store/round_01.json")
  ),
  "training": lambda: at_batch(3, 1),
  "before the manifest": lambda: before(
    disk, "write_json", written("1/manifest.json")
  ),
  "between rounds": lambda: after(
    disk, "write_json", written("1/manifest.json")
  ),
  "in the second round": lambda: after(
    aggregate, "write_shard", of_shard("round_02_batch_00001")
  ),
  "training again": lambda: at_batch(1, 2),
}


def test_killed_everywhere_it_ends_as_if_it_was_not(whole, tmp_path):
  """One run, killed at one place after the other, then given another round."""
  config = get_config()
  config.bagger.rounds = 1
  for name, kill in KILLS.items():
    if name == "in the second round":
      run(config, tmp_path)
      assert not (tmp_path / "round_2").exists()
      config = get_config()
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(*kill())
      with pytest.raises(Killed):
        run(config, tmp_path)
        pytest.fail(f"not killed: {name}")
  run(config, tmp_path)
  assert_same_result(whole, tmp_path)
  assert_each_once(tmp_path, config)


CHILD = """
import conftest, sys
import bagger_runs as t
t.run(t.get_config(), sys.argv[1])
"""


@contextlib.contextmanager
def child(workdir):
  """A run in a process of its own, killed outright on leaving."""
  process = subprocess.Popen(
    [sys.executable, "-c", CHILD, str(workdir)], cwd=Path(__file__).parent
  )
  try:
    yield process
  finally:
    process.kill()
    process.wait()


def test_a_process_killed_outright_resumes(whole, tmp_path):
  shutil.copytree(whole / "base", tmp_path / "base")
  store, train = tmp_path / "store", tmp_path / "round_1" / "train"
  for happened in (
    lambda: list(store.glob("round_01_batch_*")),
    lambda: len(programs.rows(train)) >= 2,
  ):
    with child(tmp_path) as process:
      end = time.monotonic() + 120
      while not happened():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.002)
    assert process.returncode == -signal.SIGKILL
  assert not (tmp_path / "round_2" / "manifest.json").exists()
  run(get_config(), tmp_path)
  assert_same_result(whole, tmp_path)
  assert_each_once(tmp_path, get_config())


def make(rollouts, workdir):
  """The rollouts of the first round."""
  source = {"workdir": "base", "step": 4}
  rollouts.make(1, workdir / "base", source, progress=False)


def test_ctrl_c_in_the_rollouts_stops_after_a_batch(whole, tmp_path):
  rollouts = Rollouts(get_config(), tmp_path)
  real = aggregate.write_shard

  def interrupted(file, records):
    real(file, records)
    signal.raise_signal(signal.SIGINT)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(aggregate, "write_shard", interrupted)
    with pytest.raises(loop.Interrupted, match="rollouts of round 1"):
      make(rollouts, whole)
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ["round_01_batch_00000.array_record", "store.json"]
  # A disk may lose what it said it had: half a shard is no shard.
  shard = tmp_path / names[0]
  shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
  make(rollouts, whole)
  assert aggregate.shards(tmp_path, 1) == manifest(whole, 1)["shards"]


def test_processes_share_the_batches_of_a_round(whole, tmp_path, monkeypatch):
  """Process 1 of 2 makes the second batch, process 0 the first, and ends it."""
  rollouts = Rollouts(get_config(), tmp_path)
  sampler = sampling.load(whole / "base")
  # Reading checkpoints, and waiting, would need the other process.
  monkeypatch.setattr(sampling, "load", lambda workdir: sampler)
  monkeypatch.setattr("avd_jax.bagger.rollouts._wait", lambda done: None)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  make(rollouts, whole)
  assert [file.exists() for file in rollouts.files(1)] == [False, True]
  monkeypatch.setattr(jax, "process_index", lambda: 0)
  make(rollouts, whole)
  assert aggregate.shards(tmp_path, 1) == manifest(whole, 1)["shards"]


def test_a_process_that_has_its_batches_opens_the_weights_too(
  whole, tmp_path, monkeypatch
):
  """Reading checkpoints has a barrier: all processes come, or all hang."""
  rollouts, opened = Rollouts(get_config(), tmp_path), []
  sampler = sampling.load(whole / "base")

  def load(workdir):
    opened.append(workdir)
    return sampler

  monkeypatch.setattr(sampling, "load", load)
  monkeypatch.setattr("avd_jax.bagger.rollouts._wait", lambda done: None)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  make(rollouts, whole)
  make(rollouts, whole)  # resumed, while the other one lacks its batch
  assert opened == [whole / "base"] * 2
