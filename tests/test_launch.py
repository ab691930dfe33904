"""Several processes train as one: the same numbers, one end for all."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import programs
import pytest

from avd_jax import config as config_lib
from avd_jax import parallel
from avd_jax.errors import UserError
from avd_jax.training import loop

LOCAL = str(programs.ROOT / "launch" / "local.sh")
# Beside this Python, whether or not its environment is active.
SHELLCHECK = shutil.which(
  "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
)
CHANGES = (
  "--config.stages=('resampling_forcing',)",
  "--config.model.text=none",
)
STEPS = "--config.stage.resampling_forcing.steps="


def checkpoint_steps(workdir):
  names = [path.name for path in (workdir / "checkpoints").iterdir()]
  return sorted(int(name) for name in names if name.isdigit())


def test_two_processes_train_as_one_stop_together_and_die_together(tmp_path):
  workdir = tmp_path / "two"
  # Each process leaves its id, so that one of them can be shot.
  leave_id = f'echo $$ > "{tmp_path}/id_$AVD_PROCESS_ID"; exec "$@"'
  command = [
    LOCAL, "2", "bash", "-c", leave_id, "avd",
    *programs.AVD, "train", "--config", programs.TINY,
    "--workdir", str(workdir), *CHANGES, STEPS + "100000",
    "--config.log.checkpoint_every=1000000",
  ]  # fmt: skip

  with programs.started(*command) as process:
    programs.wait_for_step(process, workdir, 4)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
  assert process.returncode == 130, output
  assert output.count("everything is saved") == 2, output
  assert "Traceback" not in output
  (stopped,) = checkpoint_steps(workdir)
  assert stopped >= 4

  config = config_lib.load(programs.TINY, [*CHANGES, STEPS + "4"])
  mesh = parallel.make_mesh(jax.devices()[:1], (1, 1, 1, 1))
  loop.train(config, tmp_path / "one", mesh, progress=False)
  one, two = programs.rows(tmp_path / "one"), programs.rows(workdir)
  assert [row["step"] for row in one] == [1, 2, 3, 4]
  for alone, together in zip(one, two, strict=False):
    for name in ("step", "loss", "grad_norm", "history_error"):
      assert together[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-6)

  # The same command goes on; then one process is shot.
  with programs.started(*command) as process:
    programs.wait_for_step(process, workdir, stopped + 2)
    other = int((tmp_path / "id_1").read_text())
    os.kill(other, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
  assert process.returncode not in (0, 130), output
  steps = [row["step"] for row in programs.rows(workdir)]
  assert steps == list(range(1, steps[-1] + 1))
  lead = int((tmp_path / "id_0").read_text())
  with pytest.raises(ProcessLookupError):
    os.kill(lead, 0)


def launch(count, script, **options):
  return subprocess.run(
    [LOCAL, str(count), "bash", "-c", script],
    capture_output=True, text=True, timeout=60, **options,
  )  # fmt: skip


def test_each_process_is_told_its_place_and_its_lines_are_marked():
  done = launch(3, 'echo "$AVD_PROCESS_ID/$AVD_NUM_PROCESSES $AVD_COORDINATOR"')
  assert done.returncode == 0
  lines = sorted(done.stdout.splitlines())
  address = lines[0].split()[-1]
  assert address.startswith("127.0.0.1:")
  assert lines == [
    f"0/3 {address}", f"[1] 1/3 {address}", f"[2] 2/3 {address}",
  ]  # fmt: skip


def test_a_process_that_fails_ends_those_that_do_not_listen():
  done = launch(2, 'trap "" TERM; ((AVD_PROCESS_ID)) && exit 3; exec sleep 50')
  assert done.returncode == 3
  assert "stopping the others" in done.stderr


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "usage:"),
    (["two", "avd"], "usage:"),
    (["0", "avd"], "usage:"),
    (["2", "no_such_program"], "error: no_such_program is not a program"),
  ],
)
def test_wrong_use_is_told_in_a_line(arguments, message):
  done = subprocess.run([LOCAL, *arguments], capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr.startswith(message)
  assert done.stderr.count("\n") == 1


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", ["launch/local.sh", ".ci/run"])
def test_the_scripts_are_clean(script):
  done = subprocess.run(
    [SHELLCHECK, programs.ROOT / script], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout


@dataclasses.dataclass(frozen=True)
class Device:
  """What a mesh needs to know of a device elsewhere."""

  id: int
  process_index: int
  platform: str = "cpu"


def mesh_of(processes, shape):
  devices = [Device(i, process) for i, process in enumerate(processes)]
  return parallel.make_mesh(devices, shape)


@pytest.mark.parametrize(
  ("processes", "shape", "shares"),
  [
    ([0, 0, 0, 0], (2, 2, 1, 1), [(0, 1)]),
    ([0, 1], (2, 1, 1, 1), [(0, 2), (1, 2)]),
    ([0, 0, 1, 1], (2, 1, 1, 2), [(0, 2), (1, 2)]),
    ([0, 0, 1, 1], (4, 1, 1, 1), [(0, 2), (1, 2)]),
    # A tensor axis across processes: both need the same examples.
    ([0, 1], (1, 1, 1, 2), [(0, 1), (0, 1)]),
    ([0, 1, 2, 3], (2, 1, 1, 2), [(0, 2), (0, 2), (1, 2), (1, 2)]),
  ],
)
def test_processes_read_the_examples_their_devices_hold(
  processes, shape, shares, monkeypatch
):
  mesh = mesh_of(processes, shape)
  for process, share in enumerate(shares):
    monkeypatch.setattr(jax, "process_index", lambda p=process: p)
    assert parallel.batch_share(mesh) == share


def test_examples_cut_apart_are_refused(monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 0)
  with pytest.raises(UserError, match="cuts process 0's examples apart"):
    parallel.batch_share(mesh_of([0, 0, 0, 1, 1, 1], (3, 1, 1, 2)))
