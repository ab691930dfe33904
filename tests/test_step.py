"""One step by hand: gradients, weights, averages, rates, and the rows of it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avd_jax import config as config_lib
from avd_jax.training import metrics, optim
from avd_jax.training.state import create
from avd_jax.training.step import Schedule, make_step
from avd_jax.typing import Batch, StepContext


def quadratic(params, batch, key, context):
  """Deterministic in the key; its gradient is linear in the batch."""
  loss = jnp.mean((batch.x @ params["w"] - batch.text) ** 2)
  found = {
    "loss": loss,
    "draw": jax.random.uniform(key),
    "ema": context.ema["w"][0, 0],
    "ramp": context.ramp,
  }
  return loss, (found, {"calls": context.memory["calls"] + 1})


def at(rate, ramp=1.0):
  return Schedule(rate, ramp)


def plain_step(batch=None, **options):
  tx = optax.sgd(1.0)
  step = make_step(quadratic, tx, ema_decay=0.75, **options)
  params = {"w": jnp.linspace(-1, 1, 12).reshape(4, 3)}
  return jax.jit(step), create(
    params, tx, {"calls": jnp.int32(0)}, jnp.uint32(7)
  )


@pytest.fixture(scope="module")
def regression():
  rng = np.random.default_rng(0)
  return Batch(
    *(jnp.asarray(rng.normal(size=(8, n)), jnp.float32) for n in (4, 3))
  )


@pytest.mark.parametrize("accumulation", [2, 8])
def test_accumulated_gradients_are_the_big_batch_s(regression, accumulation):
  step, state = plain_step()
  many, _ = plain_step(accumulation=accumulation)
  for _ in range(2):
    big, found = step(state, regression, at(0.1))
    small, found_small = many(state, regression, at(0.1))
    np.testing.assert_allclose(big.params["w"], small.params["w"], atol=1e-6)
    np.testing.assert_allclose(big.ema["w"], small.ema["w"], atol=1e-6)
    for name in ("loss", "grad_norm"):
      np.testing.assert_allclose(found[name], found_small[name], rtol=1e-5)
    state = big


def test_microbatches_draw_their_own_randomness(regression):
  many, state = plain_step(accumulation=2)
  _, found = many(state, regression, at(0.1))
  key = jax.random.fold_in(jax.random.key(7), 0)
  draws = [jax.random.uniform(k) for k in jax.random.split(key, 2)]
  assert abs(draws[0] - draws[1]) > 1e-3
  np.testing.assert_allclose(found["draw"], np.mean(draws), rtol=1e-6)


def test_randomness_is_the_seed_and_the_step(regression):
  step, state = plain_step()
  draw = lambda s: step(s, regression, at(0.1))[1]["draw"]
  assert draw(state) == draw(state)
  assert draw(state) != draw(state._replace(step=state.step + 1))
  assert draw(state) != draw(state._replace(seed=jnp.uint32(8)))


def test_ema_and_rate_by_hand(regression):
  step, state = plain_step()
  ema = np.asarray(state.ema["w"])
  key, context = jax.random.key(0), StepContext(state.ema, state.memory)
  grad = jax.grad(lambda p: quadratic(p, regression, key, context)[0])
  for count in range(3):
    w = state.params["w"] - 0.1 * grad(state.params)["w"]
    state, found = step(state, regression, at(0.1))
    np.testing.assert_allclose(state.params["w"], w, atol=1e-6)
    ema = 0.75 * ema + 0.25 * np.asarray(w)
    np.testing.assert_allclose(state.ema["w"], ema, atol=1e-6)
    assert state.step == count + 1
    np.testing.assert_allclose(found["learning_rate"], 0.1)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_are_told_of_the_average_the_memory_and_the_ramp(
  regression, accumulation
):
  step, state = plain_step(accumulation=accumulation)
  state = state._replace(ema={"w": state.params["w"] + 5})
  for calls in (1, 2):
    ema = state.ema["w"][0, 0]
    state, found = step(state, regression, at(0.1, 0.25))
    np.testing.assert_allclose(found["ema"], ema, rtol=1e-6)
    np.testing.assert_allclose(found["ramp"], 0.25)
    # What one microbatch remembers, the next one knows.
    assert state.memory["calls"] == calls * accumulation


def test_a_curriculum_rises_over_its_steps():
  stage = config_lib.stage("self_resampled", 20)
  assert [optim.ramp(stage, step) for step in (0, 9)] == [1.0, 1.0]
  stage.degradation.ramp_steps = 4
  ramps = [optim.ramp(stage, step) for step in range(6)]
  assert ramps == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizers_clip_and_decay(name):
  config = config_lib.default().optimizer
  config.update(name=name, clip_norm=1.0, weight_decay=0.1)
  tx = optim.make(config)
  params = {"blocks": {"q": {"kernel": jnp.ones((2, 4, 4))}}, "b": jnp.ones(3)}
  grads = jax.tree.map(jnp.zeros_like, params)
  update, _ = tx.update(grads, tx.init(params), params)
  # No gradient: what is left is decay, at the rate that the step scales.
  for leaf in jax.tree.leaves(update):
    np.testing.assert_allclose(leaf, -0.1, rtol=1e-5)
  # Gradients longer than the norm count alike, whatever their length.
  ramp = lambda p: 1e3 * jnp.arange(1.0, p.size + 1).reshape(p.shape)
  long = jax.tree.map(ramp, params)
  longer = jax.tree.map(lambda g: 1e3 * g, long)
  one, other = (
    tx.update(grads, tx.init(params), params)[1] for grads in (long, longer)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), one, other
  )


def test_learning_rate_rises_holds_and_falls():
  stage = config_lib.stage(
    "ground_truth",
    20,
    learning_rate=1.0,
    warmup_steps=4,
    decay_steps=5,
    final_lr_ratio=0.2,
  )
  rates = [optim.learning_rate(stage, step) for step in range(21)]
  np.testing.assert_allclose(rates[:5], [0.2, 0.4, 0.6, 0.8, 1.0])
  np.testing.assert_allclose(rates[4:16], 1.0)
  np.testing.assert_allclose(np.diff(rates[15:]), -0.16)
  np.testing.assert_allclose(rates[20], 0.2)
  flat = config_lib.stage("ground_truth", 3, warmup_steps=0)
  assert len({optim.learning_rate(flat, step) for step in range(3)}) == 1


def rows(workdir):
  lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_metrics_are_averaged_between_rows(tmp_path):
  writer = metrics.Writer(tmp_path, 2, 0)
  for step in range(1, 6):
    writer.push(step, "a", {"loss": jnp.float32(step)})
  assert [r["loss"] for r in rows(tmp_path)] == [1.5]  # the next is due
  begun = writer.flush()
  assert [r["loss"] for r in rows(tmp_path)] == [1.5, 3.5]
  assert begun == [{"loss": 5.0}]
  writer.push(6, "a", {"loss": jnp.float32(6)})
  writer.close()
  assert [r["loss"] for r in rows(tmp_path)] == [1.5, 3.5, 5.5]
  # A run that is back at step 5 forgets the row at 6, and writes it again.
  writer = metrics.Writer(tmp_path, 2, 5, begun)
  assert [r["step"] for r in rows(tmp_path)] == [2, 4]
  writer.push(6, "b", {"loss": jnp.float32(8)})
  writer.close()
  last = rows(tmp_path)[-1]
  assert (last["step"], last["stage"], last["loss"]) == (6, "b", 6.5)


def test_the_rate_of_a_row_is_its_own_interval_s(tmp_path, monkeypatch):
  """Rows are written late, and the last one right after the one before."""
  clock = iter([0.0, 2.0, 4.0])  # at the start, at steps 2 and 4
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
  writer = metrics.Writer(tmp_path, 2, 0)
  for step in range(1, 5):
    writer.push(step, "a", {"loss": jnp.float32(0)})
  writer.flush()
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  rates = [json.loads(line)["steps_per_second"] for line in lines]
  assert rates == [1.0, 1.0]
