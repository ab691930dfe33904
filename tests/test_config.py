"""Configs: every mistake is one line that names it, before any compute."""

import json

import pytest

from avd_jax import config as config_lib
from avd_jax import disk
from avd_jax.algorithms.histories import Degradation
from avd_jax.data.pipeline import DataConfig
from avd_jax.errors import UserError
from avd_jax.models.dit_config import DiTConfig
from avd_jax.training import program

HEAD = "from avd_jax import config as base\n\n\ndef get_config({}):\n  {}\n"


@pytest.fixture
def file(tmp_path):
  """Writes a config file of the given body; returns its path."""

  def write(body="return base.default()", arguments=""):
    path = tmp_path / "some_config.py"
    path.write_text(HEAD.format(arguments, body.replace("\n", "\n  ")))
    return str(path)

  return write


def refused(path, *overrides):
  """The one line that a config is refused with."""
  with pytest.raises(UserError) as error:
    config_lib.load(path, list(overrides))
  message = str(error.value)
  assert "\n" not in message
  assert message
  return message


# --- what works --------------------------------------------------------------


def test_overrides_reach_every_kind_of_field(file):
  config = config_lib.load(
    file(),
    [
      "--config.model.dim=96",
      "--config.loss.text_dropout=0.5",
      "--config.data.path=some where",
      "--config.stage.resampling_forcing.degradation.tell=True",
      "--config.stages=('teacher_forcing',)",
      # None by default: no type to be read off the value.
      "--config.model.attention.window=3",
      "--config.model.attention.sink=1",
      "--config.model.spatial_embedding=(2,2)",
      "--config.data.fps=12",
    ],
  )
  assert config.model.dim == 96
  assert config.loss.text_dropout == 0.5
  assert config.data.path == "some where"
  assert config.stage.resampling_forcing.degradation.tell is True
  assert config.stages == ("teacher_forcing",)
  model = config_lib.typed(DiTConfig, config.model)
  assert (model.attention.window, model.attention.sink) == (3, 1)
  assert model.spatial_embedding == (2, 2)
  assert config_lib.typed(DataConfig, config.data).fps == 12.0


def test_overrides_win_over_the_file_and_leave_the_rest(file):
  path = file("config = base.default()\nconfig.model.dim = 32\nreturn config")
  assert config_lib.load(path, []).model.dim == 32
  assert config_lib.load(path, ["--config.model.dim=48"]).model.dim == 48
  assert config_lib.load(path, []).model.dim == 32


def test_a_file_may_take_an_argument(file):
  body = "config = base.default()\nconfig.seed = int(seed)\nreturn config"
  assert config_lib.load(file(body, "seed") + ":7", []).seed == 7


def test_defaults_are_the_dataclasses_own():
  config = config_lib.default()
  assert config_lib.typed(DataConfig, config.data) == DataConfig()
  stage = config.stage.resampling_forcing.degradation
  assert config_lib.typed(Degradation, stage) == Degradation()
  config_lib.check(config)


def test_what_is_allowed_is_what_there_is():
  assert set(config_lib.HISTORIES) == set(program.HISTORIES)
  for name in program.LEVELS:
    config = config_lib.default()
    config.loss.levels = name
    config_lib.check(config)


def test_a_config_survives_its_file(file):
  path = "--config.model.spatial_embedding=(2,2)"
  config = config_lib.load(file(), [path, "--config.data.fps=8"])
  values = config_lib.to_json(config)
  back = config_lib.from_json(json.loads(json.dumps(values)))
  assert config_lib.to_json(back) == values
  assert back.stages == config.stages
  assert config_lib.typed(DiTConfig, back.model) == config_lib.typed(
    DiTConfig, config.model
  )
  config_lib.check(back)


def test_differences_name_fields_but_not_free_ones():
  old = config_lib.default()
  new = config_lib.default()
  new.log.every, new.sampling.steps, new.mesh.fsdp = 7, 3, 2
  new.data.num_workers, new.evaluation.videos = 2, 5
  compare = lambda: config_lib.differences(
    config_lib.to_json(old), config_lib.to_json(new)
  )
  assert compare() == []
  new.model.attention.window, new.stage.teacher_forcing.steps = 3, 9
  assert compare() == [
    "model.attention.window: None -> 3",
    "stage.teacher_forcing.steps: 1200 -> 9",
  ]
  # A field that one of them lacks differs too.
  del new.loss["shift"]
  assert "loss.shift: 3.0 -> None" in compare()


# --- what does not -----------------------------------------------------------


@pytest.mark.parametrize(
  ("override", "said"),
  [
    # Names.
    ("model.dmi=3", "--config.model.dmi: unknown config field"),
    ("modl.dim=3", "--config.modl.dim: unknown config field"),
    ("nope=3", "--config.nope: unknown config field"),
    ("model.dim.x=3", "--config.model.dim.x: unknown config field"),
    ("mesh.pipeline=2", "--config.mesh.pipeline: unknown config field"),
    ("stage.warmup.steps=3", "unknown config field"),
    ("stage.teacher_forcing.degradation.levle=1", "unknown config field"),
    # Types.
    ("model.dim", "write --config.model.dim=VALUE"),
    ("model.dim=wide", "--config.model.dim=wide"),
    ("model.dim=64.5", "--config.model.dim=64.5"),
    ("model.attention.window=2.5", "--config.model.attention.window=2.5"),
    ("seed=now", "--config.seed=now"),
    # Values, one at a time.
    ("seed=-1", "seed -1: at least 0"),
    ("model.dim=63", "model.dim 63 is not divisible by model.num_heads 4"),
    ("model.num_heads=32", "head dim 2"),
    ("model.num_layers=0", "model.num_layers 0"),
    ("model.scan_unroll=0", "model.scan_unroll 0"),
    ("model.text_tokens=0", "model.text_tokens 0"),
    ("model.channels=4", "model.channels 4: videos have 3"),
    ("model.attention.window=0", "window 0"),
    ("model.attention.sink=1", "attention.sink needs model.attention.window"),
    ("model.text=clip", "model.text 'clip' is not one of"),
    ("model.text=embeddings", "model.text 'embeddings' with data.source"),
    ("model.prediction=eps", "model.prediction 'eps'"),
    ("data.frames=0", "frames=0"),
    ("data.batch_size=0", "batch_size=0"),
    ("data.source=disk", "source='disk'"),
    ("loss.levels=beta", "loss.levels 'beta' is not one of logit_normal"),
    ("loss.shift=0.0", "loss.shift 0.0 must be positive"),
    ("loss.text_dropout=1.0", "loss.text_dropout 1.0 is not in [0, 1)"),
    ("loss.skip_chunks=16", "loss.skip_chunks 16 leaves no chunk of 16"),
    ("loss.skip_chunks=-1", "loss.skip_chunks -1: at least 0"),
    ("optimizer.name=sgd", "optimizer.name 'sgd' is not one of adamw, muon"),
    ("optimizer.ema=1.0", "optimizer.ema 1.0 is not in [0, 1)"),
    ("optimizer.clip_norm=0.0", "optimizer.clip_norm 0.0 must be positive"),
    ("optimizer.accumulation=0", "optimizer.accumulation 0: at least 1"),
    ("stages=()", "stages is empty"),
    ("stages=('warmup',)", "stages names 'warmup', but stage has only"),
    ("stage.teacher_forcing.steps=0", "stage.teacher_forcing.steps 0"),
    ("stage.teacher_forcing.history=x", "stage.teacher_forcing.history 'x'"),
    ("stage.teacher_forcing.resampler=x", "stage.teacher_forcing.resampler"),
    ("stage.teacher_forcing.warmup_steps=-1", "warmup_steps -1: at least 0"),
    ("stage.teacher_forcing.decay_steps=-1", "decay_steps -1: at least 0"),
    ("stage.resampling_forcing.degradation.steps=0", "steps 0"),
    ("stage.resampling_forcing.degradation.share=2.0", "share 2.0"),
    ("log.every=0", "log.every 0: at least 1"),
    ("log.checkpoint_every=0", "log.checkpoint_every 0: at least 1"),
    ("log.keep=0", "log.keep 0: at least 1"),
    ("sampling.steps=0", "sampling.steps 0: at least 1"),
    ("sampling.segment=0", "sampling.segment 0: at least 1"),
    ("sampling.shift=0.0", "sampling.shift 0.0 must be positive"),
    ("sampling.solver=rk4", "sampling.solver 'rk4' is not one of euler, heun"),
    ("evaluation.videos=0", "evaluation.videos 0: at least 1"),
    ("evaluation.given=-1", "evaluation.given -1: at least 0"),
    ("evaluation.given=128", "evaluation.frames 128 must exceed"),
    # Sizes that must fit each other.
    ("data.height=13", "frames of 13x12 are not divisible by model.patch 6"),
    ("model.patch=5", "frames of 12x12 are not divisible by model.patch 5"),
    ("model.chunk_frames=3", "data.frames 16 is not divisible by"),
    ("evaluation.frames=127 --config.model.chunk_frames=2",
     "evaluation.frames 127 is not divisible by"),
    ("evaluation.given=3 --config.model.chunk_frames=2",
     "evaluation.given 3 frames is not a whole number of chunks"),
    ("model.spatial_embedding=(3,3)",
     "model.spatial_embedding (3, 3) must be the frame's grid of tokens"),
  ],
)  # fmt: skip
def test_a_mistake_in_an_argument(file, override, said):
  assert said in refused(file(), *f"--config.{override}".split())


STAGE = "stage.resampling_forcing"


@pytest.mark.parametrize(
  ("override", "said"),
  [
    # Histories.
    ("S.history=resampled", "S.history 'resampled' is not one of ground_truth"),
    ("S.degradation.shift=0.0", "shift 0.0 must be positive"),
    ("S.degradation.clean_prefix=-1", "clean_prefix -1 at least 0"),
    ("S.degradation.ramp_steps=-1", "ramp_steps -1"),
    ("S.degradation.full_every=-1", "full_every -1 must be at least 0"),
    ("S.degradation.full_every=4", "full_every needs detached=True"),
    ("S.degradation.detached=True S.history=parallel_resampled",
     "S.degradation.detached hands on a rollout's cache"),
    ("S.degradation.detached=True loss.history_dropout=0.1",
     "S.degradation.detached keeps the history in a cache, where"
     " loss.history_dropout cannot replace it"),
    ("S.degradation.detached=True S.objective=consistency",
     "S.degradation.detached keeps the history in a cache of the student's"),
    ("loss.history_dropout=1.0", "loss.history_dropout 1.0 is not in [0, 1)"),
    # Banks.
    ("S.bank.buckets=0", "bank: buckets 0"),
    ("S.bank.size=0", "size 0 must be at least 1"),
    ("S.bank.input_share=1.5", "bank: input_share 1.5 is not in [0, 1]"),
    ("S.bank.jitter=-0.5", "bank: jitter -0.5 is not in [0, 1]"),
    ("S.history=error_bank S.bank.size=15 data.batch_size=32"
     " optimizer.accumulation=2",
     "S.bank.size 15 is smaller than the 16 errors"),
    ("S.history=error_bank S.objective=consistency",
     "history 'error_bank' collects errors of objective 'flow_matching'"),
    ("S.history=error_bank stage.teacher_forcing.history=error_bank"
     " S.bank.size=99",
     "stages teacher_forcing, resampling_forcing have banks of different"),
    # Objectives.
    ("S.objective=gan", "S.objective 'gan' is not one of flow_matching"),
    ("S.objective=diffusion_forcing",
     "S: objective 'diffusion_forcing' has one stream"),
    ("S.consistency.steps=1", "consistency: steps 1 must be at least 2"),
    ("S.consistency.shift=0.0", "shift 0.0"),
    ("S.consistency.min_t=0.0", "min_t 0.0 positive"),
    ("S.dmd.steps=0", "dmd: steps 0 and critic_updates 5 must be at least 1"),
    ("S.dmd.critic_learning_rate=0.0", "dmd: critic_learning_rate 0.0 must be"),
    ("S.dmd.shift=-1.0", "dmd: shift -1.0 must be positive"),
    ("S.dmd.least_level=0.99", "least_level 0.99 and most_level 0.98 must ris"),
    ("S.objective=dmd", "S: objective 'dmd' makes its history itself"),
    ("S.objective=dmd S.history=ground_truth S.degradation.detached=True",
     "S: objective 'dmd' makes its history itself"),
    ("S.objective=dmd S.history=ground_truth loss.history_dropout=0.1",
     "S: objective 'dmd' keeps the history in a cache"),
    ("S.objective=dmd S.history=ground_truth S.degradation.clean_prefix=99",
     "99 given chunks of"),
    ("S.objective=dmd S.history=ground_truth S.dmd.guidance=3.0"
     " model.text=none",
     "S.dmd.guidance 3.0 leads away from the null text"),
    ("S.objective=dmd S.history=ground_truth optimizer.accumulation=2",
     "S: objective 'dmd' trains its critic on what it makes"),
    ("S.objective=dmd S.history=ground_truth sampling.guidance=2.0",
     "S: objective 'dmd' makes a student that is sampled without guidance"),
    ("S.objective=dmd S.history=ground_truth S.dmd.shift=5.0",
     "S.dmd.shift 5.0 is not sampling.shift 1.0"),
    # Sampling.
    ("sampling.history_level=0.0", "sampling.history_level 0.0 must be posit"),
    ("sampling.history_level=1.5", "sampling.history_level 1.5 is not in"),
    ("sampling.context_noise=1.0", "sampling.context_noise 1.0 is not in"),
    ("sampling.context_noise=-0.1", "sampling.context_noise -0.1 is not in"),
    ("sampling.context_told=1.0", "sampling.context_told 1.0 is not in [0, 1)"),
    ("sampling.context_told=-0.1", "sampling.context_told -0.1 is not in"),
    ("sampling.recompute=4 sampling.recompute_keep=4",
     "sampling.recompute 4 chunks must exceed sampling.recompute_keep 4"),
    ("sampling.recompute=0", "sampling.recompute 0 chunks must exceed"),
    ("sampling.recompute_keep=0", "sampling.recompute_keep 0: at least 1"),
  ],
)  # fmt: skip
def test_a_mistake_in_a_method(file, override, said):
  arguments = [
    f"--config.{part.replace('S.', STAGE + '.')}" for part in override.split()
  ]
  said = said.replace("S.", STAGE + ".").replace("S:", STAGE + ":")
  assert said in refused(file(), *arguments)


def test_methods_that_go_together_are_allowed(file):
  """What stands next to the refusals above."""
  for override in (
    "S.degradation.detached=True S.degradation.full_every=4",
    "S.history=error_bank S.bank.size=16 data.batch_size=32"
    " optimizer.accumulation=2",
    "S.history=ground_truth S.objective=diffusion_forcing",
    "S.objective=consistency loss.history_dropout=0.1",
    "S.objective=dmd S.history=ground_truth S.dmd.guidance=3.0",
    "S.objective=dmd S.history=ground_truth S.dmd.shift=5.0 sampling.shift=5.0",
    "sampling.recompute=2 sampling.context_noise=0.1 sampling.context_told=0.2",
  ):
    arguments = [
      f"--config.{part.replace('S.', STAGE + '.')}" for part in override.split()
    ]
    config = config_lib.load(file(), arguments)
    back = config_lib.from_json(config_lib.to_json(config))
    config_lib.check(back)
  config_lib.override(
    config,
    ["--config.sampling.recompute=None", "--config.sampling.context_told=none"],
  )
  assert config.sampling.recompute is None
  assert config.sampling.context_told is None
  # A bank of another shape in a stage that has none of its own.
  config.stage.resampling_forcing.history = "error_bank"
  config.stage.teacher_forcing.bank.size = 99
  config_lib.check(config)


@pytest.mark.parametrize(
  ("body", "said"),
  [
    ("return base.defualt()", "AttributeError"),
    ("return (", "SyntaxError"),
    ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
    ("1 / 0", "ZeroDivisionError"),
    ("return 3", "get_config must return a ConfigDict"),
    ("config = base.default()", "get_config must return a ConfigDict"),
    ("config = base.default()\nconfig.model.dim = 'x'", "TypeError"),
  ],
)
def test_a_mistake_in_a_file(file, body, said):
  message = refused(file(body))
  assert said in message
  assert "some_config.py" in message


@pytest.mark.parametrize(
  "place",
  [
    "model", "data", "loss", "optimizer", "mesh", "log", "sampling",
    "evaluation", "stage.teacher_forcing",
    "stage.resampling_forcing.degradation",
  ],
)  # fmt: skip
def test_a_file_cannot_invent_a_field(file, place):
  """A misspelt field would be ignored without a word."""
  body = f"config = base.default()\nconfig.{place}.spede = 1\nreturn config"
  message = refused(file(body))
  assert "unknown config field" in message
  assert "spede" in message


def test_a_file_cannot_lose_a_field(file):
  body = "config = base.default()\ndel config.loss['shift']\nreturn config"
  assert "missing config field loss.shift" in refused(file(body))
  body = "config = base.default()\ndel config['log']\nreturn config"
  assert "missing config field log" in refused(file(body))


def test_missing_files_are_named(tmp_path):
  path = str(tmp_path / "none.py")
  assert refused(path) == f"config {path} does not exist; see configs/ for" + (
    " examples"
  )
  (tmp_path / "empty.py").write_text("")
  assert "get_config" in refused(str(tmp_path / "empty.py"))
  assert "does not exist" in refused(str(tmp_path))


def test_json_that_is_missing_or_damaged_is_named(tmp_path):
  path = tmp_path / "config.json"
  with pytest.raises(UserError, match=r"config\.json does not exist"):
    disk.read_json(path)
  path.write_text('{"seed": ')
  with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
    disk.read_json(path)


def test_a_run_of_an_older_version_is_read_as_one_of_today(file):
  """Fields that configs have learned since have the values they default to."""
  config = config_lib.load(file(), [])
  now = config_lib.to_json(config)
  old = json.loads(json.dumps(now))
  for stage in old["stage"].values():
    del stage["dmd"]
  del old["sampling"]["recompute"], old["bagger"]
  old["model"]["attention"].pop("sink")
  assert config_lib.complete(old) == now
  config_lib.check(config_lib.from_json(config_lib.complete(old)))
  # What it does not know stays, to be refused.
  old["data"]["colour"] = "blue"
  assert config_lib.complete(old)["data"]["colour"] == "blue"
  vae = config_lib.to_json(config_lib.vae_default())
  del vae["loss"]["kl"]
  assert config_lib.complete(vae) == config_lib.to_json(
    config_lib.vae_default()
  )
