"""Every axis of the mesh, every objective: what one device computes."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax import config as base
from avd_jax import parallel
from avd_jax.algorithms import dmd
from avd_jax.diffusion import rollout, solvers
from avd_jax.models import denoiser
from avd_jax.ops import attention
from avd_jax.training.program import Program
from avd_jax.typing import Batch, StepContext

STAGES = (
  "teacher_forcing", "resampling", "detached", "diffusion_forcing", "dmd"
)  # fmt: skip
ONE = (1, 1, 1, 1)
AXES = ((4, 1, 1, 1), (1, 4, 1, 1), (1, 1, 4, 1), (1, 1, 1, 2))
MIXED = ((2, 2, 2, 1), (1, 2, 2, 2))
CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)


def config_of(top_k=None, **changes):
  """Two heads, four chunks of eight tokens; windowed, with a sink, where it is
  not routed."""
  config = base.default()
  config.data.update(frames=8, height=4, width=8, batch_size=4, text_length=8)
  config.model.update(
    dim=24, ffn_dim=16, num_heads=2, num_layers=1, patch=2, freq_dim=8,
    chunk_frames=2, text="bytes", text_dim=8, text_tokens=2, scan_unroll=1,
  )  # fmt: skip
  config.model.update(changes)
  see = dict(window=None, sink=0) if top_k else dict(window=2, sink=1)
  config.model.attention.update(routing_top_k=top_k, **see)
  config.stage = {
    "teacher_forcing": base.stage("ground_truth", 1),
    "resampling": base.stage("self_resampled", 1),
    "detached": base.stage("self_resampled", 1),
    "diffusion_forcing": base.stage(
      "ground_truth", 1, objective="diffusion_forcing"
    ),
    "dmd": base.stage("ground_truth", 1, objective="dmd"),
  }
  config.stage.dmd.dmd.update(steps=2, critic_updates=1)
  config.stage.detached.degradation.detached = True
  config.stages = STAGES
  return config


def mesh_of(shape):
  return parallel.make_mesh(jax.devices()[: int(np.prod(shape))], shape)


def batch_of(config):
  rng, d = np.random.default_rng(0), config.data
  shape = (d.batch_size, d.frames, d.height, d.width, 3)
  text = rng.integers(1, 99, (d.batch_size, d.text_length))
  return Batch(
    rng.normal(size=shape).astype(np.float32),
    text.astype(np.int32),
    np.array([0, 1, 0, 0], np.int32),
  )


def weights_of(config, mesh):
  """The weights of one device, every one of them moved off zero, cut."""
  one = jax.device_get(Program(config, mesh_of(ONE)).init().params)
  rng = np.random.default_rng(1)
  moved = lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32)
  shardings = Program(config, mesh).shardings.params
  return jax.device_put(jax.tree.map(moved, one), shardings)


def graded(config, shape):
  """(loss, gradients) of every stage."""
  mesh = mesh_of(shape)
  program = Program(config, mesh)
  program.check()
  params = weights_of(config, mesh)
  batch = parallel.put_batch(batch_of(config), mesh)
  losses = {name: program.loss(name) for name in config.stages}
  key = jax.random.key(0)

  def all_of(params, batch):
    def one(name):
      memory = program.memory(name, params)
      if dmd.TEACHER in memory:  # another network, or it would agree
        memory[dmd.TEACHER] = jax.tree.map(lambda w: 1.1 * w, params)
      context = StepContext(params, memory)
      loss = lambda p: losses[name](p, batch, key, context)[0]
      return jax.value_and_grad(loss)(params)

    return {name: one(name) for name in losses}

  places = program.shardings.params
  out = {name: (parallel.replicated(mesh), places) for name in losses}
  step = jax.jit(all_of, out_shardings=out)
  return jax.device_get(step(params, batch))


@functools.cache
def one_device(top_k, stage):
  config = config_of(top_k)
  config.stages = (stage,)
  return graded(config, ONE)[stage]


# Every mesh with every objective takes minutes to compile.
ALL = bool(os.environ.get("AVD_TEST_ALL"))
# Of the axes, tests/test_training.py has data and fsdp.
EVERY = [(shape, k, STAGES) for shape in (*AXES, *MIXED) for k in (None, 2)]
SOME = [
  ((1, 1, 4, 1), None, ("resampling",)),
  (MIXED[0], None, STAGES[:4]),
  (MIXED[0], 2, ("teacher_forcing", "detached")),
  (MIXED[1], 2, ("resampling",)),
]


@pytest.mark.parametrize(
  ("shape", "top_k", "stages"),
  EVERY if ALL else SOME,
)
def test_losses_and_gradients_are_those_of_one_device(shape, top_k, stages):
  config = config_of(top_k)
  config.stages = stages
  found = graded(config, shape)
  wanted = {name: one_device(top_k, name) for name in stages}
  assert all(np.isfinite(loss) and loss > 0 for loss, _ in wanted.values())
  jax.tree.map(CLOSE, found, wanted)


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_rollout_is_that_of_one_device(top_k):
  """Sampling from noise, from given chunks, into a cache that is cut."""
  config = config_of(top_k)
  results = []
  for shape in (ONE, *MIXED, *(AXES if ALL else ())):
    mesh = mesh_of(shape)
    program = Program(config, mesh)
    model = denoiser.make(program.model, mesh)
    params = weights_of(config, mesh)
    batch = parallel.put_batch(batch_of(config), mesh)

    def make(params, x, text, model=model):
      cache = model.init_cache(x[:, :2], 4)
      cache = rollout.prefill(model, params, x[:, :2], text, cache)
      made, cache = rollout.rollout(
        model, params, x[:, 2:], jnp.ones((4, 3)), text, cache,
        grid=solvers.time_grid(2), first_chunk=1,
      )  # fmt: skip
      return made, cache.kv

    made, kv = jax.jit(make)(params, batch.x, batch.text)
    cut = parallel.spec(parallel.HEADS)
    assert kv.k[0].sharding.is_equivalent_to(
      jax.NamedSharding(mesh, cut), kv.k[0].ndim
    )
    results.append(jax.device_get((made, kv)))
  for found in results[1:]:
    jax.tree.map(CLOSE, found, results[0])


def batch_like(program):
  """Shapes of a batch, cut over the program's mesh."""
  place = parallel.batch_sharding(program.mesh)
  return jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
    program.batch,
  )


def test_splash_lowers_where_nothing_is_recomputed(monkeypatch):
  """Its tables are made while a scan within a shard_map is linearized: no
  tracer may get into them."""
  monkeypatch.setattr(attention, "platform_of", lambda place: "tpu")
  config = config_of(dim=128, num_layers=2, remat="none")
  config.model.attention.update(window=None, sink=0)
  mesh = mesh_of((2, 1, 1, 1))
  program = Program(config, mesh)
  state, loss = program.abstract_state(), program.loss("teacher_forcing")
  key = jax.random.key(0)
  grad = jax.grad(lambda p, b: loss(p, b, key, StepContext(p))[0])
  traced = jax.jit(grad).trace(state.params, batch_like(program))
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert "tpu_custom_call" in text
