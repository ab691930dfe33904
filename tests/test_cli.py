"""The command line: what it says, what it refuses, and a whole run of it."""

import functools
import json
import os
import shutil
import signal
import sys

import jax
import numpy as np
import programs
import pytest

from avd_jax import sampling
from avd_jax.cli import main as cli
from avd_jax.data import video

VIDEO = "--config.data.source=video"


def said(capsys, *arguments):
  """What a mistaken command prints: a line to stderr, exit code 2."""
  capsys.readouterr()
  assert cli.main([str(a) for a in arguments]) == 2
  captured = capsys.readouterr()
  assert captured.err.startswith("error: ")
  assert captured.err.count("\n") == 1, captured.err
  assert captured.out == ""
  return captured.err


def moving_square(path, frames=12, seed=0):
  """A clip of a square that moves over a plain background."""
  colours = np.random.default_rng(seed).integers(0, 256, (2, 3))
  film = np.empty((frames, 24, 32, 3), np.uint8)
  film[:] = colours[0]
  for i in range(frames):
    film[i, 8:16, i : i + 8] = colours[1]
  video.write_video(path, film, fps=8.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Clips with captions; one of them damaged, one too short."""
  path = tmp_path_factory.mktemp("clips")
  for i in range(4):
    moving_square(path / f"{i}.mp4", seed=i)
    (path / f"{i}.txt").write_text(f"square {i}")
  (path / "damaged.mp4").write_bytes(b"not a video")
  moving_square(path / "short.mp4", frames=2)
  return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A run on tiny worlds that was stopped by Ctrl-C and went on to its end."""
  workdir = tmp_path_factory.mktemp("cli") / "run"
  command = [
    *programs.AVD, "train", "--config", programs.TINY, "--workdir",
    str(workdir), "--config.stage.teacher_forcing.steps=120",
    "--config.log.checkpoint_every=100000",
  ]  # fmt: skip
  with programs.started(*command) as process:
    programs.wait_for_step(process, workdir, 2)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
  assert process.returncode == 130, output
  assert "Traceback" not in output
  logged = programs.rows(workdir)[-1]["step"]
  saved = [int(p.name) for p in (workdir / "checkpoints").iterdir()]
  assert saved == [logged]
  assert f"stopped at step {saved[0]} of 122, everything is saved" in output
  assert saved[0] < 120

  done = programs.run(*command)
  assert done.returncode == 0, done.stderr
  steps = [row["step"] for row in programs.rows(workdir)]
  assert steps == list(range(1, steps[-1] + 1))
  assert steps[-1] >= 121
  return workdir


def test_help_fits_a_screen_and_is_there_at_once():
  script = (
    "import sys\n"
    "from avd_jax.cli import main\n"
    "for command in [[], *([c] for c in main.COMMANDS)]:\n"
    "  try: main.main([*command, '--help'])\n"
    "  except SystemExit as end: assert end.code == 0\n"
    "  print('\\f')\n"
    "slow = {'jax', 'numpy', 'flax', 'av', 'ml_collections'}\n"
    "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
  )
  done = programs.run(sys.executable, "-c", script)
  assert done.returncode == 0, done.stderr
  screens = done.stdout.split("\f\n")[:-1]
  assert len(screens) == 1 + len(cli.COMMANDS)
  for screen, name in zip(screens, ("avd [-h]", *cli.COMMANDS), strict=True):
    assert name in screen.splitlines()[0]
    assert len(screen.splitlines()) <= 32
    assert max(map(len, screen.splitlines())) <= 80


@pytest.mark.parametrize(
  "arguments",
  [
    [],
    ["fly"],
    ["train", "--workdir", "x"],
    ["sample", "--workdir", "x", "--out", "x.mp4", "--seeds=1"],
    [
      "train",
      "--config",
      programs.TINY,
      "--workdir",
      "x",
      "--config",
      "y",
      "z",
    ],
  ],
)
def test_a_command_that_is_none(arguments, capsys):
  with pytest.raises(SystemExit) as end:
    cli.main(arguments)
  assert end.value.code == 2
  assert "usage: avd" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (["--config.model.dimm=3"], "--config.model.dimm: unknown config field"),
    (["--config.data.height=abc"], "--config.data.height=abc"),
    (["--config.data.height=13"], "13x12 are not divisible by model.patch 6"),
    (["--config.data.batch_size=9"], "data.batch_size 9 is not divisible"),
    (["--config.mesh.data=3"], "does not fit 8 devices"),
    (["--config.init_from=nowhere"], "workdir nowhere does not exist"),
    ([VIDEO, "--config.data.path=nowhere"], "'nowhere': no such folder"),
    ([VIDEO, "--config.data.path=EMPTY"], "no video in it or below it"),
    ([VIDEO, "--config.data.path=DAMAGED"], "none of its 2 video files can be"),
    ([VIDEO, "--config.data.path=SHORT"], "every video is shorter than a clip"),
  ],
)
def test_what_training_refuses(change, message, tmp_path, capsys):
  for name in ("empty", "damaged", "short"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "notes.txt").write_text("a caption of nothing")
  for i in range(2):
    (tmp_path / "damaged" / f"{i}.mp4").write_bytes(b"not a video")
    moving_square(tmp_path / "short" / f"{i}.mp4", frames=2)
  for name in ("empty", "damaged", "short"):
    change = [c.replace(name.upper(), str(tmp_path / name)) for c in change]
  command = ["train", "--config", programs.TINY, "--workdir", tmp_path / "run"]
  assert message in said(capsys, *command, *change)


def test_a_mistake_corrected_finds_its_workdir_free(tmp_path, capsys):
  command = ["train", "--config", programs.TINY, "--workdir", tmp_path / "run"]
  command += [VIDEO, "--config.data.path=nowhere"]
  said(capsys, *command)
  elsewhere = said(capsys, *command[:-1], "--config.data.path=nowhere_else")
  assert "'nowhere_else': no such folder" in elsewhere


def test_a_config_that_is_none(tmp_path, capsys):
  where = ["--workdir", tmp_path / "run"]
  missing = said(capsys, "train", "--config", tmp_path / "no.py", *where)
  assert "no.py does not exist" in missing
  broken = tmp_path / "broken.py"
  broken.write_text("def get_config(:\n")
  assert "broken.py" in said(capsys, "train", "--config", broken, *where)


def test_a_workdir_that_is_none(tmp_path, capsys):
  config = ["--config", programs.TINY]
  (tmp_path / "file").write_text("")
  said(capsys, "train", *config, "--workdir", tmp_path / "file")
  for command in (["evaluate"], ["sample", "--out", tmp_path / "x.mp4"]):
    command += ["--workdir"]
    assert "does not exist" in said(capsys, *command, tmp_path / "none")
    assert "no checkpoints" in said(capsys, *command, tmp_path)


def test_one_of_several_processes_is_told_so_in_full(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setenv("AVD_NUM_PROCESSES", "2")
  run = ["--workdir", tmp_path / "run"]
  half = said(capsys, "train", "--config", programs.TINY, *run)
  assert "AVD_COORDINATOR" in half
  alone = said(capsys, "sample", "--out", tmp_path / "x.mp4", *run)
  assert "only `avd train` and `avd bagger` run as several" in alone


def test_a_workdir_of_another_config_names_the_fields(trained, capsys):
  command = ["train", "--config", programs.TINY, "--workdir", trained]
  message = said(capsys, *command, "--config.seed=4", "--config.model.dim=32")
  assert "seed: 0 -> 4" in message
  assert "model.dim: 16 -> 32" in message
  assert "stage.teacher_forcing.steps: 120 -> 3" in message


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (["--out", "x.avi"], "--out x.avi: give one of .gif, .mkv, .mp4, .webp"),
    (["--out", "x"], "--out x: give one of"),
    (["--prompt", "a" * 33], "it has 33 bytes, at most 32 fit: 1 would"),
    (["--given", "9"], "--given 9: the run's clips have 3 frames"),
    (["--given", "-1"], "--given -1: at least 0"),
    (["--given", "2", "--frames", "2"], "nothing is left to make"),
    (["--given", "2", "--index", "64"], "--index 64: there are 64 videos"),
    (["--frames", "0"], "--frames 0: at least 1"),
    (["--steps", "0"], "--steps 0: at least 1"),
    (["--scale", "0"], "--scale 0: at least 1"),
    (["--fps", "0"], "--fps 0.0: must be positive"),
    (["--video", "x.mp4"], "--video needs --given"),
    (["--video", "x.mp4", "--given", "1"], "x.mp4: no such file"),
  ],
)
def test_what_sampling_refuses(change, message, trained, tmp_path, capsys):
  out = ["--out", tmp_path / "x.mp4"] * ("--out" not in change)
  assert message in said(capsys, "sample", "--workdir", trained, *out, *change)
  assert not list(tmp_path.iterdir())


def test_what_evaluation_refuses(trained, capsys):
  command = ["evaluate", "--workdir", trained]
  assert "videos 0" in said(capsys, *command, "--videos", 0)
  assert "given 7" in said(capsys, *command, "--given", 7)
  assert "three or more made" in said(capsys, *command, "--frames", 3)


def test_no_repetition_is_no_demo(tmp_path, capsys):
  assert "--seeds 0" in said(capsys, "demo", "--seeds", 0)


@pytest.mark.parametrize("part", ["arrays", "record"])
def test_a_torn_checkpoint_is_named(part, trained, tmp_path, capsys):
  workdir = tmp_path / "torn"
  shutil.copytree(trained, workdir)
  newest = max((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
  if part == "arrays":
    for path in (newest / "ema").rglob("d/*"):
      path.write_bytes(b"")
  else:
    shutil.rmtree(newest / "record")
  out = ["--out", tmp_path / "x.mp4"]
  message = said(capsys, "sample", "--workdir", workdir, *out)
  assert f"checkpoint {newest} cannot be restored" in message
  assert "delete that directory" in message


def test_a_trained_world_is_sampled_and_evaluated(trained, tmp_path):
  out = tmp_path / "clip.mkv"
  out.write_text("a video of before")
  done = programs.run(
    *programs.AVD, "sample", "--workdir", trained, "--out", out, "--given", "2",
    "--frames", "6", "--guidance", "2", "--prompt", "one ball",
    "--prompt", f"two {'b' * 30}@0.3s", "--scale", "2", "--overwrite",
    "--cut-prompts",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert f"wrote {out}: 6 frames, the first 2 given" in done.stdout
  assert "it has 34 bytes, at most 32 fit: 2 are cut" in done.stdout
  assert video.probe(out)[0] == 6
  assert video.probe(out)[2:] == (24, 24)

  done = programs.run(*programs.AVD, "evaluate", "--workdir", trained)
  assert done.returncode == 0, done.stderr
  assert "drift (dB)" in done.stdout
  made = trained / "evaluation"
  assert {p.name for p in made.iterdir()} == {
    "drift.json", "drift.png", "comparison.mp4", "comparison.gif",
    "report.html",
  }  # fmt: skip
  assert set(json.loads((made / "drift.json").read_text())) == {"run"}
  assert video.probe(made / "comparison.mp4").frames == 7


def test_several_devices_evaluate_alike(trained, tmp_path, monkeypatch, capsys):
  """All numbers to 1e-5; what they do not cut evenly is refused at once."""
  load, meshes = sampling.load, []

  def seen(*args, mesh):
    meshes.append(mesh and mesh.size)
    return load(*args, mesh=mesh)

  monkeypatch.setattr(sampling, "load", seen)
  found = []
  for name, change in (("one", []), ("two", ["--config.mesh.context=2"])):
    out = tmp_path / name
    command = ["evaluate", "--workdir", trained, "--out", out, *change]
    assert not cli.main([str(word) for word in command])
    found.append(json.loads((out / "drift.json").read_text())["run"])
  assert meshes == [None, 2]
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, *found)
  change = ["--config.mesh.context=3"]
  message = said(capsys, "evaluate", "--workdir", trained, *change)
  assert "4 tokens of a chunk are not divisible by mesh.context = 3" in message
  assert len(meshes) == 2


def test_a_folder_of_videos_is_trained_sampled_and_evaluated(folder, tmp_path):
  workdir = str(tmp_path / "run")
  done = programs.run(
    *programs.AVD, "train", "--config", programs.TINY, "--workdir", workdir,
    VIDEO, f"--config.data.path={folder}", "--config.data.eval_files=1",
    "--config.model.text=none", "--config.stages=('teacher_forcing',)",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "skipped 2 of 5 files" in done.stderr
  assert "damaged.mp4" in done.stderr

  out = tmp_path / "clip.gif"
  done = programs.run(
    *programs.AVD, "sample", "--workdir", workdir, "--out", out, "--frames",
    "5", "--given", "2", "--video", folder / "1.mp4",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert out.stat().st_size

  done = programs.run(*programs.AVD, "evaluate", "--workdir", workdir)
  assert done.returncode == 0, done.stderr
  made = tmp_path / "run" / "evaluation"
  assert "delta" in json.loads((made / "drift.json").read_text())["run"]
  assert video.probe(made / "comparison.mp4").frames == 7
