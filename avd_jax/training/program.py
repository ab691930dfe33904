"""From a config to compiled programs: who is wired to whom, in one place."""

import copy
import dataclasses
import functools
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from avd_jax import parallel
from avd_jax.algorithms import (
  consistency,
  diffusion_forcing,
  dmd,
  error_bank,
  flow_loss,
  histories,
)
from avd_jax.config import typed
from avd_jax.data.pipeline import DataConfig, Source
from avd_jax.diffusion import flow_matching
from avd_jax.errors import UserError
from avd_jax.models import attention
from avd_jax.models import denoiser as denoiser_lib
from avd_jax.models.dit_config import DiTConfig
from avd_jax.training import optim
from avd_jax.training import state as state_lib
from avd_jax.training.state import TrainState
from avd_jax.training.step import Schedule, Step, compiled, make_step
from avd_jax.typing import Batch, Denoiser, HistoryFn, LossFn, Params

HISTORIES = {
  "ground_truth": lambda denoiser, *_: histories.ground_truth(denoiser),
  "noise_augmented": lambda *args: histories.noise_augmented(*args[:2]),
  "parallel_resampled": lambda *args: histories.parallel_resampled(*args[:2]),
  "self_resampled": lambda *args: histories.self_resampled(*args[:2]),
  "error_bank": error_bank.history,
}
# Fields of a stage that its compiled step does not depend on.
SCHEDULE = (
  "steps",
  "learning_rate",
  "warmup_steps",
  "decay_steps",
  "final_lr_ratio",
)
LEVELS = {
  "logit_normal": flow_matching.logit_normal,
  "uniform": flow_matching.uniform,
}


@dataclasses.dataclass(frozen=True)
class Program:
  """The functions of a run, compiled for a mesh.

  Attributes:
    config: the run's.
    mesh: what it runs on.
    null_text: what stands for no text, float32 [m d], where texts are
      embeddings; None is zeros, as bytes have it.
  """

  config: ConfigDict
  mesh: Mesh
  null_text: np.ndarray | None = None

  @functools.cached_property
  def model(self) -> DiTConfig:
    return typed(DiTConfig, self.config.model)

  def for_source(self, source: Source) -> "Program":
    """The same for the clips of a source, where those tell what they are.

    Raises:
      UserError: latents of other channels than the model's, or embeddings of
        another shape than it reads.
    """
    shape = getattr(source, "shape", None)
    if shape is not None and shape[-1] != self.model.channels:
      raise UserError(
        f"data.path holds latents of {shape[-1]} channels, the model has"
        f" model.channels {self.model.channels}"
      )
    null = getattr(source, "null_text", None)
    if null is None:
      return self
    wanted = self.batch.text.shape[1:]
    if null.shape != wanted:
      raise UserError(
        f"data.path holds texts of {null.shape}, the model reads {wanted}:"
        " change data.text_length or model.text_dim"
      )
    return dataclasses.replace(self, null_text=null)

  def check(self) -> None:
    """Refuses what this mesh's devices cannot compute, before they try.

    Raises:
      UserError: a mesh that does not cut batch, tokens, heads or weights
        evenly, or an attention implementation that cannot do this model.
    """
    parallel.check_batch(
      self.config.data.batch_size, self.config.optimizer.accumulation, self.mesh
    )
    model, x = self.model, self.batch.x
    rows, columns = model.grid(*x.shape[2:4])
    tokens = model.chunk_frames * rows * columns
    parallel.check_divides(self.mesh, tokens=tokens, heads=model.num_heads)
    attention.check(
      model.attention,
      chunks=x.shape[1] // model.chunk_frames,
      tokens=tokens,
      heads=model.num_heads,
      head_dim=model.head_dim,
      dtype=model.dtype,
      place=self.mesh,
    )
    _ = self.shardings

  @functools.cached_property
  def batch(self) -> Batch:
    """Shapes of a global batch."""
    data = typed(DataConfig, self.config.data)
    shape = (data.batch_size, data.frames, data.height, data.width)
    return Batch(
      jax.ShapeDtypeStruct((*shape, self.model.channels), jnp.float32),
      self.model.text_struct(data.batch_size, data.text_length),
      jax.ShapeDtypeStruct((data.batch_size,), jnp.int32),
    )

  def loss(self, name: str) -> LossFn:
    """The objective of a stage."""
    return self._loss(self.config.stage[name])

  def _loss(self, stage: ConfigDict) -> LossFn:
    config = self.config.loss
    denoiser = denoiser_lib.make(self.model, self.mesh)
    levels = LEVELS[config.levels](config.shift)
    null = self.null_text
    if null is None:
      null = np.zeros(self.batch.text.shape[1:], self.batch.text.dtype)
    shared = dict(
      null_text=jnp.asarray(null),
      text_dropout=0.0 if self.model.text == "none" else config.text_dropout,
      skip_chunks=config.skip_chunks,
    )
    if stage.objective == "diffusion_forcing":
      return diffusion_forcing.diffusion_forcing(
        denoiser, levels, clean_context=config.clean_context, **shared
      )
    if stage.objective == "dmd":
      del shared["text_dropout"]  # a student is sampled without guidance
      return dmd.dmd(
        denoiser,
        levels,
        optim.make(self.config.optimizer),
        typed(dmd.DMDConfig, stage.dmd),
        typed(histories.Degradation, stage.degradation),
        **shared,
      )
    history = histories.with_dropout(
      self._history(stage, denoiser), config.history_dropout
    )
    if stage.objective == "consistency":
      return consistency.consistency(
        denoiser,
        history,
        typed(consistency.ConsistencyConfig, stage.consistency),
        resampler=stage.resampler,
        **shared,
      )
    bank = stage.history == "error_bank"
    return flow_loss.flow_loss(
      denoiser,
      history,
      levels,
      resampler=stage.resampler,
      bank=typed(error_bank.BankConfig, stage.bank) if bank else None,
      **shared,
    )

  def history(self, name: str) -> HistoryFn:
    """How a stage makes its histories; one stream makes none."""
    stage = self.config.stage[name]
    return self._history(stage, denoiser_lib.make(self.model, self.mesh))

  def _history(self, stage: ConfigDict, denoiser: Denoiser) -> HistoryFn:
    return HISTORIES[stage.history](
      denoiser,
      typed(histories.Degradation, stage.degradation),
      typed(error_bank.BankConfig, stage.bank),
    )

  def memory(self, name: str, params: Params) -> dict[str, Any]:
    """What a stage's objective starts with."""
    stage, memory = self.config.stage[name], {}
    if stage.history == "error_bank":
      chunk = (self.model.chunk_frames, *self.batch.x.shape[2:])
      bank = typed(error_bank.BankConfig, stage.bank)
      memory[error_bank.NAME] = error_bank.empty(bank, chunk)
    if stage.objective == "consistency":
      memory[consistency.NAME] = jax.tree.map(jnp.copy, params)
    if stage.objective == "dmd":
      memory |= dmd.memory(params, optim.make(self.config.optimizer))
    return memory

  def schedule(self, name: str, local: int) -> Schedule:
    """What the host decides of a stage's step.

    Args:
      name: of the stage.
      local: steps taken in it.
    """
    stage = self.config.stage[name]
    return Schedule(
      np.float32(optim.learning_rate(stage, local)),
      np.float32(optim.ramp(stage, local)),
    )

  def step(self, name: str, local: int = 0) -> Step:
    """The compiled training step of a stage; it donates the state.

    Stages that differ in length or learning rate alone share a program.

    Args:
      name: of the stage.
      local: steps taken in it.
    """
    stage = self.config.stage[name]
    every = stage.degradation.full_every
    if every and local % every == every - 1:
      stage = copy.deepcopy(stage)
      stage.degradation.update(detached=False, full_every=0)
    fixed = {k: v for k, v in stage.to_dict().items() if k not in SCHEDULE}
    fixed["degradation"]["ramp_steps"] = 0  # of the host's schedule too
    kind = json.dumps(fixed, sort_keys=True)
    if kind not in self._steps:
      self._steps[kind] = self._compile(stage)
    return self._steps[kind]

  @functools.cached_property
  def _steps(self) -> dict[Any, Step]:
    return {}

  def _compile(self, stage: ConfigDict) -> Step:
    optimizer = self.config.optimizer
    step = make_step(
      self._loss(stage),
      optim.make(optimizer),
      ema_decay=optimizer.ema,
      accumulation=optimizer.accumulation,
    )
    return compiled(step, self.shardings, self.mesh)

  def _create(self, seed: jax.Array) -> TrainState:
    """The state, still boxed with logical axes."""
    example = jax.tree.map(
      lambda s: jax.ShapeDtypeStruct((1, *s.shape[1:]), s.dtype), self.batch
    )
    key = jax.random.key(seed)
    params = denoiser_lib.init(self.model, key, example.x, example.text)
    memory = {}
    for name in self.config.stages:
      memory |= self.memory(name, params)
    tx = optim.make(self.config.optimizer)
    return state_lib.create(params, tx, memory, seed)

  @functools.cached_property
  def boxed(self) -> TrainState:
    """The state's shapes, boxed with logical axes."""
    return jax.eval_shape(self._create, jnp.uint32(0))

  @functools.cached_property
  def shardings(self) -> TrainState:
    """Where every leaf of the state lives."""
    return parallel.state_shardings(self.boxed, self.mesh)

  def abstract_state(self) -> TrainState:
    """Shapes, types and shardings, with nothing allocated."""
    return jax.tree.map(
      lambda s, sharding: jax.ShapeDtypeStruct(
        s.shape, s.dtype, sharding=sharding
      ),
      nn.meta.unbox(self.boxed),
      self.shardings,
    )

  def init(self) -> TrainState:
    """A fresh state, made where its shards live."""
    make = lambda seed: nn.meta.unbox(self._create(seed))
    make = jax.jit(make, out_shardings=self.shardings)
    return make(jnp.uint32(self.config.seed))

  def begin_stage(
    self, state: TrainState, name: str, params: Params | None = None
  ) -> TrainState:
    """A fresh optimizer and memory (and, if given, other weights)."""
    tx = optim.make(self.config.optimizer)

    def fresh(state, params):
      ema = state.ema
      if params is None:
        params = state.params
      else:
        ema = jax.tree.map(jnp.copy, params)
      memory = state.memory | self.memory(name, ema)
      return state._replace(
        params=params, ema=ema, optimizer=tx.init(params), memory=memory
      )

    return jax.jit(fresh, out_shardings=self.shardings)(state, params)
