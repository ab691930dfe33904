"""The error bank: what goes in comes out at its level, and nothing learns."""

import functools

import jax
import jax.numpy as jnp
import linear
import numpy as np
import optax
import pytest
import scipy.stats

from avd_jax.algorithms import error_bank, flow_loss, histories
from avd_jax.algorithms.error_bank import NAME, Bank, BankConfig
from avd_jax.diffusion import flow_matching
from avd_jax.errors import UserError
from avd_jax.training.state import create
from avd_jax.training.step import Schedule, make_step
from avd_jax.typing import Batch, StepContext

NULL = jnp.zeros(4, jnp.int32)
LEVELS = flow_matching.uniform(1.0)
CHUNK = (1, 1, 2, 3)
PLAIN = BankConfig(buckets=4, size=3, input_share=1.0, jitter=0.0)


def filled(config=PLAIN, seed=0):
  """A bank with something in every place, told apart by its values."""
  shape = (config.buckets, config.size, *CHUNK)
  errors = np.random.default_rng(seed).normal(size=shape)
  full = jnp.full(config.buckets, config.size, jnp.int32)
  return Bank(jnp.asarray(errors, jnp.float32), full)


def distances(bank, errors):
  """[k*z e]: how far errors [e g h w c] are from each place of a bank."""
  kept = np.asarray(bank.errors).reshape(-1, 1, *CHUNK)
  return np.abs(kept - np.asarray(errors)).max((2, 3, 4, 5))


# --- the ring ----------------------------------------------------------------


@pytest.mark.parametrize("many", [1, 3])
def test_a_bank_is_a_ring_for_each_bucket(many):
  """Against lists from which the oldest are dropped."""
  rng, add = np.random.default_rng(1), jax.jit(error_bank.add)
  bank = error_bank.empty(PLAIN, CHUNK)
  expected = np.zeros(bank.errors.shape)
  written = [0] * 4
  for _ in range(8):
    errors = rng.normal(size=(many, *CHUNK)).astype(np.float32)
    t = rng.uniform(0, 0.7, many).astype(np.float32)  # the last stays empty
    bank = add(bank, errors, t)
    for error, level in zip(errors, t, strict=True):
      bucket = int(level * 4)
      expected[bucket, written[bucket] % 3] = error
      written[bucket] += 1
    np.testing.assert_array_equal(bank.errors, expected.astype(np.float32))
    np.testing.assert_array_equal(bank.written, written)
  assert max(written) > 3
  assert written[3] == 0


def test_errors_of_one_call_do_not_collide():
  errors = np.arange(1.0, 4)[:, None, None, None, None] * np.ones(CHUNK)
  t = jnp.full(3, 0.3)
  bank = error_bank.add(error_bank.empty(PLAIN, CHUNK), jnp.float32(errors), t)
  np.testing.assert_array_equal(bank.errors[1], errors)
  np.testing.assert_array_equal(bank.written, [0, 3, 0, 0])
  # The next two take the place of the oldest two.
  bank = error_bank.add(bank, jnp.float32(-errors[:2]), t[:2])
  np.testing.assert_array_equal(
    bank.errors[1, :, 0, 0, 0, 0], [-1.0, -2.0, 3.0]
  )


@pytest.mark.parametrize(
  ("level", "bucket"),
  [(0.0, 0), (0.24, 0), (0.26, 1), (0.74, 2), (0.76, 3), (1.0, 3)],
)
def test_what_was_added_is_drawn_from_its_bucket(level, bucket):
  error, t = linear.batch(1, 1)[0], jnp.full(1, level, jnp.float32)
  bank = error_bank.add(error_bank.empty(PLAIN, CHUNK), error, t)
  assert np.flatnonzero(bank.written).tolist() == [bucket]
  draw = lambda t: error_bank.draw(bank, PLAIN, t, jax.random.key(0))
  np.testing.assert_array_equal(draw(t), error)
  # An empty bucket has nothing, and a filled one nothing but its errors.
  levels = (jnp.arange(40) % 4 + 0.5) / 4
  drawn = np.asarray(draw(levels))
  mine = np.arange(40) % 4 == bucket
  assert (drawn[mine] == error[0]).all()
  assert not drawn[~mine].any()


def test_draws_are_uniform_over_a_bucket():
  bank, t = filled(), jnp.full(600, 0.6)
  drawn = error_bank.draw(bank, PLAIN, t, jax.random.key(3))
  far = distances(bank, drawn)
  assert not far.min(0).any()
  counts = np.bincount(far.argmin(0), minlength=12)
  assert counts[6:9].sum() == 600
  assert scipy.stats.chisquare(counts[6:9]).pvalue > 0.01


def test_jitter_scales_each_error_a_little():
  config = BankConfig(buckets=4, size=3, jitter=0.3)
  ones = Bank(jnp.ones((4, 3, *CHUNK)), jnp.full(4, 3, jnp.int32))
  drawn = error_bank.draw(ones, config, jnp.full(400, 0.1), jax.random.key(0))
  scale = np.asarray(drawn)[:, 0, 0, 0, 0]
  np.testing.assert_array_equal(
    drawn, scale[:, None, None, None, None] * ones.errors[0, :1]
  )
  assert scipy.stats.kstest(scale, "uniform", (0.7, 0.6)).pvalue > 0.01


@pytest.mark.parametrize(
  "bad", [{"buckets": 0}, {"size": 0}, {"input_share": 1.5}, {"jitter": -0.1}]
)
def test_impossible_banks_are_refused(bad):
  ((name, value),) = bad.items()
  with pytest.raises(UserError, match=f"bank: .*{name} {value}"):
    BankConfig(**bad)


# --- the history -------------------------------------------------------------


@functools.cache
def history(options, config=PLAIN, frames=1):
  return jax.jit(error_bank.history(linear.denoiser(frames), options, config))


def test_a_history_is_the_data_plus_errors_of_its_level():
  options = histories.Degradation(tell=True, clean_prefix=2, shift=3.0)
  x, text = linear.batch(16, 5)
  bank, key = filled(), jax.random.key(2)
  context = StepContext(memory={NAME: bank})
  h = history(options)(linear.params(), x, text, key, context)
  for clean in (0, 1, 4):
    np.testing.assert_array_equal(h.x[:, clean], x[:, clean])
    assert not np.any(h.t[:, clean])
  # Levels are those of every other history.
  noised = histories.noise_augmented(linear.denoiser(), options)
  same = noised(linear.params(), x, text, jax.random.split(key)[0])
  np.testing.assert_allclose(h.t, same.t, atol=1e-6)
  kept = np.asarray(h.x - x)[:, 2:4].reshape(-1, *CHUNK)
  far = distances(bank, kept)
  assert far.min(0).max() < 1e-5
  bucket = far.argmin(0) // 3
  np.testing.assert_array_equal(bucket, np.ravel(h.t[:, 2:4] * 4).astype(int))
  assert len(set(bucket)) > 2
  # The same errors, told to be none.
  options = histories.Degradation(clean_prefix=2, shift=3.0)
  untold = history(options)(linear.params(), x, text, key, context)
  np.testing.assert_array_equal(untold.x, h.x)
  assert not np.any(untold.t)


def test_an_empty_bank_is_teacher_forcing():
  x, text = linear.batch()
  context = StepContext(memory={NAME: error_bank.empty(PLAIN, CHUNK)})
  h = history(histories.Degradation())(
    linear.params(), x, text, jax.random.key(0), context
  )
  np.testing.assert_array_equal(h.x, x)


# --- the loss ----------------------------------------------------------------


def loss_of(denoiser, config=PLAIN, options=histories.Degradation(), **more):
  return flow_loss.flow_loss(
    denoiser,
    error_bank.history(denoiser, options, config),
    LEVELS,
    null_text=NULL,
    text_dropout=0.0,
    bank=config,
    **more,
  )


def seen_by(config, frames=1, b=6, f=4, **more):
  """(x, x_t, t, history, v, loss, memory) of one call, in float64."""
  calls = []
  plain = linear.denoiser(frames)

  def parallel(*args):
    calls.append((*args[1:3], args[4], plain.parallel(*args)))
    return calls[-1][-1]

  x, text = linear.batch(b, f)
  bank = filled(config)
  if frames > 1:
    bank = Bank(jnp.repeat(bank.errors, frames, 2), bank.written)
  loss_fn = loss_of(plain._replace(parallel=parallel), config, **more)
  loss, (_, memory) = loss_fn(
    linear.params(),
    Batch(x, text),
    jax.random.key(5),
    StepContext(memory={NAME: bank, "other": 1}),
  )
  (x_t, t, h, v), wide = calls[0], functools.partial(np.asarray, dtype=float)
  assert memory["other"] == 1
  return wide(x), wide(x_t), wide(t), h, wide(v), loss, memory[NAME]


def recovered(x, x_t, t, noise):
  """The errors in the clean end of a noisy input, [b n ...]."""
  level = t[..., None, None, None]
  return (x_t - level * noise) / (1 - level) - x


def noise_of(x, config=PLAIN, frames=1):
  """What the loss noises with, read off a bank that is never used."""
  silent = BankConfig(config.buckets, config.size, 0.0, 0.0)
  x, x_t, t, *_ = seen_by(silent, frames, len(x), x.shape[1])
  level = t.repeat(frames, 1)[..., None, None, None]
  return (x_t - (1 - level) * x) / level


def test_a_corrupted_input_keeps_the_clean_target():
  x, x_t, t, _, v, loss, _ = seen_by(PLAIN)
  noise = noise_of(x)
  np.testing.assert_allclose(loss, ((v - (noise - x)) ** 2).mean(), rtol=1e-4)
  errors = recovered(x, x_t, t, noise).reshape(-1, *CHUNK)
  far = distances(filled(), errors)
  near = t.ravel() < 0.95  # elsewhere 1 - t leaves too little to read
  assert far.min(0)[near].max() < 1e-3
  bucket = far.argmin(0) // 3
  np.testing.assert_array_equal(bucket[near], (t.ravel() * 4).astype(int)[near])


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_whole_videos_are_corrupted_at_their_share(share):
  config = BankConfig(4, 3, share, 0.0)
  x, _ = linear.batch(400, 2)
  t = jax.random.uniform(jax.random.key(0), (400, 2))
  made = error_bank.corrupt(filled(config), config, x, t, jax.random.key(1))
  changed = np.asarray((made != x).any((2, 3, 4)))
  assert (changed.all(1) == changed.any(1)).all()
  off = abs(changed[:, 0].sum() - 400 * share)
  assert off <= 4 * np.sqrt(400 * share * (1 - share))


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("frames", [1, 2])
def test_what_is_kept_is_the_error_of_one_scored_chunk(frames, skip):
  """One chunk a video, where something is learned.

  How far the model is off its target: an error that was put in is not its own.
  """
  config = BankConfig(buckets=4, size=6, input_share=0.5, jitter=0.0)
  x, x_t, t, _, v, _, bank = seen_by(
    config, frames, f=4 * frames, skip_chunks=skip
  )
  level = t.repeat(frames, 1)[..., None, None, None]
  target = noise_of(x, config, frames) - x
  off = (level * (target - v)).reshape(6, 4, frames, *CHUNK[1:])
  plain = (x_t - level * v - x).reshape(off.shape)
  assert np.abs(plain - off).max() > 0.01  # where an error was put in
  old = filled(config)
  new = np.asarray(bank.written - old.written)
  assert new.sum() == 6
  count, which = [0] * 4, []
  for video in range(6):
    found = []
    for chunk in range(4):
      bucket = int(t[video, chunk] * 4)
      kept = bank.errors[bucket, count[bucket]]
      if np.abs(kept - off[video, chunk]).max() < 1e-5:
        found.append((chunk, bucket))
    ((chunk, bucket),) = found
    count[bucket] += 1
    which.append(chunk)
  np.testing.assert_array_equal(count, new)
  assert min(which) >= skip
  assert len(set(which)) > 1


def test_a_given_prefix_is_not_remembered():
  b, given = 64, jnp.int32(np.arange(64) % 4)
  error = jnp.broadcast_to(
    jnp.arange(4.0)[None, :, None, None, None], (b, 4, 1, 2, 3)
  )
  weight = flow_loss.scored(Batch(error, NULL, given), 4, 0)
  config = BankConfig(buckets=1, size=64)
  bank = error_bank.record(
    error_bank.empty(config, CHUNK),
    error,
    jnp.zeros((b, 4)),
    weight,
    jax.random.key(0),
  )
  which = np.asarray(bank.errors)[0, :, 0, 0, 0, 0]
  assert (which >= given).all()
  counts = np.bincount(which[::4].astype(int), minlength=4)
  assert (counts > 0).all()


def test_nothing_is_learned_through_a_bank():
  """Neither back into what was drawn, nor on from what is kept."""
  x, text = linear.batch()
  loss_fn = loss_of(linear.denoiser())

  def both(params, errors):
    memory = {NAME: filled()._replace(errors=errors)}
    loss, (_, memory) = loss_fn(
      params, Batch(x, text), jax.random.key(0), StepContext(memory=memory)
    )
    return loss, jnp.sum(memory[NAME].errors ** 2)

  kept = jax.jit(jax.grad(lambda p: both(p, filled().errors)[1]))
  assert not any(np.any(leaf) for leaf in kept(linear.params()).values())
  loss = jax.jit(jax.grad(lambda p: both(p, filled().errors)[0]))
  assert all(abs(leaf) > 1e-4 for leaf in loss(linear.params()).values())


# --- in a step ---------------------------------------------------------------


def test_microbatches_fill_the_bank_one_after_another():
  x, text = linear.batch(4, 4)
  loss_fn = loss_of(linear.denoiser())
  step = jax.jit(
    make_step(loss_fn, optax.sgd(1.0), ema_decay=0.9, accumulation=2)
  )
  bank = error_bank.empty(PLAIN, CHUNK)
  state = create(linear.params(), optax.sgd(1.0), {NAME: bank}, jnp.uint32(7))
  call = jax.jit(loss_fn)
  for count in range(3):
    key = jax.random.fold_in(jax.random.key(7), count)
    memory = state.memory
    for part, mine in enumerate(jax.random.split(key, 2)):
      batch = Batch(x[part::2], text[part::2])
      context = StepContext(state.ema, memory, jnp.float32(1))
      _, (_, memory) = call(state.params, batch, mine, context)
    state, _ = step(state, Batch(x, text), Schedule(0.01, 1.0))
    made, expected = state.memory[NAME], memory[NAME]
    np.testing.assert_array_equal(made.written, expected.written)
    np.testing.assert_allclose(made.errors, expected.errors, atol=1e-5)
    assert made.written.sum() == 4 * (count + 1)
