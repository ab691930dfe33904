"""Two processes of two devices each: one dies, and the run ends the same.

Minutes of compiling: AVD_TEST_ALL=1 runs it.
"""

import os
import shutil
import signal

import jax
import numpy as np
import programs
import pytest

from avd_jax import config as config_lib
from avd_jax import parallel
from avd_jax.training import loop

pytestmark = pytest.mark.skipif(
  not os.environ.get("AVD_TEST_ALL"), reason="AVD_TEST_ALL=1 runs it"
)
LOCAL = str(programs.ROOT / "launch" / "local.sh")
STEPS = 24
CHANGES = (
  "--config.stages=('resampling_forcing',)",
  f"--config.stage.resampling_forcing.steps={STEPS}",
  "--config.model.num_heads=2",
  "--config.log.checkpoint_every=8",
  "--config.log.keep=9",
)


def command(tmp_path, workdir):
  """Each process leaves its id, so that one of them can be shot."""
  script = (
    f'echo $$ > "{tmp_path}/id_$AVD_PROCESS_ID"; export JAX_NUM_CPU_DEVICES=2;'
    ' exec "$@"'
  )
  return [
    LOCAL, "--restarts", "1", "2", "bash", "-c", script, "avd", *programs.AVD,
    "train", "--config", programs.TINY, "--workdir", str(workdir), *CHANGES,
    "--config.mesh.data=4",
  ]  # fmt: skip


def numbers(workdir):
  """What was logged, without how fast it went."""
  rows = programs.rows(workdir)
  return [{k: v for k, v in r.items() if k != "steps_per_second"} for r in rows]


def end_of(workdir, config):
  """Every array of a finished run's state."""
  mesh = parallel.make_mesh(jax.devices()[:1], (1, 1, 1, 1))
  state = loop.train(config, workdir, mesh, progress=False)
  return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def test_a_process_dies_and_the_run_ends_the_same_on_any_mesh(tmp_path):
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  done = programs.run(*command(tmp_path, whole))
  assert done.returncode == 0, done.stderr

  with programs.started(*command(tmp_path, broken)) as process:
    programs.wait_for_step(process, broken, 12)
    os.kill(int((tmp_path / "id_1").read_text()), signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
  assert process.returncode == 0, output
  assert "restart 1 of 1" in output
  assert numbers(broken) == numbers(whole)
  config = config_lib.load(programs.TINY, list(CHANGES))
  ends, again = end_of(whole, config), end_of(broken, config)
  assert all(map(np.array_equal, ends, again))

  for shape in ((8, 1, 1, 1), (1, 4, 1, 2)):
    workdir = tmp_path / "_".join(map(str, shape))
    shutil.copytree(broken, workdir)
    for step in (16, STEPS):
      shutil.rmtree(workdir / "checkpoints" / str(step))
    mesh = parallel.make_mesh(jax.devices(), shape)
    loop.train(config, workdir, mesh, progress=False)
    after = [row for row in programs.rows(workdir) if row["step"] <= 16]
    assert programs.rows(workdir)[-1]["step"] == STEPS
    for row, same in zip(after, programs.rows(whole), strict=False):
      assert row["loss"] == pytest.approx(same["loss"], rel=1e-4)
