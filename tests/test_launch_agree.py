"""Processes that are not told the same are refused before they compile."""

import concurrent.futures
import socket
import threading
import time
from pathlib import Path

import jax
import programs
import pytest

from avd_jax.cli import devices
from avd_jax.errors import UserError

LOCAL = str(programs.ROOT / "launch" / "local.sh")
TRAIN = (*programs.AVD, "train", "--config", programs.TINY, "--workdir")


def told_by_both(done):
  """What each of two processes ends with; the same."""
  assert done.returncode == 2, done.stderr
  lines = (done.stderr + done.stdout).splitlines()
  (first,) = [line for line in lines if line.startswith("error: ")]
  assert f"[1] {first}" in lines
  return first


def test_processes_that_disagree_are_refused_before_they_compile(tmp_path):
  differ = (
    'AVD_NUM_PROCESSES=$((2+AVD_PROCESS_ID)) exec "$@"'
    " --config.stage.teacher_forcing.steps=$((7+AVD_PROCESS_ID))"
  )
  done = programs.run(
    LOCAL, "2", "bash", "-c", differ, "avd", *TRAIN, str(tmp_path / "run")
  )
  told = told_by_both(done)
  assert "must run the same command" in told
  assert (
    "(process 1: AVD_NUM_PROCESSES: 2 -> 3;"
    " config.stage.teacher_forcing.steps: 7 -> 8)"
  ) in told
  assert not (tmp_path / "run").exists()


def test_workdirs_that_are_not_one_are_refused_before_they_compile(tmp_path):
  done = programs.run(
    LOCAL, "2", "bash", "-c",
    'AVD_TIMEOUT=24 exec "$@$AVD_PROCESS_ID"', "avd", *TRAIN,
    f"{tmp_path}/run_",
  )  # fmt: skip
  host = socket.gethostname()
  assert told_by_both(done) == (
    "error: the workdir must be one shared directory, but process 1:"
    f" {host}:{tmp_path}/run_1 is not process 0's {host}:{tmp_path}/run_0"
  )
  assert not list(tmp_path.rglob(".shared*"))
  assert not (tmp_path / "run_1").exists()


class Store:
  """jax's store, for threads of one process."""

  def __init__(self, count):
    self.values = {}
    self.barrier = threading.Barrier(count)

  def key_value_set(self, key, value):
    self.values[key] = value

  def blocking_key_value_get(self, key, wait):
    while key not in self.values:
      assert not self.barrier.broken
      time.sleep(0.01)
    return self.values[key]

  def wait_at_barrier(self, name, wait):
    self.barrier.wait(wait / 1000)

  def key_value_dir_get(self, prefix):
    return [item for item in self.values.items() if item[0].startswith(prefix)]


def share(*workdirs):
  """What processes with these workdirs say, each."""
  store = Store(len(workdirs))

  def one(index):
    group = devices.Group(store, index, 20_000)
    try:
      devices.share_workdir(group, workdirs[index])
    except UserError as error:
      return str(error)
    except BaseException:
      store.barrier.abort()
      raise
    return None

  with concurrent.futures.ThreadPoolExecutor(len(workdirs)) as pool:
    return list(pool.map(one, range(len(workdirs))))


def test_one_workdir_may_have_several_names(tmp_path):
  (tmp_path / "mounted").symlink_to(tmp_path / "run")
  names = tmp_path / "run", tmp_path / "mounted", tmp_path / "run"
  assert share(*names) == [None] * 3
  assert not list((tmp_path / "run").iterdir())


def test_what_a_killed_process_left_is_swept_up(tmp_path):
  (tmp_path / f".shared-{32 * '0'}").touch()
  assert share(tmp_path, tmp_path) == [None, None]
  assert not list(tmp_path.iterdir())


def test_a_process_that_ends_meanwhile_is_told_of(tmp_path):
  class Alone(Store):
    def wait_at_barrier(self, name, wait):
      raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out.")

  group = devices.Group(Alone(1), 0, 20_000)
  with pytest.raises(UserError, match=r"answered within 20 s.*DEADLINE"):
    devices.share_workdir(group, tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_workdir_that_shows_late_is_waited_for(tmp_path, monkeypatch):
  newest, calls = devices._newest, []

  def late(workdir):
    calls.append(workdir)
    return {"checkpoints": 20} if len(calls) == 2 else newest(workdir)

  monkeypatch.setattr(devices, "_newest", late)
  assert share(tmp_path, tmp_path) == [None, None]
  assert len(calls) == 3


@pytest.mark.parametrize("part", ["", "base", "round_2/train"])
def test_other_checkpoints_are_refused(part, tmp_path, monkeypatch):
  monkeypatch.setattr(devices, "PATIENCE", 0.5)
  newest, there = devices._newest, tmp_path / "run" / part / "checkpoints"
  for name in ("8", "20", "40.orbax-checkpoint-tmp"):
    (there / name).mkdir(parents=True)
  (tmp_path / "late").symlink_to(tmp_path / "run")
  monkeypatch.setattr(
    devices, "_newest", lambda path: newest(path) if path.name == "run" else {}
  )
  first, second = share(tmp_path / "run", tmp_path / "late")
  assert first == second
  name = str(Path(part) / "checkpoints")
  assert f"process 1: {socket.gethostname()}:{tmp_path}/late shows" in first
  assert f"({name}: 20 -> None)" in first


def test_a_workdir_that_cannot_be_made_is_told_by_all(tmp_path):
  (tmp_path / "file").touch()
  first, second = share(tmp_path / "file", tmp_path / "file")
  assert first == second
  assert f"process 0: cannot write into {socket.gethostname()}:" in first
