"""A run of training: the same, whatever happens to it on the way."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from avd_jax import checkpoint, parallel
from avd_jax import config as config_lib
from avd_jax.data import pipeline
from avd_jax.errors import UserError
from avd_jax.training import loop, optim
from avd_jax.training.program import Program
from avd_jax.training.state import TrainState
from avd_jax.training.step import Schedule

STAGES = ("teacher_forcing", "resampling_forcing")
ONE = (1, 1, 1, 1)


def tiny(**log):
  """Five steps of each method; a row every 3 and a checkpoint every 2."""
  config = config_lib.default()
  config.data.update(frames=4, batch_size=8)
  config.model.update(
    dim=16,
    ffn_dim=16,
    num_heads=2,
    num_layers=1,
    patch=6,
    text="none",
    freq_dim=4,
    scan_unroll=1,
    attention=dict(window=2, sink=1),
  )
  config.optimizer.ema = 0.8
  for name in STAGES:
    config.stage[name].update(steps=5, warmup_steps=2, decay_steps=2)
  config.log.update(dict(every=3, checkpoint_every=2, keep=2) | log)
  return config


def mesh(shape=ONE):
  return parallel.make_mesh(jax.devices()[: int(np.prod(shape))], shape)


def equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def rows(workdir):
  """metrics.jsonl without the one column that a clock fills."""
  lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
  out = [json.loads(line) for line in lines]
  for row in out:
    assert row.pop("steps_per_second") > 0
  return out


@pytest.fixture(scope="module", autouse=True)
def programs():
  """Runs of one config share their compiled steps, to save compiling again."""
  shared = {}

  def make(config, mesh):
    program = Program(config, mesh)
    values = config_lib.to_json(config)
    same = {k: values[k] for k in ("data", "model", "loss", "optimizer")}
    key = json.dumps(same, sort_keys=True) + str(mesh)
    program.__dict__["_steps"] = shared.setdefault(key, {})
    return program

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop, "Program", make)
    yield make


@pytest.fixture(scope="module")
def whole(tmp_path_factory, programs):
  """(workdir, final state) of a run that nothing interrupted."""
  workdir = tmp_path_factory.mktemp("whole")
  final = loop.train(tiny(), workdir, mesh(), progress=False)
  steps = programs(tiny(), mesh())._steps.values()
  # One trace a stage: no step after the first is compiled again.
  assert [step._cache_size() for step in steps] == [1, 1]
  return workdir, final


def at(rate):
  return Schedule(np.float32(rate), np.float32(1.0))


# --- the run -----------------------------------------------------------------


def test_a_run_is_its_steps_one_after_another(whole, programs):
  """The whole loop against a plain one: data, stages, rates, rows."""
  workdir, final = whole
  config = tiny()
  program = programs(config, mesh())
  data = config_lib.typed(pipeline.DataConfig, config.data)
  batches = pipeline.batches(data, pipeline.make_source(data))
  state, logged = program.init(), []
  for name in STAGES:
    if name == STAGES[1]:
      state = program.begin_stage(state, name)
    launch = program.step(name)
    for step in range(5):
      rate = optim.learning_rate(config.stage[name], step)
      batch = parallel.put_batch(next(batches), program.mesh)
      rate = jax.device_put(at(rate))
      # A step asks nothing of the host: no constant, no result.
      with jax.transfer_guard("disallow"):
        state, found = launch(state, batch, rate)
      logged.append((name, jax.device_get(found)))
  batches.close()
  equal(final, state)
  expected = []
  for last in (3, 6, 9):
    found = [m for _, m in logged[last - 3 : last]]
    row = {k: float(np.mean([m[k] for m in found])) for k in found[0]}
    expected.append({"step": last, "stage": logged[last - 1][0]} | row)
  assert rows(workdir) == expected


def test_a_finished_run_is_returned_as_it_is(whole):
  workdir, final = whole
  equal(loop.train(tiny(), workdir, mesh(), progress=False), final)


class Killed(BaseException):
  """Stands for a process that ends here."""


@contextlib.contextmanager
def at_batch(count, act):
  """Calls `act` before the given batch of a run."""
  real = pipeline.batches

  def batches(*args):
    for index, batch in enumerate(real(*args)):
      if index == count:
        act()
      yield batch

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline, "batches", batches)
    yield


def end():
  raise Killed


@pytest.mark.parametrize(
  ("every", "kills"),
  [(2, (3, 7)), (5, (6,)), (4, (2, 9))],
  ids=["within both stages", "after the switch", "before any checkpoint"],
)
def test_a_killed_run_ends_as_if_it_was_not(whole, tmp_path, every, kills):
  workdir, final = whole
  config, start = tiny(checkpoint_every=every), 0
  for kill in kills:
    with at_batch(kill - start, end), pytest.raises(Killed):
      loop.train(config, tmp_path, mesh(), progress=False)
    start = kill // every * every  # the newest checkpoint
  state = loop.train(config, tmp_path, mesh(), progress=False)
  equal(state, final)
  assert rows(tmp_path) == rows(workdir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on(whole, tmp_path, number):
  workdir, final = whole
  config = tiny(checkpoint_every=100)
  before = signal.getsignal(number)
  send = lambda: os.kill(os.getpid(), number)
  with at_batch(3, send), pytest.raises(loop.Interrupted) as stop:
    loop.train(config, tmp_path, mesh(), progress=False)
  assert signal.getsignal(number) == before
  saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
  assert len(saved) == 1
  assert 4 <= saved[0] <= 4 + loop.AHEAD + 1
  assert f"step {saved[0]} of 10" in str(stop.value)
  equal(loop.train(config, tmp_path, mesh(), progress=False), final)
  assert rows(tmp_path) == rows(workdir)


def test_a_second_signal_acts_as_ever():
  with loop.interruptible() as caught:
    os.kill(os.getpid(), signal.SIGINT)
    assert caught == [signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)


CHILD = """
import conftest, sys, time
import test_training as t

def hang():
  print("here", flush=True)
  time.sleep(600)

with t.at_batch(7, hang):
  t.loop.train(t.tiny(), sys.argv[1], t.mesh(), progress=False)
"""


def test_a_process_killed_outright_resumes(whole, tmp_path):
  workdir, final = whole
  child = subprocess.Popen(
    [sys.executable, "-c", CHILD, str(tmp_path)],
    cwd=Path(__file__).parent,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert child.stdout.readline().strip() == "here"
  finally:
    child.kill()
    child.wait()
    child.stdout.close()
  assert child.returncode == -signal.SIGKILL
  assert not (tmp_path / "checkpoints" / "10").exists()
  equal(loop.train(tiny(), tmp_path, mesh(), progress=False), final)
  assert rows(tmp_path) == rows(workdir)


class Late:
  """A metric of a step; it remembers how far the host was when it was read."""

  def __init__(self, step, clock):
    self.step, self.clock = step, clock

  def block_until_ready(self):
    self.clock["waited"].append(self.clock["launched"] - self.step)
    return self

  def __array__(self, dtype=None, copy=None):
    self.clock["read"].append(self.clock["launched"] - self.step)
    return np.zeros((), np.float32)


def test_the_host_never_waits_for_the_step_it_launched(tmp_path, monkeypatch):
  clock = {"launched": 0, "waited": [], "read": []}

  def launch(state, batch, rate):
    clock["launched"] += 1
    return state, {"loss": Late(clock["launched"], clock)}

  monkeypatch.setattr(Program, "step", lambda self, name, local: launch)
  config = tiny(checkpoint_every=100)
  config.stage.teacher_forcing.steps = 15
  config.stages = STAGES[:1]
  loop.train(config, tmp_path, mesh(), progress=False)
  assert len(clock["waited"]) == 15 - loop.AHEAD
  assert set(clock["waited"]) == {loop.AHEAD}
  # Rows are read an interval late, but for the last, at the end.
  assert len(clock["read"]) == 15
  assert all(lag >= 3 for lag in clock["read"][:12])


# --- stages ------------------------------------------------------------------


def test_a_stage_starts_with_a_fresh_optimizer(whole, programs):
  _, final = whole
  program = programs(tiny(), mesh())
  state = program.begin_stage(final, STAGES[1])
  moments = [np.abs(x).max() for x in jax.tree.leaves(state.optimizer)]
  assert not any(moments)
  assert max(np.abs(x).max() for x in jax.tree.leaves(final.optimizer)) > 0
  for field in ("step", "params", "ema", "seed"):
    equal(getattr(state, field), getattr(final, field))
  given = program.begin_stage(state, STAGES[1], final.ema)
  equal(given.params, final.ema)
  equal(given.ema, final.ema)
  assert given.step == 10


def test_a_run_starts_from_the_average_of_another(whole, tmp_path, programs):
  workdir, final = whole
  config = tiny()
  config.init_from = str(workdir)
  program = programs(config, mesh())
  equal(loop.initial_weights(config, program), final.ema)
  # With a rate of 0 weights stay: what comes out is what went in.
  for name in STAGES:
    config.stage[name].learning_rate = 0.0
  state = loop.train(config, tmp_path, mesh(), progress=False)
  equal(state.params, final.ema)
  assert state.step == 10


def test_init_from_refuses_what_does_not_fit(whole, tmp_path, programs):
  workdir, _ = whole
  config = tiny()
  config.init_from = str(tmp_path / "nowhere")
  with pytest.raises(UserError, match="nowhere does not exist"):
    loop.initial_weights(config, programs(config, mesh()))
  # Weights, but of no kind that is read.
  stray, kinds = tmp_path / "model.bin", r"\(\.safetensors, \.pth, \.pt\)"
  stray.write_bytes(b"")
  for origin, what in ((stray, "is a file"), (tmp_path, "no checkpoints")):
    config.init_from = str(origin)
    with pytest.raises(UserError, match=f"{what}.*own files {kinds}") as error:
      loop.initial_weights(config, programs(config, mesh()))
    assert "exist" not in str(error.value)
  config.init_from = str(workdir)
  config.model.ffn_dim = 32
  with pytest.raises(UserError, match=r"another model .*ffn_dim: 16 -> 32"):
    loop.initial_weights(config, programs(config, mesh()))


def test_weights_may_start_under_another_attention(whole, tmp_path, programs):
  """A dense model goes on routed, or with another window: the same weights."""
  workdir, final = whole
  config = tiny()
  config.init_from = str(workdir)
  config.model.attention.update(window=3, sink=0, routing_top_k=1)
  config.model.update(dtype="bfloat16", remat="block")
  program = programs(config, mesh())
  equal(loop.initial_weights(config, program), final.ema)


def test_an_attention_that_cannot_be_is_refused_before_training(tmp_path):
  config = tiny()
  config.model.attention.implementation = "triton"
  with pytest.raises(UserError, match=r"implementation 'triton': .*cpu"):
    loop.train(config, tmp_path, mesh(), progress=False)
  assert not list(tmp_path.glob("checkpoints/[0-9]*"))


@pytest.mark.parametrize("name", STAGES)
def test_the_loss_falls(programs, name):
  config = tiny()
  program = programs(config, mesh())
  data = config_lib.typed(pipeline.DataConfig, config.data)
  batch, _ = pipeline.fixed_batch(data, pipeline.make_source(data), range(8))
  batch = parallel.put_batch(batch, program.mesh)
  state, losses = program.init(), []
  step = program.step(name)
  for _ in range(80):
    state, found = step(state, batch, at(0.02))
    losses.append(found["loss"])
  losses = np.array(jax.device_get(losses))
  assert losses[-20:].mean() < 0.5 * losses[:5].mean()


# --- meshes ------------------------------------------------------------------


def two_steps(program, stage):
  """(losses, state) after two steps of a stage."""
  config = tiny()
  data = config_lib.typed(pipeline.DataConfig, config.data)
  batches = pipeline.batches(data, pipeline.make_source(data))
  state, losses = program.init(), []
  step = program.step(stage)
  for _ in range(2):
    batch = parallel.put_batch(next(batches), program.mesh)
    state, found = step(state, batch, at(1e-3))
    losses.append(float(found["loss"]))
  batches.close()
  return losses, state


@pytest.mark.parametrize(
  ("shape", "stage"), [((8, 1, 1, 1), STAGES[0]), ((1, 4, 1, 2), STAGES[1])]
)
def test_eight_devices_compute_what_one_does(programs, shape, stage):
  expected, one = two_steps(programs(tiny(), mesh()), stage)
  program = Program(tiny(), mesh(shape))
  losses, state = two_steps(program, stage)
  assert program.step(stage)._cache_size() == 1
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    jax.device_get(state.params),
    jax.device_get(one.params),
  )
  # And they share the work: large weights, and their moments, lie in parts.
  kernel = state.params["blocks"]["ffn"]["up"]["kernel"]
  parts = {str(s.index) for s in kernel.addressable_shards}
  assert len(parts) == shape[1] * shape[3]
  moment = state.optimizer[1][0].mu["blocks"]["ffn"]["up"]["kernel"]
  assert moment.sharding == kernel.sharding


def test_a_checkpoint_moves_to_another_mesh(whole):
  workdir, final = whole
  target = Program(tiny(), mesh((1, 4, 1, 2))).abstract_state()
  checkpoints, step = checkpoint.open_existing(workdir)
  state = TrainState(**checkpoints.restore(step, target._asdict()))
  checkpoints.close()
  equal(state, final)
  places = lambda tree: [leaf.sharding for leaf in jax.tree.leaves(tree)]
  assert places(state) == places(target)


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 2, 1, 2), (1, 1, 1, 8)])
def test_every_leaf_can_be_cut_as_the_rules_say(shape):
  config = tiny()
  config.model.update(text="bytes", text_dim=8, num_heads=2)
  for name in ("adamw", "muon"):
    config.optimizer.name = name
    state = Program(config, mesh(shape)).abstract_state()
    cut = [s.sharding.shard_shape(s.shape) for s in jax.tree.leaves(state)]
    full = [s.shape for s in jax.tree.leaves(state)]
    assert sum(map(np.prod, cut)) < 0.9 * sum(map(np.prod, full))


def test_a_mesh_that_cannot_cut_the_model_is_refused():
  with pytest.raises(UserError, match=r"cannot cut .* 16\) along .*fsdp"):
    Program(tiny(), mesh((1, 3, 1, 1))).abstract_state()


def test_meshes_and_batches_that_do_not_fit_are_refused(tmp_path):
  with pytest.raises(UserError, match="does not fit 8 devices"):
    parallel.make_mesh(jax.devices(), (3, 1, 1, 1))
  wrong = [(1, 1, 1), (-1, -1, 1, 1), (0, 1, 1, 1)]
  for shape in (*wrong, (-2, -4, 1, 1), (-1, -2, 1, 1)):
    with pytest.raises(UserError, match="give 4 sizes"):
      parallel.make_mesh(jax.devices(), shape)
  assert parallel.make_mesh(jax.devices(), (-1, 2, 1, 2)).shape["data"] == 2
  config = tiny()
  config.data.batch_size = 12
  with pytest.raises(UserError, match=r"batch_size 12 is not divisible .* 8"):
    loop.train(config, tmp_path, mesh((8, 1, 1, 1)))
  config = tiny()
  config.optimizer.accumulation = 3
  with pytest.raises(UserError, match=r"batch_size 8 .* accumulation 3"):
    loop.train(config, tmp_path, mesh())


# --- what is refused ---------------------------------------------------------


def test_another_config_is_refused_and_named(whole):
  workdir, _ = whole
  config = tiny()
  config.model.ffn_dim, config.stage.teacher_forcing.steps = 32, 6
  config.log.every = 50  # free to change
  with pytest.raises(UserError) as error:
    loop.train(config, workdir, mesh(), progress=False)
  assert "model.ffn_dim: 16 -> 32" in str(error.value)
  assert "stage.teacher_forcing.steps: 5 -> 6" in str(error.value)
  assert "log" not in str(error.value).replace(str(workdir), "")
  assert "\n" not in str(error.value)


def test_a_mistake_leaves_the_workdir_usable(tmp_path):
  """What failed before training began may be mended and started again."""
  config = tiny()
  config.init_from = str(tmp_path / "typo")
  with pytest.raises(UserError, match="typo does not exist"):
    loop.train(config, tmp_path / "run", mesh(), progress=False)
  config.init_from = ""
  with at_batch(0, end), pytest.raises(Killed):
    loop.train(config, tmp_path / "run", mesh(), progress=False)
