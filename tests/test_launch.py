"""Several processes train as one: the same numbers, one end for all."""

import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import programs
import pytest

from avd_jax import config as config_lib
from avd_jax import parallel
from avd_jax.cli import devices
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


def wait_until(condition, timeout=60):
  end = time.monotonic() + timeout
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.05)


def test_two_processes_train_as_one_stop_together_and_die_together(tmp_path):
  workdir = tmp_path / "two"
  # Each process leaves its id, so that one of them can be shot.
  leave_id = f'echo $$ > "{tmp_path}/id_$AVD_PROCESS_ID"; exec "$@"'
  command = [
    LOCAL, "--restarts", "1", "2", "bash", "-c", leave_id, "avd",
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

  # The same command goes on; then one process is shot, and all start again
  # from what was saved. Shot a second time, they end.
  other = tmp_path / "id_1"
  with programs.started(*command) as process:
    programs.wait_for_step(process, workdir, stopped + 2)
    first = other.read_text()
    os.kill(int(first), signal.SIGKILL)
    wait_until(lambda: other.read_text() not in ("", first))
    before = programs.rows(workdir)
    programs.wait_for_step(process, workdir, before[-1]["step"] + 1)
    again = programs.rows(workdir)
    os.kill(int(other.read_text()), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
  for row, same in zip(before, again, strict=False):
    assert (row["step"], row["loss"]) == (same["step"], same["loss"])
  assert "restart 1 of 1" in output
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


# One process counts the attempts and dies in the first `lives` of them; the
# other waits for it meanwhile, as a collective would.
MORTAL = """
attempt=$(cat "$0/attempts_$AVD_PROCESS_ID" 2>/dev/null || echo 0)
echo $((attempt + 1)) > "$0/attempts_$AVD_PROCESS_ID"
echo "$AVD_COORDINATOR" >> "$0/addresses"
if ((attempt < $1)); then
  ((AVD_PROCESS_ID)) && eval "$2"
  exec sleep 50
fi
echo finished
"""


def run_mortal(tmp_path, lives, death, *options):
  command = ["bash", "-c", MORTAL, str(tmp_path), str(lives), death]
  done = subprocess.run(
    [LOCAL, *options, "2", "--", *command],
    capture_output=True, text=True, timeout=60,
  )  # fmt: skip
  attempts = int((tmp_path / "attempts_0").read_text())
  return done, attempts


KILLED = "kill -9 $$"


def test_a_death_restarts_all_as_often_as_allowed(tmp_path):
  done, attempts = run_mortal(tmp_path, 2, KILLED, "--restarts", "3")
  assert done.returncode == 0, done.stderr
  assert attempts == 3
  assert sorted(done.stdout.split()) == ["[1]", "finished", "finished"]
  assert "restart 2 of 3" in done.stderr
  assert "restart 3 of 3" not in done.stderr
  # A port each, the same for both processes: the last one's may linger.
  addresses = (tmp_path / "addresses").read_text().split()
  assert len(addresses) == 6
  assert len(set(addresses)) == 3


@pytest.mark.parametrize(
  ("death", "options", "code"),
  [
    (KILLED, [], 137),  # no restarts asked for
    (KILLED, ["--restarts", "1"], 137),  # used up
    ("exit 2", ["--restarts", "3"], 2),  # a mistake in the command
  ],
)
def test_restarts_end(tmp_path, death, options, code):
  done, attempts = run_mortal(tmp_path, 9, death, *options)
  assert done.returncode == code
  assert attempts == (2 if options == ["--restarts", "1"] else 1)
  assert "finished" not in done.stdout


def test_what_the_dead_have_started_ends_before_a_restart(tmp_path):
  # Process 1 leaves a child behind, which goes on writing.
  script = """
  if [[ -e "$0/again" ]]; then
    before=$(wc -c < "$0/beats"); sleep 0.4
    (($(wc -c < "$0/beats") == before)) && echo gone
  elif ((AVD_PROCESS_ID)); then
    while sleep 0.1; do echo >> "$0/beats"; done &
    until [[ -s "$0/beats" ]]; do sleep 0.1; done
    touch "$0/again"
    kill -9 $$
  else
    exec sleep 50
  fi
  """
  done = subprocess.run(
    [LOCAL, "--restarts", "1", "2", "bash", "-c", script, str(tmp_path)],
    capture_output=True, text=True, timeout=40,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert sorted(done.stdout.splitlines()) == ["[1] gone", "gone"]


def test_a_stop_that_was_asked_for_is_not_restarted(tmp_path):
  script = f'echo >> "{tmp_path}/up_$AVD_PROCESS_ID"; exec sleep 50'
  command = [LOCAL, "--restarts", "3", "2", "bash", "-c", script]
  with programs.started(*command) as process:
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
  assert process.returncode == 143, output
  assert "restart" not in output
  assert (tmp_path / "up_0").read_text() == "\n"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "usage:"),
    (["--restarts", "2", "avd"], "usage:"),
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
def test_the_check_of_a_change_is_clean():
  script = programs.ROOT / ".ci" / "run"
  done = subprocess.run([SHELLCHECK, script], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


TRAIN = (*programs.AVD, "train", "--config", programs.TINY, "--workdir")


def join(monkeypatch, **variables):
  """`avd train` as one process of several, to be refused: its only line."""
  for name, value in variables.items():
    monkeypatch.setenv(f"AVD_{name}", value)
  done = programs.run(*TRAIN, "/nowhere/run", timeout=60)
  assert done.returncode == 2, done.stderr
  assert "Traceback" not in done.stderr
  return done.stderr.splitlines()[0]


@pytest.mark.parametrize(
  ("index", "message"),
  [
    ("1", "error: process 1 of 3: nothing answered at {} within 1 s"),
    ("0", "error: process 0 of 3: not all 3 processes came to {} within 1 s"),
  ],
)
def test_who_does_not_come_is_reported(index, message, monkeypatch):
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
  told = join(
    monkeypatch,
    COORDINATOR=address, NUM_PROCESSES="3", PROCESS_ID=index, TIMEOUT="1",
  )  # fmt: skip
  assert told.startswith(message.format(address) + " (AVD_TIMEOUT)")
  if index == "0":
    assert "is each told that they are 3 (AVD_NUM_PROCESSES)" in told


def test_a_host_that_nobody_knows_is_reported(monkeypatch):
  told = join(
    monkeypatch, COORDINATOR="nowhere.invalid:1234", NUM_PROCESSES="2",
    PROCESS_ID="1", TIMEOUT="2",
  )  # fmt: skip
  assert "process 1 of 2: nowhere.invalid of nowhere.invalid:1234 is no" in told


GOOD = {"COORDINATOR": "h:1", "NUM_PROCESSES": "2", "PROCESS_ID": "1"}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"COORDINATOR": "here"}, "AVD_COORDINATOR=here is not host:port"),
    ({"COORDINATOR": "auto"}, "auto finds the others itself; unset"),
    ({"PROCESS_ID": None}, "set but not AVD_PROCESS_ID"),
    ({"PROCESS_ID": "2"}, "AVD_PROCESS_ID=2 is not one of AVD_NUM_PROCESSES=2"),
    ({"PROCESS_ID": "-1"}, "AVD_PROCESS_ID=-1 is not one of AVD_NUM_PROC"),
    ({"NUM_PROCESSES": "two"}, "must be numbers"),
    ({"TIMEOUT": "0"}, "AVD_TIMEOUT=0 is not a number of seconds"),
  ],
)
def test_a_wrong_place_is_refused(changes, message, monkeypatch):
  for name, value in (GOOD | changes).items():
    if value is not None:
      monkeypatch.setenv(f"AVD_{name}", value)
  with pytest.raises(UserError, match=re.escape(message)):
    devices.start(several=True)


def test_a_port_that_is_taken_is_refused(monkeypatch):
  with socket.create_server(("", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
    told = join(
      monkeypatch, COORDINATOR=address, NUM_PROCESSES="2", PROCESS_ID="0"
    )
  assert f"cannot listen at AVD_COORDINATOR={address}" in told


def test_no_cluster_to_be_found(monkeypatch):
  told = join(monkeypatch, COORDINATOR="auto", TIMEOUT="60")
  assert "jax finds no other processes from here" in told


@pytest.mark.parametrize(
  ("visible", "tasks", "taken"),
  [
    ("", "1(x2)", None),
    ("0,1,2,3", "1(x2)", [0, 1, 2, 3]),  # the only task of its node
    ("0,1,2,3", "1", [0, 1, 2, 3]),
    ("0,1,2,3", "4(x2)", None),  # jax: the n-th for the n-th task
    ("0,1,2,3", "4,1", None),
    ("3", "4(x2)", [0]),  # bound: the only one in sight
  ],
)
def test_a_slurm_task_takes_its_gpus(visible, tasks, taken, monkeypatch):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
  monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
  assert devices.slurm_devices() == taken
  monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "1")
  assert devices.slurm_devices() is None


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
