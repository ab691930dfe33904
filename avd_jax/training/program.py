"""From a config to compiled programs: who is wired to whom, in one place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import flax.linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from avd_jax import parallel
from avd_jax.algorithms import flow_loss, histories
from avd_jax.config import typed
from avd_jax.data.pipeline import DataConfig
from avd_jax.diffusion import flow_matching
from avd_jax.models import dit
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
    denoiser = dit.make_denoiser(self.model)
    return flow_loss.flow_loss(
      denoiser,
      HISTORIES[stage.history](denoiser, stage),
      LEVELS[config.loss.levels](config.loss.shift),
      null_text=jnp.zeros(self.batch.text.shape[1:], jnp.int32),
      text_dropout=config.loss.text_dropout if self.model.text != "none" else 0,
      skip_chunks=config.loss.skip_chunks,
    )

  def step(self, name: str) -> Step:
    """The compiled training step of a stage; it donates the state."""
    stage, optimizer = self.config.stage[name], self.config.optimizer
    parallel.check_batch(
      self.config.data.batch_size, optimizer.accumulation, self.mesh
    )
    step = make_step(
      self.loss(name),
      optim.make(optimizer, stage),
      seed=self.config.seed,
      ema_decay=optimizer.ema,
      accumulation=optimizer.accumulation,
      resampler=stage.resampler,
    )
    shardings = self.shardings
    return jax.jit(
      step,
      in_shardings=(shardings, parallel.batch_sharding(self.mesh)),
      out_shardings=(shardings, parallel.replicated(self.mesh)),
      donate_argnums=0,
    )

  def _create(self, key: jax.Array) -> TrainState:
    """The state, still boxed with logical axes."""
    example = jax.tree.map(
      lambda s: jax.ShapeDtypeStruct((1, *s.shape[1:]), s.dtype), self.batch
    )
    params = dit.init(self.model, key, example.x, example.text)
    first = self.config.stage[self.config.stages[0]]
    return state_lib.create(params, optim.make(self.config.optimizer, first))

  def abstract_state(self) -> TrainState:
    """Shapes, types and shardings, with nothing allocated."""
    boxed = jax.eval_shape(self._create, jax.random.key(0))
    return jax.tree.map(
      lambda s, sharding: jax.ShapeDtypeStruct(
        s.shape, s.dtype, sharding=sharding
      ),
      nn.meta.unbox(boxed),
      self.shardings,
    )

  @functools.cached_property
  def shardings(self) -> TrainState:
    """Where every leaf of the state lives."""
    boxed = jax.eval_shape(self._create, jax.random.key(0))
    return parallel.state_shardings(boxed, self.mesh)

  def init(self) -> TrainState:
    """A fresh state, made where its shards live."""
    key = jax.random.key(self.config.seed)
    make = lambda key: nn.meta.unbox(self._create(key))
    return jax.jit(make, out_shardings=self.shardings)(key)

  def begin_stage(
    self, state: TrainState, name: str, params: Params | None = None
  ) -> TrainState:
    """A fresh optimizer (and, if given, other weights) for a stage."""
    tx = optim.make(self.config.optimizer, self.config.stage[name])

    def fresh(state, params):
      ema = state.ema
      if params is None:
        params = state.params
      else:
        ema = jax.tree.map(jnp.copy, params)
      return TrainState(state.step, params, ema, tx.init(params))

    return jax.jit(fresh, out_shardings=self.shardings)(state, params)
