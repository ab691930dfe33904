"""Stages that remember, or that change programs, go on as they would have."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import Killed, at_batch, end, equal, mesh, rows, tiny

from avd_jax import config as config_lib
from avd_jax import parallel
from avd_jax.algorithms import consistency, dmd, error_bank
from avd_jax.data import pipeline
from avd_jax.training import loop, optim
from avd_jax.training.program import Program
from avd_jax.training.step import Schedule

WARMUP, METHOD = "teacher_forcing", "resampling_forcing"


def small(**changes):
  """A step of teacher forcing, then four of a method."""
  config = tiny(every=1, checkpoint_every=3)
  config.data.frames = 3
  config.stage[WARMUP].update(steps=1)
  config.stage[METHOD].update(steps=4)
  for name, value in changes.items():
    section = config.stage[METHOD]
    if isinstance(value, dict):
      section[name].update(value)
    else:
      section[name] = value
  return config


BANK = small(
  history="error_bank", bank=dict(buckets=3, size=4, input_share=1.0)
)
BANK.optimizer.accumulation = 2
SHORT = small(objective="consistency", consistency=dict(steps=4))
DISTILLED = small(objective="dmd", history="ground_truth", dmd=dict(steps=2))
FULL = small(degradation=dict(detached=True, full_every=2))
RUNS = {
  "bank": BANK,
  "consistency": SHORT,
  "dmd": DISTILLED,
  "full_every": FULL,
}


@pytest.fixture(scope="module", autouse=True)
def programs():
  """Configs share their compiled steps; `ran` is what a run has launched."""
  shared, ran = {}, []

  class Watched(Program):
    def step(self, name, local=0):
      step = super().step(name, local)
      (kind,) = [k for k, other in self._steps.items() if other is step]
      ran.append((name, local, kind))
      return step

  def make(config, mesh):
    program = Watched(config, mesh)
    same = config.optimizer.accumulation, *program.abstract_state().memory
    program.__dict__.update(_steps=shared.setdefault(same, {}), ran=ran)
    return program

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "Program", make)
    yield make


@pytest.fixture(scope="module")
def whole(tmp_path_factory, programs):
  """name -> (workdir, final state, what ran) of an uninterrupted run."""
  done = {}

  def get(name):
    if name not in done:
      workdir = tmp_path_factory.mktemp(name)
      ran = programs(RUNS[name], mesh()).ran
      ran.clear()
      final = loop.train(RUNS[name], workdir, mesh(), progress=False)
      done[name] = workdir, final, list(ran)
    return done[name]

  return get


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_remembers(whole, tmp_path, programs, name):
  """Killed in the middle of the method's stage: bit-equal in the end."""
  workdir, final, ran = whole(name)
  program = programs(RUNS[name], mesh())
  program.ran.clear()
  with at_batch(3, end), pytest.raises(Killed):
    loop.train(RUNS[name], tmp_path, mesh(), progress=False)
  state = loop.train(RUNS[name], tmp_path, mesh(), progress=False)
  equal(state, final)
  assert rows(tmp_path) == rows(workdir)
  assert program.ran == ran


def test_teacher_stays_and_critic_learns(whole, programs):
  """And both begin a stage as the weights that it starts from."""
  _, final, _ = whole("dmd")
  program = programs(DISTILLED, mesh())
  kernel = lambda tree: tree["patch_embedding"]["kernel"]
  teacher, critic = (final.memory[name] for name in (dmd.TEACHER, dmd.CRITIC))
  assert np.abs(kernel(critic.params) - kernel(teacher)).max() > 0
  state = program.begin_stage(final, METHOD)
  equal(state.memory[dmd.TEACHER], final.ema)
  equal(state.memory[dmd.CRITIC].params, final.ema)
  moments = jax.tree.leaves(state.memory[dmd.CRITIC].optimizer)
  assert not any(map(np.any, moments))


def test_a_row_may_span_methods_with_other_metrics(tmp_path):
  config = copy.deepcopy(SHORT)
  config.log.update(every=2, checkpoint_every=100)
  loop.train(config, tmp_path, mesh(), progress=False)
  first, second = rows(tmp_path)
  assert first["history_error"] == 0
  assert "history_error" not in second


def test_a_bank_holds_what_its_own_stage_has_made(whole):
  _, final, _ = whole("bank")
  bank = final.memory[error_bank.NAME]
  # Eight videos a step.
  assert bank.written.sum() == 4 * 8
  assert bank.errors.shape == (3, 4, 1, 12, 12, 3)
  for kept, written in zip(bank.errors, bank.written, strict=True):
    some = np.abs(kept).max((1, 2, 3, 4)) > 0
    np.testing.assert_array_equal(some, np.arange(4) < written)


def test_a_stage_starts_with_a_new_memory(whole, programs):
  for name in ("bank", "consistency"):
    _, final, _ = whole(name)
    program = programs(RUNS[name], mesh())
    state = program.begin_stage(final, METHOD)
    if name == "bank":
      assert not any(map(np.any, state.memory[error_bank.NAME]))
    else:
      teacher = state.memory[consistency.NAME]
      equal(teacher, final.ema)
      before = final.memory[consistency.NAME]
      kernel = lambda tree: tree["patch_embedding"]["kernel"]
      assert np.abs(kernel(before) - kernel(teacher)).max() > 0
    # A stage without one leaves it alone.
    equal(program.begin_stage(final, WARMUP).memory, final.memory)


def test_the_teacher_is_the_average_that_the_stage_began_with(whole, programs):
  _, final, _ = whole("consistency")
  program = programs(SHORT, mesh())
  data = config_lib.typed(pipeline.DataConfig, SHORT.data)
  batches = pipeline.batches(data, pipeline.make_source(data))
  rate = optim.learning_rate(SHORT.stage[WARMUP], 0)
  schedule = Schedule(np.float32(rate), np.float32(1.0))
  batch = parallel.put_batch(next(batches), program.mesh)
  batches.close()
  state, _ = program.step(WARMUP)(program.init(), batch, schedule)
  equal(final.memory[consistency.NAME], state.ema)


def test_every_so_many_steps_run_both_streams(whole, programs):
  """Local steps 1, 3, ... of a stage learn through the history too."""
  _, final, ran = whole("full_every")
  kinds = [json.loads(kind) for name, _, kind in ran if name == METHOD]
  assert [kind["degradation"]["detached"] for kind in kinds] == [1, 0, 1, 0]
  program = programs(FULL, mesh())
  loose, full = (program.step(METHOD, local) for local in (0, 1))
  for local in range(2, 7):
    assert program.step(METHOD, local) is (loose, full)[local % 2]
  assert [step._cache_size() for step in (loose, full)] == [1, 1]
  # It is the very step of a stage that never detaches.
  never = copy.deepcopy(FULL)
  never.stage[METHOD].degradation.update(detached=False, full_every=0)
  assert programs(never, mesh()).step(METHOD, 0) is full
  data = config_lib.typed(pipeline.DataConfig, FULL.data)
  batch, _ = pipeline.fixed_batch(data, pipeline.make_source(data), range(8))
  batch = parallel.put_batch(batch, program.mesh)
  losses, norms = [], []
  for step in (loose, full):
    state = jax.tree.map(jnp.copy, final)  # it is donated
    schedule = Schedule(np.float32(1e-3), np.float32(1.0))
    _, found = step(state, batch, schedule)
    losses.append(found["loss"])
    norms.append(found["grad_norm"])
  np.testing.assert_allclose(*losses, rtol=1e-5)
  assert abs(norms[0] - norms[1]) > 1e-4 * norms[0]


def test_banks_and_teachers_lie_where_their_weights_do(programs):
  """On many devices: a bank everywhere, a teacher cut like the weights."""
  config = copy.deepcopy(SHORT)
  config.stage[WARMUP].update(history="error_bank")
  state = Program(config, mesh((1, 4, 1, 2))).abstract_state()
  teacher, bank = (
    state.memory[name] for name in (consistency.NAME, error_bank.NAME)
  )
  places = lambda tree: [leaf.sharding for leaf in jax.tree.leaves(tree)]
  assert places(teacher) == places(state.params)
  assert all(place.is_fully_replicated for place in places(bank))


def test_many_devices_fill_a_bank_as_one_does(programs):
  data = config_lib.typed(pipeline.DataConfig, BANK.data)
  batch, _ = pipeline.fixed_batch(data, pipeline.make_source(data), range(8))
  banks = []
  for program in (programs(BANK, mesh()), Program(BANK, mesh((4, 1, 1, 1)))):
    state = program.begin_stage(program.init(), METHOD)
    schedule = Schedule(np.float32(1e-3), np.float32(1.0))
    for _ in range(2):
      placed = parallel.put_batch(batch, program.mesh)
      state, _ = program.step(METHOD)(state, placed, schedule)
    banks.append(jax.device_get(state.memory[error_bank.NAME]))
  np.testing.assert_array_equal(*(bank.written for bank in banks))
  np.testing.assert_allclose(*(bank.errors for bank in banks), atol=1e-4)
