"""The launchers of launch/, run without what they would start."""

import shutil
import subprocess

import programs

LAUNCH = programs.ROOT / "launch"
# Words that a shell, YAML or a template would take for their own.
COMMAND = ["avd", "train", "--config=a b", "--workdir", '/runs/$x "y" \\ &']
TPU = (
  "tpu", "--name", "run-1", "--accelerator", "tpu-v6e-slice",
  "--topology", "4x4",
)  # fmt: skip
GPU = (
  "gpu", "--name", "run-1", "--accelerator", "nvidia-h100-80gb",
  "--hosts", "2",
)  # fmt: skip


def run(script, *arguments, **variables):
  """A script, with no variables but those given, and no program in reach.

  Nothing can be started by it, should --dry-run fail to hold it back.
  """
  return subprocess.run(
    [shutil.which("bash"), str(LAUNCH / script), *arguments],
    env={"PATH": "/nowhere"} | variables,
    stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20,
  )  # fmt: skip


def dry_run(script, *arguments, command=COMMAND, **variables):
  """What a script would do, for a command or, where it takes none, without."""
  rest = ["--", *command] if command else []
  done = run(script, *arguments, "--dry-run", *rest, **variables)
  assert done.returncode == 0, done.stderr
  assert not done.stderr
  return done.stdout
