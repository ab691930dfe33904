"""Training a VAE: the program of its step, and what is left when it is done.

The host's loop is that of every run (`loop`). A finished run also holds `vae/`,
the component that `avd import-wan` would have written, with the mean and the
deviation of its latents over the training videos.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from avd_jax import parallel
from avd_jax.algorithms.vae_loss import vae_loss
from avd_jax.config import typed
from avd_jax.data import pipeline
from avd_jax.data.pipeline import DataConfig, Source
from avd_jax.models import vae
from avd_jax.models.vae import VAEConfig
from avd_jax.training import optim
from avd_jax.training import state as state_lib
from avd_jax.training.state import TrainState
from avd_jax.training.step import Schedule, Step, compiled, make_step
from avd_jax.typing import LossFn, Params
from avd_jax.wan import importing

_MEASURED = 64  # clips that the latents' mean and deviation are taken over


def network(config: ConfigDict) -> VAEConfig:
  """The network of a run, its latents in their own units."""
  z_dim = config.vae.z_dim
  units = dict(latents_mean=(0.0,) * z_dim, latents_std=(1.0,) * z_dim)
  return VAEConfig(**config.vae.to_dict(), **units)


def loss(config: ConfigDict) -> LossFn:
  """The objective of a run."""
  cfg = network(config)
  decode = functools.partial(vae.decode, cfg, chunk=None, clamp=False)
  return vae_loss(functools.partial(vae.moments, cfg), decode, config.loss.kl)


@dataclasses.dataclass(frozen=True)
class VAEProgram:
  """The functions of a VAE's run, compiled for a mesh, as `program.Program`.

  The batch is cut over the mesh's batch axes; weights are whole on every
  device.
  """

  config: ConfigDict
  mesh: Mesh

  def for_source(self, source: Source) -> "VAEProgram":
    """The same for any source of videos."""
    del source
    return self

  def check(self) -> None:
    """Refuses a batch that the mesh does not divide. Raises UserError."""
    parallel.check_batch(
      self.config.data.batch_size, self.config.optimizer.accumulation, self.mesh
    )

  def schedule(self, name: str, local: int) -> Schedule:
    """What the host decides of a stage's step."""
    rate = optim.learning_rate(self.config.stage[name], local)
    return Schedule(np.float32(rate), np.float32(1.0))

  def _create(self, seed: jax.Array) -> TrainState:
    params = vae.init(network(self.config), jax.random.key(seed))
    tx = optim.make(self.config.optimizer)
    return state_lib.create(params, tx, {}, seed)

  @functools.cached_property
  def shardings(self) -> TrainState:
    """Where every leaf of the state lives."""
    shapes = jax.eval_shape(self._create, jnp.uint32(0))
    return parallel.state_shardings(shapes, self.mesh)

  def abstract_state(self) -> TrainState:
    """Shapes, types and shardings, with nothing allocated."""
    place = lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to)
    shapes = jax.eval_shape(self._create, jnp.uint32(0))
    return jax.tree.map(place, shapes, self.shardings)

  def init(self) -> TrainState:
    """A fresh state."""
    make = jax.jit(self._create, out_shardings=self.shardings)
    return make(jnp.uint32(self.config.seed))

  def begin_stage(
    self, state: TrainState, name: str, params: Params | None = None
  ) -> TrainState:
    """A fresh optimizer (and, if given, other weights)."""
    del name
    if params is not None:
      # A copy: every leaf of the state is donated to the step.
      ema = jax.tree.map(jnp.copy, params)
      state = state._replace(params=params, ema=ema)
    optimizer = optim.make(self.config.optimizer).init(state.params)
    return state._replace(optimizer=optimizer)

  def step(self, name: str, local: int = 0) -> Step:
    """The compiled training step; it donates the state."""
    del name, local  # stages differ in their schedules alone
    return self._step

  @functools.cached_property
  def _step(self) -> Step:
    optimizer = self.config.optimizer
    step = make_step(
      loss(self.config),
      optim.make(optimizer),
      ema_decay=optimizer.ema,
      accumulation=optimizer.accumulation,
    )
    return compiled(step, self.shardings, self.mesh)


def measured(
  cfg: VAEConfig,
  params: Params,
  source: Any,
  on_clip: Callable[[], Any] = lambda: None,
) -> VAEConfig:
  """The config with the mean and deviation of its latents over some clips.

  Args:
    cfg: the network, its latents in their own units.
    params: its weights.
    source: of videos; its first clips are read.
    on_clip: called after each.
  """
  encode = jax.jit(functools.partial(vae.encode, cfg))
  count, total, square = 0, 0.0, 0.0
  for i in range(min(_MEASURED, len(source))):
    z = np.asarray(encode(params, source[i]["video"][None]), np.float64)
    z = z.reshape(-1, cfg.z_dim)
    count, total = count + len(z), total + z.sum(0)
    square = square + (z**2).sum(0)
    on_clip()
  mean = total / count
  std = np.sqrt(np.maximum(square / count - mean**2, 1e-8))
  as_floats = lambda values: tuple(float(f"{v:.6g}") for v in values)
  return dataclasses.replace(
    cfg, latents_mean=as_floats(mean), latents_std=as_floats(std)
  )


def finish(
  config: ConfigDict,
  workdir: str | Path,
  state: TrainState,
  on_clip: Callable[[], Any] = lambda: None,
) -> VAEConfig:
  """Writes a finished run's `vae/`, unless it is there; by one process.

  Args:
    config: of the run.
    workdir: where it lives.
    state: its last.
    on_clip: called after every clip that is measured.

  Returns:
    The network, as written.
  """
  folder = Path(workdir) / importing.PLACES["vae"]
  if (folder / "config.json").exists():
    return importing.read_config(VAEConfig, folder)
  data = typed(DataConfig, config.data)
  source = pipeline.make_source(data)
  params = here(state.ema)
  cfg = measured(network(config), params, source, on_clip)
  importing.save_vae(workdir, cfg, params)
  return cfg


def here(params: Params) -> Params:
  """This process's copy of weights that are whole on every device."""
  return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), params)


def reconstructions(
  cfg: VAEConfig, params: Params, data: DataConfig, count: int = 4
) -> tuple[np.ndarray, np.ndarray]:
  """Held-out clips [b F H W 3] and what the VAE makes of them."""
  source = pipeline.make_source(data, "eval")
  clips = [source[i]["video"] for i in range(min(count, len(source)))]
  both = jax.jit(
    lambda params, x: vae.decode(cfg, params, vae.encode(cfg, params, x))
  )
  made = [np.asarray(both(params, clip[None]))[0] for clip in clips]
  return np.stack(clips), np.stack(made)
