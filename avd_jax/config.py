"""The one base config, and its typed readings for the rooms below.

A file in configs/ changes this base. Rooms below never see a ConfigDict: they
get the frozen dataclass that `typed` makes of a section. Everything a user can
get wrong in a config is refused here, before any compute is spent.
"""

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any, TypeVar

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from avd_jax.algorithms.histories import Resampling
from avd_jax.data.pipeline import DataConfig
from avd_jax.diffusion.solvers import SOLVERS
from avd_jax.errors import UserError
from avd_jax.models.dit import DiTConfig

T = TypeVar("T")

# Fields that weights do not depend on: a run may start from another's weights
# with other values here.
WEIGHTLESS = (
  "model.attention.",
  "model.remat",
  "model.scan_unroll",
  "model.dtype",
)

# A run may be resumed with other values here; everything else makes it
# another run.
FREE = (
  "model.attention.implementation",
  "log.",
  "mesh.",
  "sampling.",
  "evaluation.",
  "data.num_workers",
  "data.num_threads",
  "data.cache_mb",
)
HISTORIES = ("ground_truth", "self_resampled")

# Fields that are None by default: they still have a type, or no argument could
# set them.
OPTIONAL = {
  "model.attention.window": int,
  "model.attention.routing_top_k": int,
  "model.spatial_embedding": tuple,
  "data.fps": float,
}

AT_LEAST = {
  "seed": 0,
  "loss.skip_chunks": 0,
  "optimizer.accumulation": 1,
  "log.every": 1,
  "log.checkpoint_every": 1,
  "log.keep": 1,
  "sampling.steps": 1,
  "sampling.segment": 1,
  "evaluation.videos": 1,
  "evaluation.given": 0,
}
POSITIVE = (
  "loss.shift",
  "sampling.shift",
  "optimizer.clip_norm",
  "optimizer.muon_ratio",
)
BELOW_ONE = (
  "loss.text_dropout",
  "optimizer.ema",
  "optimizer.b1",
  "optimizer.b2",
)


def stage(history: str, steps: int, **changes: Any) -> ConfigDict:
  """A stretch of training: a history, an optimizer schedule, a length."""
  return ConfigDict(
    dict(
      history=history,  # "ground_truth" or "self_resampled"
      steps=steps,
      learning_rate=3e-3,
      warmup_steps=50,  # linear, from 0
      decay_steps=0,  # last steps of the stage, linear down to final_lr_ratio
      final_lr_ratio=0.1,
      resampler="online",  # or "ema": the weights that re-make the history
      resampling=dataclasses.asdict(Resampling()),
    )
    | changes
  )


def default() -> ConfigDict:
  """A tiny world on a laptop; every other config changes this one."""
  model = dataclasses.asdict(
    DiTConfig(
      dim=64,
      ffn_dim=192,
      num_heads=4,
      num_layers=3,
      patch=6,
      channels=3,
      text="bytes",
      text_dim=32,
      text_tokens=4,
      freq_dim=64,
      chunk_frames=1,
      prediction="x0",
      remat="none",
      scan_unroll=3,
    )
  )
  data = dataclasses.asdict(DataConfig())
  return _optional(
    dict(
      seed=0,
      init_from="",  # workdir whose newest EMA weights training starts from
      data=data,
      model=model,
      loss=dict(
        levels="logit_normal",  # or "uniform"
        shift=3.0,  # s of the training levels t^i
        text_dropout=0.1,
        skip_chunks=0,  # first chunks without loss
      ),
      optimizer=dict(
        name="adamw",  # or "muon", for the matrices inside blocks
        muon_ratio=6.5,  # muon's learning rate over adam's
        b1=0.9,
        b2=0.99,
        weight_decay=0.01,
        clip_norm=1.0,
        ema=0.99,
        accumulation=1,
      ),
      # Run in this order; each is a section of `stage`.
      stages=("teacher_forcing", "resampling_forcing"),
      stage=dict(
        teacher_forcing=stage("ground_truth", 1200),
        resampling_forcing=stage("self_resampled", 600, warmup_steps=0),
      ),
      mesh=dict(data=-1, fsdp=1, context=1, tensor=1),
      log=dict(every=50, checkpoint_every=500, keep=2),
      sampling=dict(
        steps=8, shift=1.0, guidance=1.0, solver="euler", segment=8
      ),
      evaluation=dict(videos=64, given=4, frames=128, seed=1),
    )
  )


def _optional(values: dict[str, Any]) -> ConfigDict:
  """A ConfigDict in which what is None may be set to a value of its type."""
  config = ConfigDict(values)
  for name, kind in OPTIONAL.items():
    *path, field = name.split(".")
    section = config
    for part in path:
      section = section.get(part, {})
    if section.get(field, 0) is None:
      section[field] = placeholder(kind)
  return config


def load(path: str, overrides: list[str]) -> ConfigDict:
  """Reads a config file and applies `--config.field=value` arguments.

  Raises:
    UserError: no such file, an unknown field, a value of another type.
  """
  file, *argument = path.split(":", 1)
  if not Path(file).is_file():
    raise UserError(f"config {file} does not exist; see configs/ for examples")
  try:
    config = runpy.run_path(file)["get_config"](*argument)
  except Exception as error:  # it is a program: anything may be wrong with it
    kind = type(error).__name__
    raise UserError(f"config {file}: {kind}: {_line(error)}") from error
  if not isinstance(config, ConfigDict):
    raise UserError(f"config {file}: get_config must return a ConfigDict")
  override(config, overrides)
  check(config)
  return config


def override(
  config: ConfigDict,
  overrides: list[str],
  may: tuple[str, ...] = ("",),
) -> None:
  """Applies `--config.field=value` arguments.

  Args:
    config: changed in place.
    overrides: the arguments.
    may: how the names of fields that may change begin.

  Raises:
    UserError: an unknown field, one that may not change, or a wrong value.
  """
  for argument in overrides:
    name, equals, _ = argument.partition("=")
    path, section = name.removeprefix("--config.").split("."), config
    for field in path[:-1]:
      section = section.get(field) if isinstance(section, ConfigDict) else None
    if not isinstance(section, ConfigDict) or path[-1] not in section:
      raise UserError(f"{name}: unknown config field")
    if not ".".join(path).startswith(may):
      raise UserError(
        f"{name}: cannot change in a trained run; {', '.join(may)} can"
      )
    if not equals:
      raise UserError(f"{name}: write {name}=VALUE")
  for argument in overrides:
    name, _, value = argument.partition("=")
    name = name.removeprefix("--config.")
    if name in OPTIONAL and value.lower() in ("none", ""):
      section, _, field = name.rpartition(".")
      config[section][field] = placeholder(OPTIONAL[name])
      overrides = [other for other in overrides if other != argument]
  values, argv = flags.FlagValues(), ["avd", *overrides]
  # Without sys_argv, overrides would be looked for in this process's own.
  config_flags.DEFINE_config_dict(
    "config", config, flag_values=values, sys_argv=argv
  )
  try:
    values(argv)
  except (flags.Error, ValueError, TypeError) as error:
    raise UserError(_line(error)) from error


def _line(error: Exception) -> str:
  return " ".join(str(error).split())[:300]


def typed(cls: type[T], section: ConfigDict) -> T:
  """A section as the frozen dataclass of the room that reads it.

  Raises:
    UserError: fields that the dataclass lacks, or that it refuses.
  """
  known = {field.name for field in dataclasses.fields(cls)}
  unknown = sorted(set(section) - known)
  if unknown:
    raise UserError(
      f"unknown config fields {', '.join(unknown)} for {cls.__name__};"
      f" it has {', '.join(sorted(known))}"
    )
  inner = {
    field.name: field.type
    for field in dataclasses.fields(cls)
    if dataclasses.is_dataclass(field.type)
  }

  def value(name):
    given = section[name]
    if name in inner:
      return typed(inner[name], given)
    return tuple(given) if isinstance(given, list) else given

  return cls(**{name: value(name) for name in section})


def check(config: ConfigDict, frames: int = 0) -> None:
  """Refuses what cannot work, by name.

  Args:
    config: a run's.
    frames: of videos that will be made besides those it trains and evaluates.

  Raises:
    UserError: the first thing found.
  """
  _same_fields("", config, default())
  for name in ("loss", "optimizer", "mesh", "log", "sampling", "evaluation"):
    _same_fields(name + ".", config[name], default()[name])
  for name, section in config.stage.items():
    _same_fields(f"stage.{name}.", section, stage("", 0))
  model, data = typed(DiTConfig, config.model), typed(DataConfig, config.data)
  _check_ranges(config)
  grid = model.grid(data.height, data.width)
  if model.spatial_embedding not in (None, grid):
    raise UserError(
      f"model.spatial_embedding {model.spatial_embedding} must be the frame's"
      f" grid of tokens, {grid}, or None"
    )
  if model.channels != 3:
    raise UserError(f"model.channels {model.channels}: videos have 3")
  if model.text == "embeddings":
    raise UserError(
      "model.text 'embeddings' needs embeddings made beforehand; videos with"
      " captions take 'bytes' (or 'none')"
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
  for name in config.stages:
    if name not in config.stage:
      raise UserError(
        f"stages names {name!r}, but stage has only"
        f" {', '.join(sorted(config.stage))}"
      )
    section = config.stage[name]
    _one_of(f"stage.{name}.history", section.history, HISTORIES)
    _one_of(f"stage.{name}.resampler", section.resampler, ("online", "ema"))
    typed(Resampling, section.resampling)
    if section.steps < 1:
      raise UserError(f"stage.{name}.steps {section.steps}: at least 1")
    for field in ("warmup_steps", "decay_steps", "learning_rate"):
      if section[field] < 0:
        raise UserError(f"stage.{name}.{field} {section[field]}: at least 0")


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

  for name, least in AT_LEAST.items():
    if value(name) < least:
      raise UserError(f"{name} {value(name)}: at least {least}")
  for name in POSITIVE:
    if value(name) <= 0:
      raise UserError(f"{name} {value(name)} must be positive")
  for name in BELOW_ONE:
    if not 0 <= value(name) < 1:
      raise UserError(f"{name} {value(name)} is not in [0, 1)")
  if config.evaluation.frames <= config.evaluation.given:
    raise UserError(
      f"evaluation.frames {config.evaluation.frames} must exceed"
      f" evaluation.given {config.evaluation.given}"
    )


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
  if value not in allowed:
    raise UserError(f"{name} {value!r} is not one of {', '.join(allowed)}")


def to_json(config: ConfigDict) -> dict[str, Any]:
  """Plain values, as they come back from a file."""
  return json.loads(json.dumps(config.to_dict()))


def from_json(values: dict[str, Any]) -> ConfigDict:
  """The config of a run, read back (sequences as tuples, as they were)."""

  def tuples(value):
    if isinstance(value, dict):
      return {k: tuples(v) for k, v in value.items()}
    return tuple(tuples(v) for v in value) if isinstance(value, list) else value

  return _optional(tuples(values))


def differences(
  old: dict[str, Any],
  new: dict[str, Any],
  prefix: str = "",
  free: tuple[str, ...] = FREE,
) -> list[str]:
  """Lines "field: old -> new" for every field that must not change."""
  lines = []
  for key in sorted(set(old) | set(new)):
    name = prefix + key
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      lines += differences(a, b, name + ".", free)
    elif a != b and not name.startswith(free):
      lines.append(f"{name}: {a!r} -> {b!r}")
  return lines
