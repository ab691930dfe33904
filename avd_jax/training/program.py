"""From a config to compiled programs: who is wired to whom, in one place."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from avd_jax import parallel
from avd_jax.algorithms import flow_loss, histories
from avd_jax.config import typed
from avd_jax.data.pipeline import DataConfig
from avd_jax.diffusion import flow_matching
from avd_jax.models import attention, dit
from avd_jax.models import denoiser as denoiser_lib
from avd_jax.training import optim
from avd_jax.training import state as state_lib
from avd_jax.training.state import TrainState
from avd_jax.training.step import Step, make_step
from avd_jax.typing import Batch, LossFn, Params

HISTORIES = {
  "ground_truth": lambda denoiser, stage: histories.ground_truth(denoiser),
  "self_resampled": lambda denoiser, stage: histories.self_resampled(
    denoiser, typed(histories.Resampling, stage.resampling)
  ),
}
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
  """

  config: ConfigDict
  mesh: Mesh

  @functools.cached_property
  def model(self) -> dit.DiTConfig:
    return typed(dit.DiTConfig, self.config.model)

  def check(self) -> None:
    """Refuses what this mesh's devices cannot compute, before they try.

    Raises:
      UserError: an attention implementation that cannot do this model.
    """
    model, x = self.model, self.batch.x
    rows, columns = model.grid(*x.shape[2:4])
    attention.check(
      model.attention,
      chunks=x.shape[1] // model.chunk_frames,
      tokens=model.chunk_frames * rows * columns,
      heads=model.num_heads,
      head_dim=model.head_dim,
      dtype=model.dtype,
      place=self.mesh,
    )

  @functools.cached_property
  def batch(self) -> Batch:
    """Shapes of a global batch."""
    data = typed(DataConfig, self.config.data)
    shape = (data.batch_size, data.frames, data.height, data.width)
    return Batch(
      jax.ShapeDtypeStruct((*shape, self.model.channels), jnp.float32),
      jax.ShapeDtypeStruct((data.batch_size, data.text_length), jnp.int32),
    )

  def loss(self, name: str) -> LossFn:
    """The objective of a stage."""
    config, stage = self.config, self.config.stage[name]
    denoiser = denoiser_lib.make(self.model, self.mesh)
    return flow_loss.flow_loss(
      denoiser,
      HISTORIES[stage.history](denoiser, stage),
      LEVELS[config.loss.levels](config.loss.shift),
      null_text=jnp.zeros(self.batch.text.shape[1:], jnp.int32),
      text_dropout=(
        0.0 if self.model.text == "none" else config.loss.text_dropout
      ),
      skip_chunks=config.loss.skip_chunks,
    )

  def step(self, name: str) -> Step:
    """The compiled training step of a stage; it donates the state.

    Stages that differ in length or learning rate alone share a program.
    """
    stage = self.config.stage[name]
    kind = (stage.history, stage.resampler, stage.resampling.to_json())
    if kind not in self._steps:
      self._steps[kind] = self._compile(name)
    return self._steps[kind]

  @functools.cached_property
  def _steps(self) -> dict[Any, Step]:
    return {}

  def _compile(self, name: str) -> Step:
    stage, optimizer = self.config.stage[name], self.config.optimizer
    parallel.check_batch(
      self.config.data.batch_size, optimizer.accumulation, self.mesh
    )
    step = make_step(
      self.loss(name),
      optim.make(optimizer),
      ema_decay=optimizer.ema,
      accumulation=optimizer.accumulation,
      resampler=stage.resampler,
    )
    everywhere = parallel.replicated(self.mesh)
    return jax.jit(
      step,
      in_shardings=(
        self.shardings,
        parallel.batch_sharding(self.mesh),
        everywhere,
      ),
      out_shardings=(self.shardings, everywhere),
      donate_argnums=0,
    )

  def _create(self, seed: jax.Array) -> TrainState:
    """The state, still boxed with logical axes."""
    example = jax.tree.map(
      lambda s: jax.ShapeDtypeStruct((1, *s.shape[1:]), s.dtype), self.batch
    )
    key = jax.random.key(seed)
    params = denoiser_lib.init(self.model, key, example.x, example.text)
    return state_lib.create(params, optim.make(self.config.optimizer), seed)

  @functools.cached_property
  def _boxed(self) -> TrainState:
    return jax.eval_shape(self._create, jnp.uint32(0))

  @functools.cached_property
  def shardings(self) -> TrainState:
    """Where every leaf of the state lives."""
    return parallel.state_shardings(self._boxed, self.mesh)

  def abstract_state(self) -> TrainState:
    """Shapes, types and shardings, with nothing allocated."""
    return jax.tree.map(
      lambda s, sharding: jax.ShapeDtypeStruct(
        s.shape, s.dtype, sharding=sharding
      ),
      nn.meta.unbox(self._boxed),
      self.shardings,
    )

  def init(self) -> TrainState:
    """A fresh state, made where its shards live."""
    make = lambda seed: nn.meta.unbox(self._create(seed))
    make = jax.jit(make, out_shardings=self.shardings)
    return make(jnp.uint32(self.config.seed))

  def begin_stage(
    self, state: TrainState, params: Params | None = None
  ) -> TrainState:
    """A fresh optimizer (and, if given, other weights) for a stage."""
    tx = optim.make(self.config.optimizer)

    def fresh(state, params):
      ema = state.ema
      if params is None:
        params = state.params
      else:
        ema = jax.tree.map(jnp.copy, params)
      return state._replace(params=params, ema=ema, optimizer=tx.init(params))

    return jax.jit(fresh, out_shardings=self.shardings)(state, params)
