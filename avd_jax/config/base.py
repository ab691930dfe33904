"""The one base config, its typed readings, and its JSON."""

import dataclasses
import json
from typing import Any, TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from avd_jax.algorithms.consistency import ConsistencyConfig
from avd_jax.algorithms.dmd import DMDConfig
from avd_jax.algorithms.error_bank import BankConfig
from avd_jax.algorithms.histories import Degradation
from avd_jax.data.pipeline import DataConfig
from avd_jax.errors import UserError
from avd_jax.models.dit_config import DiTConfig
from avd_jax.models.vae import VAEConfig

T = TypeVar("T")

# Fields that weights do not depend on: a run may start from another's weights
# with other values here.
WEIGHTLESS = (
  "model.attention.",
  "model.remat",
  "model.scan_unroll",
  "model.dtype",
  "model.chunk_frames",
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
# Fields that are None by default: they still have a type, or no argument could
# set them.
OPTIONAL = {
  "model.attention.window": int,
  "model.attention.routing_top_k": int,
  "model.spatial_embedding": tuple,
  "data.fps": float,
  "sampling.context_told": float,
  "sampling.recompute": int,
}


def stage(history: str, steps: int, **changes: Any) -> ConfigDict:
  """A stretch of training: a history, an optimizer schedule, a length."""
  return ConfigDict(
    dict(
      history=history,  # one of HISTORIES
      objective="flow_matching",  # one of OBJECTIVES
      steps=steps,
      learning_rate=3e-3,
      warmup_steps=50,  # linear, from 0
      decay_steps=0,  # last steps of the stage, linear down to final_lr_ratio
      final_lr_ratio=0.1,
      resampler="online",  # or "ema": the weights that re-make the history
      degradation=dataclasses.asdict(Degradation()),
      bank=dataclasses.asdict(BankConfig()),  # of "error_bank"
      consistency=dataclasses.asdict(ConsistencyConfig()),
      dmd=dataclasses.asdict(DMDConfig()),
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
  return optional(
    dict(
      seed=0,
      # Workdir whose newest EMA weights training starts from, or Wan's files.
      init_from="",
      data=data,
      model=model,
      loss=dict(
        levels="logit_normal",  # or "uniform"
        shift=3.0,  # s of the training levels t^i
        text_dropout=0.1,
        history_dropout=0.0,  # two streams: share of videos without history
        clean_context=0.0,  # one stream: share of videos with given chunks
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
        steps=8,
        shift=1.0,
        solver="euler",
        segment=8,  # chunks made by one call
        guidance=1.0,  # by text
        history_guidance=1.0,
        history_level=1.0,  # noise of the history that is guided away from
        context_noise=0.0,  # level to which made chunks are noised as history
        context_told=None,  # level the model is told of; None: context_noise
        recompute=None,  # chunks after which the cache is made anew, or None
        recompute_keep=1,  # last chunks that a new cache starts with
      ),
      # Rounds of `avd bagger`; the stages are "base" and "round".
      bagger=dict(
        rounds=3,
        share=0.5,  # rollouts of a round, over clips of the seed set
        given=1,  # real first chunks of a rollout
        frames=0,  # length of a rollout; 0 is data.frames
        prefix=4 / 7,  # share of a clip's chunks that is the drifted prefix
        restart="base",  # or "warm": where a round's weights start
        codec="pixels",  # or wan:CKPT, for data.source "latents"
        prompts="",  # template; or FILE.json, or module:function
        batch_size=64,  # rollouts made at once
      ),
      evaluation=dict(videos=64, given=4, frames=128, seed=1),
    )
  )


def vae_stage(steps: int, **changes: Any) -> ConfigDict:
  """A stretch of a VAE's training: an optimizer schedule, a length."""
  names = ("learning_rate", "warmup_steps", "decay_steps", "final_lr_ratio")
  fields = {name: stage("", 0)[name] for name in names}
  return ConfigDict({"steps": steps} | fields | changes)


def vae_default() -> ConfigDict:
  """A small VAE of Wan's kind, trained on a folder of videos."""
  shared = default()
  network = dataclasses.asdict(
    VAEConfig(base_dim=16, z_dim=4, latents_mean=(0,) * 4, latents_std=(1,) * 4)
  )
  # Measured when training has ended.
  del network["latents_mean"], network["latents_std"]
  values = {
    name: shared[name]
    for name in ("seed", "init_from", "data", "optimizer", "mesh", "log")
  }
  return optional(
    values
    | dict(
      vae=network,
      loss=dict(kl=1e-4),  # weight of the pull towards N(0, 1)
      stages=("vae",),
      stage=dict(vae=vae_stage(1000)),
      evaluation=dict(videos=4),  # held-out clips to look at
    )
  )


def optional(values: dict[str, Any]) -> ConfigDict:
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


def to_json(config: ConfigDict) -> dict[str, Any]:
  """Plain values, as they come back from a file."""
  return json.loads(json.dumps(config.to_dict()))


def from_json(values: dict[str, Any]) -> ConfigDict:
  """The config of a run, read back (sequences as tuples, as they were)."""

  def tuples(value):
    if isinstance(value, dict):
      return {k: tuples(v) for k, v in value.items()}
    return tuple(tuples(v) for v in value) if isinstance(value, list) else value

  return optional(tuples(values))


def complete(values: dict[str, Any]) -> dict[str, Any]:
  """A run's config from disk, as a run made today would have it.

  Fields that configs have learned since get their defaults: these leave things
  as they were, or old runs could not be read.
  """
  vae = "vae" in values
  like = to_json(vae_default() if vae else default())
  one = to_json(vae_stage(1) if vae else stage("", 0))
  like["stage"] = {name: one for name in values.get("stage", {})}

  def fill(values, like):
    both = lambda a, b: isinstance(a, dict) and isinstance(b, dict)
    return like | {
      name: fill(value, like[name]) if both(value, like.get(name)) else value
      for name, value in values.items()
    }

  return fill(values, like)


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
