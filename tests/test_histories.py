"""Histories and the loss: what is degraded, how much, and what learns of it."""

import functools

import jax
import jax.numpy as jnp
import linear
import numpy as np
import pytest
import scipy.stats

from avd_jax.algorithms import flow_loss, histories
from avd_jax.diffusion import flow_matching
from avd_jax.errors import UserError
from avd_jax.models import denoiser as denoiser_lib
from avd_jax.models.attention import AttentionConfig
from avd_jax.models.dit_config import DiTConfig
from avd_jax.typing import Batch, History, StepContext

NULL = jnp.zeros(4, jnp.int32)
# v = 0: a resampled chunk is then x_{t_s} itself, and shows its level.
STILL = linear.params(own=0, past=0, level=0, text=0)


def loss_of(denoiser, history, **options):
  return flow_loss.flow_loss(
    denoiser,
    history,
    flow_matching.logit_normal(3.0),
    null_text=NULL,
    **options,
  )


@functools.cache
def resampled(options):
  return jax.jit(histories.self_resampled(linear.denoiser(), options))


def make(options, params, x, text, key=0):
  return resampled(options)(params, x, text, jax.random.key(key))


def read(options, b=3, f=5, key=0):
  """(levels [b n], noise [b f ...]) that a history used, read off its output.

  With v = 0, h = (1 - t_s) x + t_s eps: two videos give t_s, and t_s the noise.
  """
  one, text = linear.batch(b, f, 1)
  h, h0 = (
    np.asarray(make(options, STILL, x, text, key).x, np.float64)
    for x in (one, jnp.zeros_like(one))
  )
  kept = ((h - h0) * one).sum((2, 3, 4)) / (one**2).sum((2, 3, 4))
  level = 1 - np.asarray(kept)
  spread = level[..., None, None, None]
  noise = np.zeros_like(h0)
  return level, np.divide(h0, spread, where=spread > 1e-3, out=noise)


# --- self-resampling ---------------------------------------------------------


@pytest.mark.parametrize("tell", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("prefix", [0, 2])
def test_self_resampling_is_equation_5_by_hand(steps, prefix, tell):
  """Each chunk from its own x_{t_s}, on top of the degraded ones before it."""
  options = histories.Degradation(steps=steps, clean_prefix=prefix, tell=tell)
  level, noise = read(options)
  x, text = linear.batch(3, 5, 2)
  history = make(options, linear.params(), x, text)
  x, past = np.asarray(x, np.float64), []
  for i in range(5):
    clean = x[:, i : i + 1]
    t_s = np.zeros(3) if i < prefix else level[:, i]
    t = t_s[:, None, None, None, None]
    h = (1 - t) * clean + t * noise[:, i : i + 1]
    for step in range(steps):
      now = t_s * (1 - step / steps)
      h = h - t / steps * linear.velocity(h, now, past, text)
    past.append((h, t_s if tell else 0 * t_s))
  expected = np.concatenate([h for h, _ in past], 1)
  np.testing.assert_allclose(history.x, expected, atol=2e-5)
  told = np.stack([told for _, told in past], 1)
  np.testing.assert_allclose(history.t, told, atol=1e-6)


def test_levels_are_one_per_video_and_noise_one_per_chunk():
  level, noise = read(histories.Degradation(clean_prefix=0), b=64, f=5)
  level, noise = level[:, :4], noise[:, :4]
  np.testing.assert_allclose(level, level[:, :1].repeat(4, 1), atol=1e-5)
  assert len(np.unique(level[:, 0].round(5))) == 64
  assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 0.01
  flat = noise.reshape(64, 4, -1)
  for i, j in ((0, 1), (1, 3)):
    rho = np.corrcoef(flat[:, i].ravel(), flat[:, j].ravel())[0, 1]
    assert abs(rho) < 0.2  # four standard errors of 384 pairs


@pytest.mark.parametrize("shift", [0.6, 0.1])
def test_levels_have_the_papers_distribution(shift):
  level, _ = read(histories.Degradation(shift=shift, clean_prefix=0), 512, 2)
  level = level[:, :1]
  z = np.log(level / (1 - level)) - np.log(shift)
  assert scipy.stats.kstest(z.ravel(), "norm").pvalue > 0.01


def test_other_keys_draw_other_histories():
  x, text = linear.batch()
  one, same, other = (
    make(histories.Degradation(), linear.params(), x, text, key).x
    for key in (1, 1, 2)
  )
  np.testing.assert_array_equal(one, same)
  assert np.abs(one - other).max() > 1e-2


def test_given_chunks_stay_as_they_are():
  """A drifted prefix is context as it is, whatever the history."""
  x, text = linear.batch(3, 5)
  given, key = jnp.array([0, 2, 4]), jax.random.key(0)
  options = histories.Degradation(clean_prefix=1)
  for maker in (
    histories.noise_augmented,
    histories.parallel_resampled,
    histories.self_resampled,
  ):
    make = jax.jit(maker(linear.denoiser(), options))
    h = make(linear.params(), x, text, key, StepContext(given=given))
    same = np.asarray((h.x == x).all((2, 3, 4)))
    kept = np.maximum(given, 1)[:, None]
    expected = (np.arange(5) < kept) | (np.arange(5) == 4)
    np.testing.assert_array_equal(same, expected)


# --- what stays clean --------------------------------------------------------


def clean_chunks(options, b=256, f=6, key=0):
  """Which of the first f chunks stay clean; one more, the last, always does."""
  x, text = linear.batch(b, f + 1)
  h = make(options, linear.params(), x, text, key)
  clean = np.asarray((h.x == x).all((2, 3, 4)))
  assert clean[:, -1].all(), "no chunk comes after the last to see it degraded"
  return clean[:, :-1], h._replace(t=h.t[:, :-1])


@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_clean_prefix_stays_as_given(prefix):
  clean, _ = clean_chunks(histories.Degradation(clean_prefix=prefix))
  np.testing.assert_array_equal(clean, [np.arange(6) < prefix] * 256)


@pytest.mark.parametrize("prefix", [6, 9])
def test_a_prefix_of_everything_is_teacher_forcing(prefix):
  clean, h = clean_chunks(histories.Degradation(clean_prefix=prefix))
  assert clean.all()
  assert not np.any(h.t)


@pytest.mark.parametrize("least", [0, 2])
def test_random_prefix_is_uniform_from_the_least_on(least):
  options = histories.Degradation(random_prefix=True, clean_prefix=least)
  clean, _ = clean_chunks(options)
  length = clean.sum(1)
  np.testing.assert_array_equal(clean, np.arange(6) < length[:, None])
  counts = np.bincount(length, minlength=7)
  assert not counts[:least].any()
  assert scipy.stats.chisquare(counts[least:]).pvalue > 0.01


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_share_is_of_whole_videos(share):
  clean, _ = clean_chunks(histories.Degradation(share=share))
  whole = clean.all(1)
  assert (clean[~whole].sum(1) == 1).all()
  degraded = (~whole).sum()
  assert abs(degraded - 256 * share) <= 4 * np.sqrt(256 * share * (1 - share))


def test_tell_tells_the_level_of_degraded_chunks_only():
  clean, h = clean_chunks(histories.Degradation(tell=True, share=0.5), b=32)
  told = np.asarray(h.t)
  assert (told[clean] == 0).all()
  assert (told[~clean] > 0).all()
  assert not np.any(clean_chunks(histories.Degradation(), b=4)[1].t)


@pytest.mark.parametrize(
  "bad",
  [
    {"shift": 0.0},
    {"shift": -1.0},
    {"steps": 0},
    {"clean_prefix": -1},
    {"share": 1.5},
    {"share": -0.1},
  ],
)
def test_impossible_options_are_refused(bad):
  ((name, value),) = bad.items()
  with pytest.raises(UserError, match=f"{name} {value}"):
    histories.Degradation(**bad)


# --- the loss ----------------------------------------------------------------


def test_loss_is_equation_4_by_hand():
  """Levels and noise are read off through v: own = 1 leaves x_t in it."""
  x, text = linear.batch(2, 4)
  seen = {}

  def spy(params, x_t, t, text, history):
    seen.update(x_t=x_t, t=t, text=text, history=history)
    return denoiser.parallel(params, x_t, t, text, history)

  denoiser = linear.denoiser(2)
  spied = denoiser._replace(parallel=spy)
  loss_fn = loss_of(
    spied, histories.ground_truth(spied), text_dropout=0.0, skip_chunks=1
  )
  key = jax.random.key(3)
  loss, (metrics, _) = loss_fn(linear.params(), Batch(x, text), key)
  x64, x_t, t = (np.asarray(z, np.float64) for z in (x, seen["x_t"], seen["t"]))
  assert t.shape == (2, 2)
  assert len(np.unique(t)) == 4  # an independent level per chunk
  t = t.repeat(2, 1)[..., None, None, None]
  noise = (x_t - (1 - t) * x64) / t
  total = 0.0
  v = [
    linear.velocity(
      x_t[:, s],
      seen["t"][:, i],
      [(x64[:, 2 * j : 2 * j + 2], np.zeros(2)) for j in range(i)],
      text,
    )
    for i, s in enumerate((slice(0, 2), slice(2, 4)))
  ]
  total = ((v[1] - (noise - x64)[:, 2:]) ** 2).mean()  # chunk 0 is skipped
  np.testing.assert_allclose(loss, total, rtol=1e-4)
  assert metrics["loss"] == loss
  assert metrics["history_error"] == 0
  np.testing.assert_array_equal(seen["text"], text)


def test_targets_stay_clean_under_a_degraded_history():
  """Another history changes v alone: with past = 0 the loss is the same."""
  x, text = linear.batch()
  params, key = linear.params(past=0), jax.random.key(0)
  denoiser = linear.denoiser()
  losses = [
    jax.jit(loss_of(denoiser, history))(params, Batch(x, text), key)
    for history in (
      histories.ground_truth(denoiser),
      histories.self_resampled(denoiser),
    )
  ]
  assert losses[0][0] == losses[1][0]
  assert losses[1][1][0]["history_error"] > 0.01


@pytest.mark.parametrize(
  "options",
  [{"shift": 1e-30}, {"share": 0.0}, {"clean_prefix": 6}],
  ids=["t_s = 0", "share = 0", "all clean"],
)
def test_no_degradation_is_teacher_forcing_exactly(options):
  x, text = linear.batch()
  denoiser = linear.denoiser()
  resampled = histories.self_resampled(
    denoiser, histories.Degradation(**options)
  )
  (forced, ours) = (
    jax.jit(jax.value_and_grad(loss_of(denoiser, history), has_aux=True))(
      linear.params(), Batch(x, text), jax.random.key(0)
    )
    for history in (histories.ground_truth(denoiser), resampled)
  )
  jax.tree.map(np.testing.assert_array_equal, forced, ours)


@pytest.mark.parametrize("detached", [False, True])
def test_no_gradient_passes_through_the_rollout(detached):
  """The gradient is that of the loss with the history as a constant."""
  x, text = linear.batch()
  denoiser, params = linear.denoiser(), linear.params()
  options = histories.Degradation(detached=detached)
  live = jax.jit(histories.self_resampled(denoiser, options))
  key = jax.random.key(0)
  caught = []

  def recording(*args):
    caught.append(live(*args))
    return caught[-1]

  # Recorded outside of the gradient, so that it is made of constants.
  loss_of(denoiser, recording)(params, Batch(x, text), key)
  frozen = lambda *args: caught[0]
  live_grad, frozen_grad = (
    jax.jit(jax.grad(loss_of(denoiser, h), has_aux=True))(
      params, Batch(x, text), key
    )[0]
    for h in (live, frozen)
  )
  for name in params:
    np.testing.assert_allclose(live_grad[name], frozen_grad[name], rtol=1e-6)
    assert abs(live_grad[name]) > 1e-4

  def made(params):
    history = live(params, x, text, key)
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(history))

  assert not any(np.any(g) for g in jax.jit(jax.grad(made))(params).values())
  # And yet the history is the model's own: other weights, another history.
  other = live(linear.params(own=1.0), x, text, key)
  assert np.abs(other.x - caught[0].x).max() > 1e-2


def test_a_detached_cache_changes_the_gradient_alone():
  """The rollout's own keys are the two-stream pass's: one value, one loss.

  But nothing is learned through them, where the two-stream pass does learn to
  write what later chunks read.
  """
  cfg = DiTConfig(
    dim=12, ffn_dim=12, num_heads=2, num_layers=1, patch=1, channels=3,
    text="none", freq_dim=4, chunk_frames=1, remat="none",
    attention=AttentionConfig(window=1, sink=1),
  )  # fmt: skip
  denoiser, (x, text) = denoiser_lib.make(cfg), linear.batch(f=4)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda s: jnp.asarray(rng.normal(size=s.shape) / 3, s.dtype),
    denoiser_lib.abstract_params(cfg, x, text),
  )
  losses, gradients = [], []
  for detached in (False, True):
    options = histories.Degradation(detached=detached, tell=True)
    loss_fn = loss_of(denoiser, histories.self_resampled(denoiser, options))
    (loss, _), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
      params, Batch(x, text), jax.random.key(0)
    )
    losses.append(loss)
    gradients.append(gradient["blocks"])
  np.testing.assert_allclose(*losses, rtol=1e-6)
  live, frozen = (g["v"]["kernel"] for g in gradients)
  assert np.abs(live - frozen).max() > 0.05 * np.abs(live).max()
  # Queries belong to the noisy stream; one layer's learn the same either way.
  live, frozen = (g["q"]["kernel"] for g in gradients)
  np.testing.assert_allclose(live, frozen, atol=1e-5 * np.abs(live).max())


def test_a_resampler_s_weights_make_the_history():
  x, text = linear.batch()
  denoiser, params = linear.denoiser(), linear.params()
  average = linear.params(own=-0.5)
  seen = []

  def spy(params, x, text, key, context):
    seen.append(params)
    return History(x, jnp.zeros(x.shape[:2]))

  for resampler in ("online", "ema"):
    loss_fn = loss_of(denoiser, spy, resampler=resampler)
    loss_fn(params, Batch(x, text), jax.random.key(0), StepContext(average))
  assert seen[0] is params
  assert seen[1] is average


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_text_is_dropped_by_the_video_at_its_rate(rate):
  text = jnp.ones((1000, 4), jnp.int32)
  rows = np.asarray(flow_loss.drop_text(text, NULL, jax.random.key(0), rate))
  assert (rows.min(1) == rows.max(1)).all()  # a whole caption or none of it
  gone = (rows[:, 0] == 0).sum()
  assert abs(gone - 1000 * rate) <= 4 * np.sqrt(1000 * rate * (1 - rate))


def test_dropped_text_reaches_the_history_too():
  """One condition a video: a model is never told two things at once."""
  seen = []

  def spy(params, x, text, key, context):
    seen.append(text)
    return History(x, jnp.zeros(x.shape[:2]))

  x, text = linear.batch()
  loss_of(linear.denoiser(), spy, text_dropout=1.0)(
    linear.params(), Batch(x, text), jax.random.key(0)
  )
  assert not np.any(seen[0])
