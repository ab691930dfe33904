"""The rivals of self-resampling, each against its arithmetic by hand."""

import functools

import jax
import jax.numpy as jnp
import linear
import numpy as np
import pytest
import scipy.stats

from avd_jax.algorithms import (
  consistency,
  diffusion_forcing,
  flow_loss,
  histories,
)
from avd_jax.diffusion import flow_matching, solvers
from avd_jax.typing import Batch, StepContext

NULL = jnp.zeros(4, jnp.int32)
LEVELS = flow_matching.logit_normal(3.0)
# v = 0: a resampled chunk is then x_{t_s} itself.
STILL = linear.params(own=0, past=0, level=0, text=0)
Options = histories.Degradation

spread = lambda z: np.asarray(z, np.float64)[..., None, None, None]


@functools.cache
def compiled(kind, options):
  return jax.jit(kind(linear.denoiser(), options))


def make(kind, options, x, text, key=0, params=None, ramp=1.0):
  context = StepContext(ramp=jnp.float32(ramp))
  params = params or linear.params()
  return compiled(kind, options)(params, x, text, jax.random.key(key), context)


def read(options, b=3, f=5, key=0):
  """(levels [b n], noise [b f ...]), read off two noise-augmented videos."""
  one, text = linear.batch(b, f, 1)
  h, h0 = (
    np.asarray(make(histories.noise_augmented, options, x, text, key).x)
    for x in (one, jnp.zeros_like(one))
  )
  kept = ((h - h0) * one).sum((2, 3, 4)) / (one**2).sum((2, 3, 4))
  level = 1 - np.asarray(kept, np.float64)
  noise = np.zeros(h0.shape)
  return level, np.divide(h0, spread(level), where=h0 != 0, out=noise)


def spy(denoiser):
  """(the denoiser, what its parallel face is called with)."""
  calls = []

  def parallel(params, x, t, text, history=None):
    calls.append((params, x, t, history))
    return denoiser.parallel(params, x, t, text, history)

  return denoiser._replace(parallel=parallel), calls


def by_hand(x, t, text, past=None, changes=None):
  """Velocities [b n ...] of chunks of one frame, in float64.

  Given `past`, (chunks, levels): the history; else the chunks themselves.
  """
  x = np.asarray(x, np.float64)
  chunks, told = (x, t) if past is None else past
  pairs = [
    (np.asarray(chunks[:, i], np.float64), told[:, i])
    for i in range(x.shape[1])
  ]
  v = [
    linear.velocity(x[:, i], t[:, i], pairs[:i], text, changes)
    for i in range(x.shape[1])
  ]
  return np.stack(v, 1)


# --- noise augmentation ------------------------------------------------------


@pytest.mark.parametrize("tell", [False, True])
def test_noise_augmentation_is_equation_3_by_hand(tell):
  options = Options(tell=tell, clean_prefix=2)
  level, noise = read(options)
  x, text = linear.batch(3, 5, 2)
  h = make(histories.noise_augmented, options, x, text)
  t = spread(level)
  np.testing.assert_allclose(h.x, (1 - t) * x + t * noise, atol=1e-5)
  np.testing.assert_allclose(h.t, level if tell else 0 * level, atol=1e-6)
  assert h.cache is None
  for clean in (0, 1, 4):  # the prefix, and the last, that nobody looks back at
    np.testing.assert_array_equal(h.x[:, clean], x[:, clean])
  assert (level[:, 2:4] > 1e-3).all()
  np.testing.assert_allclose(level[:, 2], level[:, 3], atol=1e-5)


@pytest.mark.parametrize("shift", [0.6, 0.1])
def test_noise_augmentation_has_the_papers_levels(shift):
  """Counted from clean: a small shift is little noise."""
  level, noise = read(Options(shift=shift, clean_prefix=0), 512, 3)
  z = np.log(level[:, 0] / (1 - level[:, 0])) - np.log(shift)
  assert scipy.stats.kstest(z, "norm").pvalue > 0.01
  assert scipy.stats.kstest(noise[:, :2].ravel(), "norm").pvalue > 0.01
  rho = np.corrcoef(noise[:, 0].ravel(), noise[:, 1].ravel())[0, 1]
  assert abs(rho) < 0.1


def test_without_shift_a_history_stays_clean():
  x, text = linear.batch(64)
  h = make(histories.noise_augmented, Options(shift=1e-6, tell=True), x, text)
  np.testing.assert_allclose(h.x, x, atol=2e-3)
  assert h.t.max() < 1e-3


@pytest.mark.parametrize("steps", [1, 3])
def test_methods_differ_in_nothing_but_the_method(steps):
  """A model that never moves: all degrade the same chunks by the same noise."""
  options = Options(share=0.5, random_prefix=True, tell=True, steps=steps)
  x, text = linear.batch(16, 5)
  one, *others = (
    make(kind, options, x, text, 3, STILL)
    for kind in (
      histories.noise_augmented,
      histories.parallel_resampled,
      histories.self_resampled,
    )
  )
  assert np.abs(one.x - x).max() > 0.1
  for other in others:
    np.testing.assert_allclose(one.x, other.x, atol=1e-6)
    np.testing.assert_array_equal(one.t, other.t)


@pytest.mark.parametrize(("share", "ramp"), [(0.5, 1.0), (1.0, 0.25), (0.5, 0)])
def test_a_ramp_scales_the_share_of_degraded_videos(share, ramp):
  x, text = linear.batch(512, 3)
  h = make(
    histories.noise_augmented, Options(share=share), x, text, 1, ramp=ramp
  )
  same = np.asarray((h.x == x).all((2, 3, 4)))
  assert same[:, [0, 2]].all()
  want = share * ramp
  degraded = 512 - same[:, 1].sum()
  assert abs(degraded - 512 * want) <= 4 * np.sqrt(512 * want * (1 - want))


# --- parallel resampling -----------------------------------------------------


@pytest.mark.parametrize("tell", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_parallel_resampling_by_hand(steps, tell):
  """Every chunk on top of the clean ones before it, whatever became of them."""
  options = Options(steps=steps, tell=tell)
  level, noise = read(options)
  x, text = linear.batch(3, 5, 2)
  made = make(histories.parallel_resampled, options, x, text)
  t = spread(level)
  h = (1 - t) * x + t * noise
  truth = (x, np.zeros_like(level))
  for step in range(steps):
    v = by_hand(h, level * (1 - step / steps), text, truth)
    h = h - t / steps * v
  np.testing.assert_allclose(made.x, h, atol=2e-5)
  np.testing.assert_allclose(made.t, level if tell else 0 * level, atol=1e-6)


def test_it_is_self_resampling_until_errors_propagate():
  x, text = linear.batch(3, 5, 2)
  kinds = (histories.parallel_resampled, histories.self_resampled)
  for options in (Options(), Options(steps=3)):
    one, other = (make(kind, options, x, text).x for kind in kinds)
    np.testing.assert_allclose(one[:, :2], other[:, :2], atol=1e-5)
    assert (np.abs(one - other)[:, 2:4].max((0, 2, 3, 4)) > 1e-2).all()
    # A model that does not look back carries nothing over.
    blind = linear.params(past=0.0)
    one, other = (make(k, options, x, text, params=blind).x for k in kinds)
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_no_gradient_passes_through_parallel_resampling():
  x, text = linear.batch()
  history = compiled(histories.parallel_resampled, Options(tell=True))

  def total(params):
    h = history(params, x, text, jax.random.key(0), StepContext())
    return jnp.sum(h.x**2) + jnp.sum(h.t)

  gradient = jax.grad(total)(linear.params())
  assert not any(np.any(g) for g in gradient.values())
  assert abs(total(linear.params()) - total(linear.params(own=1.0))) > 1e-2


# --- no history at all -------------------------------------------------------


def test_history_dropout_tells_of_noise_for_whole_videos():
  x, text = linear.batch(512, 3)
  options, key = Options(clean_prefix=0, tell=True), jax.random.key(4)
  plain = histories.noise_augmented(linear.denoiser(), options)
  h = jax.jit(histories.with_dropout(plain, 0.3))(linear.params(), x, text, key)
  told = np.asarray(h.t)
  gone = (told == 1).all(1)
  assert (gone == (told == 1).any(1)).all()
  assert abs(gone.sum() - 512 * 0.3) <= 4 * np.sqrt(512 * 0.3 * 0.7)
  noise = np.asarray(h.x)[gone]
  assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 0.01
  # Nothing of the video is left, nor of what else was drawn.
  kept = plain(linear.params(), x, text, jax.random.split(key, 3)[0])
  for other in (x, kept.x):
    rho = np.corrcoef(noise.ravel(), np.asarray(other)[gone].ravel())[0, 1]
    assert abs(rho) < 0.08
  np.testing.assert_allclose(h.x[~gone], kept.x[~gone], atol=1e-6)
  np.testing.assert_allclose(told[~gone], kept.t[~gone], atol=1e-6)
  assert histories.with_dropout(plain, 0.0) is plain


# --- given chunks ------------------------------------------------------------

GIVEN = jnp.array([2, 0, 3], jnp.int32)


def objective(kind, denoiser, **options):
  options = dict(null_text=NULL, text_dropout=0.0) | options
  if kind == "diffusion_forcing":
    return diffusion_forcing.diffusion_forcing(denoiser, LEVELS, **options)
  history = histories.ground_truth(denoiser)
  return flow_loss.flow_loss(denoiser, history, LEVELS, **options)


def run(loss_fn, batch, params=None, key=3, **context):
  params = params or linear.params()
  return loss_fn(params, batch, jax.random.key(key), StepContext(**context))[0]


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("given", [None, GIVEN])
@pytest.mark.parametrize("kind", ["diffusion_forcing", "flow_matching"])
def test_losses_by_hand(kind, given, skip):
  """Each chunk at a level of its own; given ones clean, and without loss."""
  denoiser, calls = spy(linear.denoiser())
  x, text = linear.batch(3, 4)
  loss = run(objective(kind, denoiser, skip_chunks=skip), Batch(x, text, given))
  (_, x_t, t, history), x64 = calls[0], np.asarray(x, np.float64)
  before = np.arange(4) < (np.zeros(3) if given is None else given)[:, None]
  t = np.asarray(t, np.float64)
  free = t[~before] if kind == "diffusion_forcing" else t
  assert len(np.unique(free)) == free.size
  assert (free > 0).all()
  if kind == "diffusion_forcing":
    assert history is None
    assert not t[before].any()
    np.testing.assert_array_equal(x_t[before], x[before])
    v = by_hand(x_t, t, text)
  else:
    np.testing.assert_array_equal(history.x, x)
    v = by_hand(x_t, t, text, (x, 0 * t))
  level = spread(np.where(t > 0, t, 1))
  noise = (np.asarray(x_t, np.float64) - (1 - level) * x64) / level
  weight = ~before & (np.arange(4) >= skip)
  error = ((v - (noise - x64)) ** 2)[weight]
  # What is given takes no loss, and makes no other chunk weigh more.
  share = weight[:, skip:].mean()
  np.testing.assert_allclose(loss, share * error.mean(), rtol=2e-4)


@pytest.mark.parametrize("kind", ["diffusion_forcing", "flow_matching"])
def test_given_chunks_take_exactly_no_loss(kind, monkeypatch):
  plain = linear.denoiser()
  x, text = linear.batch(3, 4)
  batch, before = Batch(x, text, GIVEN), jnp.arange(4) < GIVEN[:, None]

  def loss(off):
    said = lambda *args: plain.parallel(*args) + off
    return run(objective(kind, plain._replace(parallel=said)), batch)

  zero = jnp.zeros_like(x)
  value, gradient = jax.jit(jax.value_and_grad(loss))(zero)
  assert not np.any(gradient[before])
  assert (np.abs(gradient[~before]).max((1, 2, 3)) > 0).all()
  wrong = jnp.where(before[..., None, None, None], 1e6, zero)
  assert jax.jit(loss)(wrong) == jax.jit(loss)(zero)
  # Nor does it matter what they would have been noised to.
  draw, seen = jax.random.normal, []

  def other(key, shape, *args):
    noise = draw(key, shape, *args)
    if noise.ndim == 5:
      seen.append(shape)
      noise = jnp.where(before[..., None, None, None], 100.0, noise)
    return noise

  monkeypatch.setattr(jax.random, "normal", other)
  np.testing.assert_allclose(loss(zero), value, rtol=1e-6)
  assert seen == [x.shape]


@pytest.mark.parametrize("kind", ["diffusion_forcing", "flow_matching"])
def test_nothing_given_is_an_ordinary_clip(kind):
  x, text = linear.batch(3, 4)
  loss_fn = objective(kind, linear.denoiser())
  none = run(loss_fn, Batch(x, text))
  zero = run(loss_fn, Batch(x, text, jnp.zeros(3, jnp.int32)))
  np.testing.assert_allclose(none, zero, rtol=1e-7)


def test_the_loss_and_its_history_draw_apart():
  """Levels and noise of the two streams have nothing in common."""
  denoiser, calls = spy(linear.denoiser())
  options = Options(clean_prefix=0, tell=True, shift=3.0)
  history = histories.noise_augmented(denoiser, options)
  loss_fn = flow_loss.flow_loss(denoiser, history, LEVELS, null_text=NULL)
  x, text = linear.batch(200, 3)
  run(loss_fn, Batch(0 * x, text))  # what is left is noise
  _, x_t, t, h = calls[0]
  t, told = np.asarray(t)[:, :2], np.asarray(h.t)[:, :2]
  assert np.abs(np.corrcoef(t.ravel(), told.ravel())[0, 1]) < 0.2
  noise = np.asarray(x_t)[:, :2] / spread(t), np.asarray(h.x)[:, :2]
  noise = noise[0], noise[1] / spread(told)
  assert abs(np.corrcoef(*(z.ravel() for z in noise))[0, 1]) < 0.1


# --- consistency -------------------------------------------------------------


def cut_short(denoiser, **config):
  config = consistency.ConsistencyConfig(**(dict(steps=2, shift=2.0) | config))
  return consistency.consistency(
    denoiser,
    histories.ground_truth(denoiser),
    config,
    null_text=NULL,
    text_dropout=0.0,
  )


def among(calls, changes):
  """The call made with these weights."""
  (call,) = [c for c in calls if abs(c[0]["own"] - changes["own"]) < 1e-6]
  return call


def test_the_consistency_loss_by_hand():
  """Teacher's step, average's end, and the data itself where a path ends."""
  student, average, teacher = ({"own": own} for own in (0.4, 0.1, -0.6))
  denoiser, calls = spy(linear.denoiser())
  x, text = linear.batch(4, 4)
  loss = run(
    cut_short(denoiser, min_t=0.7),
    Batch(x, text),
    linear.params(**student),
    ema=linear.params(**average),
    memory={consistency.NAME: linear.params(**teacher)},
  )
  _, x_t, t, history = among(calls, teacher)
  np.testing.assert_array_equal(history.x, x)
  assert not np.any(history.t)
  grid = np.asarray(solvers.time_grid(2, 2.0), np.float64)  # 1, 2/3, 0
  t = np.asarray(t, np.float64)
  place = np.abs(t[..., None] - grid).argmin(-1)
  np.testing.assert_allclose(t, grid[place], atol=1e-6)
  assert set(place.ravel()) == {0, 1}
  then = grid[place + 1]
  truth = (x, 0 * t)
  x64, x_t = np.asarray(x, np.float64), np.asarray(x_t, np.float64)
  noise = (x_t - spread(1 - t) * x64) / spread(t)
  assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 0.01
  ahead = x_t + spread(then - t) * by_hand(x_t, t, text, truth, teacher)
  end = lambda x, t, who: x - spread(t) * by_hand(x, t, text, truth, who)
  target = end(ahead, then, average)
  np.testing.assert_array_equal(target[then == 0], ahead[then == 0])
  off = end(x_t, t, student) - target
  expected = ((off / spread(np.maximum(t, 0.7))) ** 2).mean()
  np.testing.assert_allclose(loss, expected, rtol=1e-4)
  # The student is asked at the same point, the average one step ahead.
  _, asked, level, _ = among(calls, student)
  np.testing.assert_allclose(asked, x_t, atol=1e-6)
  np.testing.assert_allclose(level, t, atol=1e-6)
  np.testing.assert_allclose(among(calls, average)[2], then, atol=1e-6)


def test_no_gradient_reaches_the_target():
  x, text = linear.batch(4, 4)
  loss_fn, batch = cut_short(linear.denoiser()), Batch(x, text)

  def loss(student, average, teacher):
    memory = {consistency.NAME: teacher}
    return run(loss_fn, batch, student, ema=average, memory=memory)

  one = linear.params()
  student, *others = jax.jit(jax.grad(loss, (0, 1, 2)))(one, one, one)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(others))
  assert all(abs(leaf) > 1e-4 for leaf in student.values())
  shared = jax.jit(jax.grad(lambda p: loss(p, p, p)))(one)
  for name, leaf in student.items():
    np.testing.assert_allclose(shared[name], leaf, rtol=1e-5)


def test_straight_paths_to_the_data_have_no_consistency_loss():
  x, text = linear.batch(4, 4)

  def parallel(params, x_t, t, text, history):
    return (x_t - params["to"]) / t[..., None, None, None]

  denoiser = linear.denoiser()._replace(parallel=parallel)
  loss_fn = cut_short(denoiser, steps=5, shift=1.0)

  def loss(student):
    memory = {consistency.NAME: {"to": x}}
    return run(loss_fn, Batch(x, text), student, ema={"to": x}, memory=memory)

  assert jax.jit(loss)({"to": x}) < 1e-9
  # Elsewhere it is the distance, in units of the level.
  assert jax.jit(loss)({"to": x + 0.1}) > 0.01


def test_given_chunks_take_no_consistency_loss():
  x, text = linear.batch(3, 4)
  plain, before = linear.denoiser(), jnp.arange(4) < GIVEN[:, None]

  def loss(off):
    said = lambda params, *args: plain.parallel(params, *args) + params["off"]
    denoiser = plain._replace(parallel=said)
    still = linear.params() | {"off": jnp.zeros_like(x)}
    return run(
      cut_short(denoiser),
      Batch(x, text, GIVEN),
      still | {"off": off},
      ema=still,
      memory={consistency.NAME: still},
    )

  gradient = jax.jit(jax.grad(loss))(jnp.full_like(x, 0.1))
  assert not np.any(gradient[before])
  assert (np.abs(gradient[~before]).max((1, 2, 3)) > 0).all()
