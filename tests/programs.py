"""Programs run as a user runs them: in processes of their own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "tests" / "tiny_config.py")
AVD = (sys.executable, "-m", "avd_jax.cli.main")


def environment():
  """This process's, but for the devices it pretends to have."""
  return os.environ | {"XLA_FLAGS": "", "COLUMNS": "80"}


def run(*command, timeout=240):
  """Runs a command to its end: its stdout, stderr and returncode."""
  return subprocess.run(
    command,
    cwd=ROOT,
    env=environment(),
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=timeout,
  )


@contextlib.contextmanager
def started(*command):
  """A command in the background, in a session of its own, ended on leaving."""
  process = subprocess.Popen(
    command,
    cwd=ROOT,
    env=environment(),
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )
  try:
    yield process
  finally:
    # Asked first: a launcher, killed, could not end what it has launched.
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
      if process.poll() is None:
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
          process.communicate(timeout=10)
    process.stdout.close()


def rows(workdir):
  """What a run has logged so far, a dictionary an interval."""
  path = Path(workdir) / "metrics.jsonl"
  if not path.exists():
    return []
  lines = path.read_text().splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_step(process, workdir, step, timeout=180):
  """Returns once a training process has logged a step."""
  end = time.monotonic() + timeout
  while not (logged := rows(workdir)) or logged[-1]["step"] < step:
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < end, f"step {step} not reached: {logged}"
    time.sleep(0.05)
