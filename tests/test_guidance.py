"""Guidance by history and by both, and noised context, against plain loops.

Guidance by text alone is tested with the rollout, in test_diffusion.py.
"""

import functools

import jax
import jax.numpy as jnp
import linear
import numpy as np
import pytest

from avd_jax.diffusion import guidance, rollout, solvers
from avd_jax.errors import UserError
from avd_jax.typing import History

GRID = solvers.time_grid(2, 2.0)
NULL = jnp.full((4,), 3, jnp.int32)
wide = functools.partial(np.asarray, dtype=np.float64)


def noised(x, chunk, level, seed=0):
  """A chunk's stand-in in the branch that is guided away from."""
  key = jax.random.fold_in(jax.random.key(seed), chunk)
  noise = jax.random.normal(jax.random.fold_in(key, 2), x.shape)
  return (1 - level) * wide(x) + level * wide(noise)


def roll(denoiser, start, text, params=None, **options):
  """Chunks from noise, as a jitted rollout makes them."""
  size = denoiser.chunk_frames
  n = start.shape[1] // size
  made, cache = jax.jit(
    lambda start: rollout.rollout(
      denoiser,
      params or linear.params(),
      start,
      jnp.ones((len(start), n)),
      text,
      denoiser.init_cache(start[:, :size], n),
      grid=GRID,
      **options,
    )
  )(start)
  return made, cache


def loop(start, branches, remember, size=1):
  """A plain loop in float64.

  Args:
    start: [b f ...].
    branches: (weight, text, which past) whose weighted sum is the velocity.
    remember: (chunk, index) -> [(chunk, told) for each past].
    size: frames in a chunk.
  """
  pasts, made = None, []
  for i in range(start.shape[1] // size):
    x = wide(start[:, i * size : (i + 1) * size])
    for now, then in zip(wide(GRID)[:-1], wide(GRID)[1:], strict=True):
      v = sum(
        weight
        * linear.velocity(
          x, np.full(len(x), now), pasts[past] if pasts else [], text
        )
        for weight, text, past in branches
      )
      x = x + (then - now) * v
    made.append(x)
    new = [(h, np.full(len(x), told)) for h, told in remember(x, i)]
    pasts = pasts or [[] for _ in new]
    for past, pair in zip(pasts, new, strict=True):
      past.append(pair)
  return np.concatenate(made, 1), pasts


# --- by history --------------------------------------------------------------


@pytest.mark.parametrize("level", [1.0, 0.3])
@pytest.mark.parametrize("frames", [1, 2])
def test_the_parallel_form_is_two_separate_passes(frames, level):
  plain, params = linear.denoiser(frames), linear.params()
  wrapped = guidance.history_guided(plain, 4.0, level, seed=7)
  (x, text), t = linear.batch(f=3 * frames), jnp.full((2, 3), 0.4)
  h, told = linear.batch(f=3 * frames, seed=4)[0], t / 2
  v = jax.jit(wrapped.parallel)(params, x, t, text, History(h, told))
  null = [
    noised(chunk, i, level, 7)
    for i, chunk in enumerate(rollout.split_chunks(h, frames))
  ]
  null = History(
    jnp.float32(np.concatenate(null, 1)), jnp.full_like(told, level)
  )
  see = functools.partial(plain.parallel, params, x, t, text)
  full, other = see(History(h, told)), see(null)
  np.testing.assert_allclose(v, other + 4.0 * (full - other), atol=2e-5)
  assert np.abs(full - other).max() > 1e-2


@pytest.mark.parametrize(("level", "seed"), [(1.0, 0), (0.4, 5)])
@pytest.mark.parametrize("frames", [1, 2])
def test_a_cached_rollout_is_a_loop_with_two_pasts(frames, level, seed):
  """The second past: noised, told so, and never solved for."""
  wrapped = guidance.history_guided(linear.denoiser(frames), 3.0, level, seed)
  start, text = linear.batch(f=4 * frames)
  made, cache = roll(wrapped, start, text)
  expected, pasts = loop(
    start,
    [(3.0, text, 0), (-2.0, text, 1)],
    lambda x, i: [(x, 0.0), (noised(x, i, level, seed), level)],
    frames,
  )
  np.testing.assert_allclose(made, expected, atol=1e-4, rtol=1e-4)
  for i in range(4):  # both lie in one cache, twice as wide
    for past, rows in zip(pasts, (slice(0, 2), slice(2, 4)), strict=True):
      np.testing.assert_allclose(cache[0][i, rows], past[i][0], atol=1e-4)
      np.testing.assert_allclose(cache[1][i, rows], past[i][1], atol=1e-6)


def test_guidance_of_scale_1_is_none():
  plain = linear.denoiser()
  start, text = linear.batch(f=4)
  made, _ = roll(guidance.history_guided(plain, 1.0, 0.5), start, text)
  expected, _ = roll(plain, start, text)
  np.testing.assert_allclose(made, expected, atol=1e-5)
  more, _ = roll(guidance.history_guided(plain, 2.0, 0.5), start, text)
  assert np.abs(more - expected).max() > 0.1


def test_prefilled_chunks_have_a_noised_twin_too():
  wrapped = guidance.history_guided(linear.denoiser(), 3.0, 0.6)
  given, text = linear.batch(f=3)
  cache = rollout.prefill(
    wrapped, linear.params(), given, text, wrapped.init_cache(given[:, :1], 4)
  )
  for i in range(3):
    x = given[:, i : i + 1]
    twin = noised(x, i, 0.6)
    np.testing.assert_allclose(cache[0][i], [*x, *twin], atol=1e-6)
    np.testing.assert_allclose(cache[1][i], [0, 0, 0.6, 0.6])


def test_its_noise_is_not_what_a_sampler_starts_from():
  """Both fold a chunk's index into a key of a seed; 0 is the usual one."""
  x, text = linear.batch(b=8, f=1)
  wrapped = guidance.history_guided(linear.denoiser(), 2.0)
  cache = wrapped.init_cache(x, 1)
  cache = rollout.prefill(wrapped, linear.params(), x, text, cache)
  twin = np.asarray(cache[0][0, 8:]).ravel()
  keys = [jax.random.fold_in(jax.random.key(0), 0)]
  keys += [jax.random.fold_in(keys[0], 1)]
  keys += list(jax.random.split(keys[1]))
  for key in keys:
    assert np.abs(twin - jax.random.normal(key, x.shape).ravel()).max() > 0.5


# --- by history and by text --------------------------------------------------


def test_both_are_four_branches():
  """The two pasts are shared by the branches with text and without."""
  by_text = guidance.classifier_free(linear.denoiser(), 4.0, NULL)
  both = guidance.history_guided(by_text, 1.5, 0.5)
  start, text = linear.batch(f=3)
  none = np.broadcast_to(NULL, text.shape)
  made, cache = roll(both, start, text)
  expected, _ = loop(
    start,
    [
      (1.5 * 4.0, text, 0),
      (1.5 * -3.0, none, 0),
      (-0.5 * 4.0, text, 1),
      (-0.5 * -3.0, none, 1),
    ],
    lambda x, i: [(x, 0.0), (noised(x, i, 0.5), 0.5)],
  )
  np.testing.assert_allclose(made, expected, atol=1e-3, rtol=1e-4)
  assert cache[0].shape[1] == 8
  # All at once, it is the same four.
  t, h = (
    jnp.full((2, 3), 0.4),
    History(linear.batch(f=3, seed=4)[0], 0.1 + jnp.zeros((2, 3))),
  )
  v = both.parallel(linear.params(), start, t, text, h)
  twin = [noised(h.x[:, i : i + 1], i, 0.5) for i in range(3)]
  twin = History(jnp.float32(np.concatenate(twin, 1)), 0 * t + 0.5)
  see = functools.partial(linear.denoiser().parallel, linear.params(), start, t)
  full, other = (
    see(jnp.asarray(none), past)
    + 4.0 * (see(text, past) - see(jnp.asarray(none), past))
    for past in (h, twin)
  )
  np.testing.assert_allclose(v, other + 1.5 * (full - other), atol=1e-4)


# --- noised context ----------------------------------------------------------


@pytest.mark.parametrize("told", [None, 0.1, 0.3])
@pytest.mark.parametrize("frames", [1, 2])
def test_context_noise_by_a_plain_loop(frames, told):
  """What is returned is clean; what the cache holds is noised, and told."""
  start, text = linear.batch(f=4 * frames)
  keys = jax.random.split(jax.random.key(3), 4)
  level = None if told is None else jnp.full((2, 4), told)
  made, cache = roll(
    linear.denoiser(frames),
    start,
    text,
    context_noise=0.3,
    keys=keys,
    told=level,
  )

  def remember(x, i):
    noise = jax.random.normal(jax.random.split(keys[i])[1], x.shape)
    return [(0.7 * x + 0.3 * wide(noise), told or 0.0)]

  expected, (past,) = loop(start, [(1.0, text, 0)], remember, frames)
  np.testing.assert_allclose(made, expected, atol=2e-5)
  for i, (h, level) in enumerate(past):
    np.testing.assert_allclose(cache[0][i], h, atol=2e-5)
    np.testing.assert_allclose(cache[1][i], level, atol=1e-6)


def test_context_noise_and_a_solver_s_draw_apart():
  """One key a chunk serves both; neither may see the other's noise."""
  start, text = linear.batch(b=50, f=2)
  keys = jax.random.split(jax.random.key(3), 2)
  # v = 0 leaves what the solver drew: one step, then the way back up.
  still = linear.params(own=0, past=0, level=0, text=0)
  denoiser = linear.denoiser()
  made, cache = rollout.rollout(
    denoiser, still, 0 * start, jnp.ones((50, 2)), text,
    denoiser.init_cache(start[:, :1], 2), grid=jnp.array([1.0, 0.5]),
    solver="consistency", context_noise=0.5, keys=keys,
  )  # fmt: skip
  solver = 2 * np.asarray(made)
  context = 2 * (np.moveaxis(cache[0], 0, 1)[:, :, 0] - made / 2)
  both = solver.reshape(50, 2, -1), np.asarray(context).reshape(50, 2, -1)
  for one in both:
    assert abs(one.std() - 1) < 0.1
  for i, j in np.ndindex(2, 2):
    rho = np.corrcoef(both[0][:, i].ravel(), both[1][:, j].ravel())[0, 1]
    assert abs(rho) < 0.25


def test_context_noise_needs_keys():
  start, text = linear.batch(f=2)
  with pytest.raises(UserError, match=r"context_noise 0.2 .* give keys"):
    roll(linear.denoiser(), start, text, context_noise=0.2)
