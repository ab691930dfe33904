"""What a user can get wrong in a config, refused by name.

Nothing here computes: whatever is found is found before any compute is spent.
"""

from typing import Any

from ml_collections import ConfigDict

from avd_jax.algorithms.consistency import ConsistencyConfig
from avd_jax.algorithms.dmd import DMDConfig
from avd_jax.algorithms.error_bank import BankConfig
from avd_jax.algorithms.histories import Degradation
from avd_jax.config.base import default, stage, typed, vae_default
from avd_jax.data.pipeline import DataConfig
from avd_jax.diffusion.solvers import SOLVERS
from avd_jax.errors import UserError
from avd_jax.models.dit_config import DiTConfig
from avd_jax.models.vae import VAEConfig

HISTORIES = (
  "ground_truth",
  "noise_augmented",
  "parallel_resampled",
  "self_resampled",
  "error_bank",
)
OBJECTIVES = ("flow_matching", "diffusion_forcing", "consistency", "dmd")

AT_LEAST = {
  "seed": 0,
  "loss.skip_chunks": 0,
  "optimizer.accumulation": 1,
  "log.every": 1,
  "log.checkpoint_every": 1,
  "log.keep": 1,
  "sampling.steps": 1,
  "sampling.segment": 1,
  "sampling.recompute_keep": 1,
  "bagger.rounds": 1,
  "bagger.given": 1,
  "bagger.frames": 0,
  "bagger.batch_size": 1,
  "evaluation.videos": 1,
  "evaluation.given": 0,
}
POSITIVE = (
  "loss.shift",
  "sampling.shift",
  "optimizer.clip_norm",
  "optimizer.muon_ratio",
  "sampling.history_level",
  "bagger.share",
  "bagger.prefix",
)
BELOW_ONE = (
  "loss.text_dropout",
  "loss.history_dropout",
  "loss.clean_context",
  "sampling.context_noise",
  "bagger.prefix",
  "optimizer.ema",
  "optimizer.b1",
  "optimizer.b2",
)


def check(config: ConfigDict, frames: int = 0, trains: bool = True) -> None:
  """Refuses what cannot work, by name.

  Args:
    config: a run's.
    frames: of videos that will be made besides those it trains and evaluates.
    trains: whether its model will be trained, on its data; an imported one may
      be made for other data than there are sources for.

  Raises:
    UserError: the first thing found.
  """
  if "vae" in config:
    _check_vae(config)
    return
  _same_fields("", config, default())
  for name in (
    "loss",
    "optimizer",
    "mesh",
    "log",
    "sampling",
    "evaluation",
    "bagger",
  ):
    _same_fields(name + ".", config[name], default()[name])
  for name, section in config.stage.items():
    _same_fields(f"stage.{name}.", section, stage("", 0))
  model, data = typed(DiTConfig, config.model), typed(DataConfig, config.data)
  _check_ranges(config)
  if config.evaluation.frames <= config.evaluation.given:
    raise UserError(
      f"evaluation.frames {config.evaluation.frames} must exceed"
      f" evaluation.given {config.evaluation.given}"
    )
  grid = model.grid(data.height, data.width)
  if model.spatial_embedding not in (None, grid):
    raise UserError(
      f"model.spatial_embedding {model.spatial_embedding} must be the frame's"
      f" grid of tokens, {grid}, or None"
    )
  latents = data.source == "latents"
  if trains and not latents and model.channels != 3:
    raise UserError(
      f"model.channels {model.channels}: videos have 3 (data.source 'latents'"
      " may have others)"
    )
  if trains and (model.text == "embeddings") != latents:
    raise UserError(
      f"model.text {model.text!r} with data.source {data.source!r}: latents"
      " come with 'embeddings', all others take 'bytes' or 'none'"
    )
  for name, count in (
    ("data.frames", data.frames),
    ("evaluation.frames", config.evaluation.frames),
  ):
    if count % model.chunk_frames:
      raise UserError(
        f"{name} {count} is not divisible by model.chunk_frames"
        f" {model.chunk_frames}"
      )
  chunks = data.frames // model.chunk_frames
  frames = max(data.frames, config.evaluation.frames, frames)
  longest = frames // model.chunk_frames
  model.attention.check_top_k(longest - 1, "videos of the config have")
  if config.loss.skip_chunks >= chunks:
    raise UserError(
      f"loss.skip_chunks {config.loss.skip_chunks} leaves no chunk of {chunks}"
      " to train"
    )
  if config.evaluation.given % model.chunk_frames:
    raise UserError(
      f"evaluation.given {config.evaluation.given} frames is not a whole"
      f" number of chunks of {model.chunk_frames}"
    )
  _one_of("loss.levels", config.loss.levels, ("logit_normal", "uniform"))
  _one_of("optimizer.name", config.optimizer.name, ("adamw", "muon"))
  _one_of("sampling.solver", config.sampling.solver, tuple(SOLVERS))
  if not config.stages:
    raise UserError("stages is empty; name at least one section of stage")
  _check_sampling(config)
  for name in config.stages:
    if name not in config.stage:
      raise UserError(
        f"stages names {name!r}, but stage has only"
        f" {', '.join(sorted(config.stage))}"
      )
    _check_stage(f"stage.{name}", config.stage[name], config)
  _check_banks(config)
  if trains:
    _check_students(config)


def _check_stage(name: str, section: ConfigDict, config: ConfigDict) -> None:
  _one_of(f"{name}.history", section.history, HISTORIES)
  _one_of(f"{name}.objective", section.objective, OBJECTIVES)
  _one_of(f"{name}.resampler", section.resampler, ("online", "ema"))
  options = typed(Degradation, section.degradation)
  bank = typed(BankConfig, section.bank)
  typed(ConsistencyConfig, section.consistency)
  distilled = typed(DMDConfig, section.dmd)
  if section.steps < 1:
    raise UserError(f"{name}.steps {section.steps}: at least 1")
  for field in ("warmup_steps", "decay_steps", "learning_rate"):
    if section[field] < 0:
      raise UserError(f"{name}.{field} {section[field]}: at least 0")
  if section.objective == "diffusion_forcing":
    if section.history != "ground_truth":
      raise UserError(
        f"{name}: objective 'diffusion_forcing' has one stream, whose history"
        f" is its own noisy chunks: leave history at 'ground_truth', not"
        f" {section.history!r}"
      )
    return
  if section.objective == "dmd":
    _check_dmd(name, section, distilled, config)
    return
  if options.detached and section.history != "self_resampled":
    raise UserError(
      f"{name}.degradation.detached hands on a rollout's cache: only history"
      f" 'self_resampled' makes one, not {section.history!r}"
    )
  if options.detached and section.objective == "consistency":
    raise UserError(
      f"{name}.degradation.detached keeps the history in a cache of the"
      " student's keys, which the teacher of objective 'consistency' cannot"
      " read: set it to False"
    )
  if options.detached and section.resampler == "ema":
    raise UserError(
      f"{name}.degradation.detached keeps keys that the EMA weights made, and"
      f" the online ones would query them: set {name}.resampler to 'online'"
    )
  if options.detached and config.loss.history_dropout:
    raise UserError(
      f"{name}.degradation.detached keeps the history in a cache, where"
      " loss.history_dropout cannot replace it: set one of the two to 0"
    )
  if section.history == "error_bank":
    if section.objective != "flow_matching":
      raise UserError(
        f"{name}: history 'error_bank' collects errors of objective"
        f" 'flow_matching', not of {section.objective!r}"
      )
    microbatch = config.data.batch_size // config.optimizer.accumulation
    if bank.size < microbatch:
      raise UserError(
        f"{name}.bank.size {bank.size} is smaller than the {microbatch} errors"
        " that a batch adds (data.batch_size over optimizer.accumulation)"
      )


def _check_dmd(
  name: str, section: ConfigDict, options: DMDConfig, config: ConfigDict
) -> None:
  if section.history != "ground_truth" or section.degradation.detached:
    raise UserError(
      f"{name}: objective 'dmd' makes its history itself, by rolling out: leave"
      " history at 'ground_truth' and degradation.detached at False"
    )
  if config.loss.history_dropout:
    raise UserError(
      f"{name}: objective 'dmd' keeps the history in a cache, where"
      " loss.history_dropout cannot replace it: set it to 0"
    )
  chunks = config.data.frames // config.model.chunk_frames
  prefix = max(section.degradation.clean_prefix, config.loss.skip_chunks)
  if prefix >= chunks:
    raise UserError(
      f"{name}.degradation.clean_prefix and loss.skip_chunks: {prefix} given"
      f" chunks of {chunks} leave objective 'dmd' nothing to make"
    )
  if options.guidance != 1 and config.model.text == "none":
    raise UserError(
      f"{name}.dmd.guidance {options.guidance} leads away from the null text,"
      " and model.text is 'none'"
    )


def _check_students(config: ConfigDict) -> None:
  """What training with objective 'dmd' asks of the rest of a config."""
  students = [n for n in config.stages if config.stage[n].objective == "dmd"]
  if students and config.optimizer.accumulation > 1:
    raise UserError(
      f"stage.{students[0]}: objective 'dmd' trains its critic on what it"
      " makes, and would on every microbatch: set optimizer.accumulation to 1"
    )
  # Such a student knows one way of being sampled.
  last, options = config.stages[-1], config.sampling
  if last not in students:
    return
  if options.guidance != 1:
    raise UserError(
      f"stage.{last}: objective 'dmd' makes a student that is sampled without"
      " guidance by text: set sampling.guidance to 1 (the teacher's is"
      f" stage.{last}.dmd.guidance)"
    )
  shift = config.stage[last].dmd.shift
  if options.shift != shift:
    raise UserError(
      f"stage.{last}.dmd.shift {shift} is not sampling.shift {options.shift}:"
      " a student is sampled at the levels it learned; set both alike"
    )


def _check_banks(config: ConfigDict) -> None:
  """All banks of a run lie in one place of its checkpoints."""
  shapes = {}
  for name in config.stages:
    section = config.stage[name]
    if section.history == "error_bank":
      shapes[name] = (section.bank.buckets, section.bank.size)
  if len(set(shapes.values())) > 1:
    raise UserError(
      f"stages {', '.join(shapes)} have banks of different buckets or size;"
      " give all of a run's stages the same bank.buckets and bank.size"
    )


def _check_sampling(config: ConfigDict) -> None:
  options = config.sampling
  told = options.context_told
  if told is not None and not 0 <= told < 1:
    raise UserError(f"sampling.context_told {told} is not in [0, 1)")
  if options.history_level > 1:
    raise UserError(
      f"sampling.history_level {options.history_level} is not in (0, 1]"
    )
  recompute, keep = options.recompute, options.recompute_keep
  if recompute is not None and not keep < recompute:
    raise UserError(
      f"sampling.recompute {recompute} chunks must exceed"
      f" sampling.recompute_keep {keep}: nothing new would be made"
    )


def check_bagger(config: ConfigDict) -> None:
  """Refuses settings that rounds of BAgger cannot work with.

  Raises:
    UserError: the first thing found.
  """
  options, chunk_frames = config.bagger, config.model.chunk_frames
  _one_of("bagger.restart", options.restart, ("base", "warm"))
  frames = options.frames or config.data.frames
  if frames % chunk_frames or frames < config.data.frames:
    raise UserError(
      f"bagger.frames {options.frames}: give whole chunks of {chunk_frames},"
      f" at least data.frames {config.data.frames} (or 0 for that)"
    )
  if options.given * chunk_frames >= frames:
    raise UserError(
      f"bagger.given {options.given} chunks leave nothing of {frames} frames"
      " to roll out"
    )
  if options.share > 1:
    raise UserError(f"bagger.share {options.share} is not in (0, 1]")
  latents = config.data.source == "latents"
  if options.codec.startswith("wan:") != latents:
    raise UserError(
      f"bagger.codec {options.codec!r} with data.source {config.data.source!r}:"
      " 'latents' are turned around, and their prompts encoded, by 'wan:CKPT'"
      " (what avd import-wan wrote), all others by 'pixels'"
    )
  if latents and frames != config.data.frames:
    raise UserError(
      f"bagger.frames {options.frames}: latents cut from the middle of a"
      " trajectory are those of no video, since a first latent is one frame and"
      f" all others are several; give data.frames {config.data.frames}, or 0"
    )


def _check_vae(config: ConfigDict) -> None:
  like = vae_default()
  _same_fields("", config, like)
  for name in ("vae", "loss", "optimizer", "mesh", "log", "evaluation"):
    _same_fields(name + ".", config[name], like[name])
  for name, section in config.stage.items():
    _same_fields(f"stage.{name}.", section, like.stage.vae)
  for name in config.stages:
    if name not in config.stage:
      raise UserError(f"stages names {name}, which is no section of stage")
  data, z_dim = typed(DataConfig, config.data), config.vae.z_dim
  network = VAEConfig(
    **config.vae.to_dict(),
    latents_mean=(0.0,) * z_dim,
    latents_std=(1.0,) * z_dim,
  )
  if data.source == "latents":
    raise UserError("data.source 'latents': a VAE is trained on pixels")
  network.grid(data.height, data.width)
  network.latent_frames(data.frames)
  if config.loss.kl < 0:
    raise UserError(f"loss.kl {config.loss.kl}: at least 0")
  _check_ranges(config)
  if not config.stages:
    raise UserError("stages is empty; name at least one section of stage")
  for name in config.stages:
    for field in ("steps", "learning_rate"):
      if config.stage[name][field] <= 0:
        raise UserError(f"stage.{name}.{field}: above 0")
  _one_of("optimizer.name", config.optimizer.name, ("adamw",))


def _same_fields(prefix: str, section: ConfigDict, like: ConfigDict) -> None:
  for name in sorted(set(section) ^ set(like)):
    wrong = "unknown" if name in section else "missing"
    raise UserError(
      f"{wrong} config field {prefix}{name}; there are"
      f" {', '.join(sorted(like))}"
    )


def _check_ranges(config: ConfigDict) -> None:
  def value(name):
    section, _, field = name.rpartition(".")
    return config[section][field] if section else config[field]

  def known(name):
    section, _, field = name.rpartition(".")
    return field in (config.get(section, {}) if section else config)

  for name, least in AT_LEAST.items():
    if known(name) and value(name) < least:
      raise UserError(f"{name} {value(name)}: at least {least}")
  for name in POSITIVE:
    if known(name) and value(name) <= 0:
      raise UserError(f"{name} {value(name)} must be positive")
  for name in BELOW_ONE:
    if known(name) and not 0 <= value(name) < 1:
      raise UserError(f"{name} {value(name)} is not in [0, 1)")


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
  if value not in allowed:
    raise UserError(f"{name} {value!r} is not one of {', '.join(allowed)}")
