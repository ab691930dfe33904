"""Flow matching, solvers, guidance, and the rollout against a plain loop."""

import functools
import itertools

import jax
import jax.numpy as jnp
import linear
import numpy as np
import pytest
import scipy.stats

from avd_jax.diffusion import flow_matching, guidance, rollout, solvers
from avd_jax.errors import UserError
from avd_jax.typing import History

# --- the path ----------------------------------------------------------------


def test_interpolation_runs_from_clean_to_noise():
  x, noise = linear.batch(seed=1)[0], linear.batch(seed=2)[0]
  at = lambda t: flow_matching.interpolate(x, noise, jnp.float32(t))
  np.testing.assert_array_equal(at(0), x)
  np.testing.assert_array_equal(at(1), noise)
  np.testing.assert_allclose(at(0.25), 0.75 * x + 0.25 * noise, atol=1e-6)


def test_levels_broadcast_from_the_left():
  x, noise = linear.batch(seed=1)[0], linear.batch(seed=2)[0]
  t = jax.random.uniform(jax.random.key(0), x.shape[:2])
  mixed = flow_matching.interpolate(x, noise, t)
  for b, f in np.ndindex(t.shape):
    expected = (1 - t[b, f]) * x[b, f] + t[b, f] * noise[b, f]
    np.testing.assert_allclose(mixed[b, f], expected, atol=1e-6)


def test_velocity_is_the_derivative_of_the_path():
  x, noise = linear.batch(seed=1)[0], linear.batch(seed=2)[0]
  path = lambda t: flow_matching.interpolate(x, noise, t)
  _, slope = jax.jvp(path, (jnp.float32(0.3),), (jnp.float32(1),))
  np.testing.assert_allclose(slope, flow_matching.velocity(x, noise), atol=1e-6)


@pytest.mark.parametrize("s", [0.1, 0.6, 1.0, 3.0, 5.0])
def test_shift_adds_log_s_to_the_logit(s):
  t = jnp.linspace(0.01, 0.99, 50)
  logit = lambda p: np.log(np.asarray(p, np.float64) / (1 - np.asarray(p)))
  shifted = flow_matching.shift(t, s)
  np.testing.assert_allclose(logit(shifted), logit(t) + np.log(s), atol=1e-4)
  ends = flow_matching.shift(jnp.array([0.0, 1.0]), s)
  np.testing.assert_allclose(ends, [0.0, 1.0], atol=1e-6)


@pytest.mark.parametrize("s", [0.6, 3.0])
def test_logit_normal_levels_have_their_distribution(s):
  t = flow_matching.logit_normal(s)(jax.random.key(0), (100, 200))
  assert t.shape == (100, 200)
  z = np.asarray(t, np.float64).ravel()
  z = np.log(z / (1 - z)) - np.log(s)
  assert scipy.stats.kstest(z, "norm").pvalue > 0.01


@pytest.mark.parametrize("s", [1.0, 5.0])
def test_uniform_levels_have_their_distribution(s):
  t = flow_matching.uniform(s)(jax.random.key(0), (100, 200))
  z = np.asarray(flow_matching.shift(t, 1 / s), np.float64).ravel()
  assert scipy.stats.kstest(z, "uniform").pvalue > 0.01


def test_per_frame_repeats_a_chunk_s_level():
  t = jnp.array([[0.1, 0.9]])
  np.testing.assert_array_equal(
    flow_matching.per_frame(t, 3), np.float32([[0.1] * 3 + [0.9] * 3])
  )


# --- solvers -----------------------------------------------------------------


def test_time_grid_of_the_papers():
  grid = solvers.time_grid(32, 5.0)
  u = np.linspace(1, 0, 33)
  np.testing.assert_allclose(grid, 5 * u / (1 + 4 * u), atol=1e-6)
  assert (grid[0], grid[-1]) == (1.0, 0.0)
  with pytest.raises(UserError, match="sampling steps 0"):
    solvers.time_grid(0)


# dx/dt = A x: a rotation that shrinks. From level 1 to 0, x(0) = exp(-A) x(1).
TURN = np.array([[0.3, -2.0], [2.0, 0.3]])


def solve_rotation(solver, steps):
  velocity = lambda x, t, cache: (x @ jnp.asarray(TURN.T, jnp.float32), cache)
  start = jnp.array([[1.0, 0.0], [0.5, -1.0]])
  grid = solvers.time_grid(steps)
  solve = jax.jit(functools.partial(solvers.solve, velocity, solver=solver))
  x, _ = solve(start, jnp.ones(2), grid, ())
  exact = np.asarray(start, np.float64) @ scipy.linalg.expm(-TURN).T
  return np.abs(np.asarray(x, np.float64) - exact).max()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_at_their_order(solver, order):
  errors = [solve_rotation(solver, steps) for steps in (16, 32, 64)]
  rates = np.log2(np.array(errors[:-1]) / errors[1:])
  np.testing.assert_allclose(rates, order, atol=0.15)


def test_unipc_beats_euler_at_equal_steps():
  """Its last step is Euler's, which holds it at second order."""
  steps = (16, 32, 64, 128)
  errors = np.array([solve_rotation("unipc", n) for n in steps])
  assert (errors < [solve_rotation("euler", n) / 10 for n in steps]).all()
  rates = np.log2(errors[:-1] / errors[1:])
  np.testing.assert_allclose(rates, 2, atol=0.4)
  # One step is Euler's step, and a video that starts clean stays as it is.
  assert solve_rotation("unipc", 1) == solve_rotation("euler", 1)
  call = lambda x, t, cache: (jnp.ones_like(x), cache)
  x, clean = jnp.ones((2, 3)), jnp.array([0.0, 0.5])
  made, _ = solvers.solve(call, x, clean, solvers.time_grid(4), (), "unipc")
  np.testing.assert_allclose(made[:, 0], [1.0, 0.5], atol=1e-6)


def test_solvers_start_at_each_video_s_own_level():
  """dx/dt = -1: what is added is the time that passed."""
  velocity = lambda x, t, cache: (-jnp.ones_like(x), cache)
  start = jnp.array([0.25, 0.5, 1.0])
  for solver in ("euler", "heun", "unipc"):
    x, _ = solvers.solve(
      velocity, jnp.zeros((3, 2)), start, solvers.time_grid(3, 5.0), (), solver
    )
    np.testing.assert_allclose(x, np.repeat(start[:, None], 2, 1), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_cache_is_threaded_through_every_evaluation(steps):
  def velocity(x, t, cache):
    return x, cache.at[0].add(1.0).at[1].set(t[0])

  grid = solvers.time_grid(steps)
  for solver, calls, last in (
    ("euler", steps, grid[-2]),
    ("heun", 2 * steps, 0.0),
    ("unipc", steps, grid[-2]),
  ):
    _, cache = solvers.solve(
      velocity, jnp.ones((1, 2)), jnp.ones(1), grid, jnp.zeros(2), solver
    )
    np.testing.assert_allclose(cache, [calls, last], atol=1e-6)


def test_consistency_goes_to_clean_and_back_up_with_fresh_noise():
  """Where every level points at zero, a step leaves t' times fresh noise."""
  velocity = lambda x, t, cache: (x / t[:, None], cache.at[0].add(1.0))
  x, start = jnp.ones((4000, 2)), jnp.full(4000, 0.8)
  grid = jnp.array([1.0, 0.5, 0.0])
  run = functools.partial(
    solvers.solve, velocity, x, start, cache=jnp.zeros(1), solver="consistency"
  )
  key = jax.random.key(0)
  made, calls = run(grid=grid, key=key)
  np.testing.assert_allclose(made, 0.0, atol=1e-6)
  assert calls == 2
  half, _ = run(grid=grid[:2], key=key)  # on its way: at level 0.4
  assert scipy.stats.kstest(half.ravel() / 0.4, "norm").pvalue > 0.01
  other, _ = run(grid=grid[:2], key=jax.random.key(1))
  assert np.abs(np.corrcoef(half.ravel(), other.ravel())[0, 1]) < 0.05
  with pytest.raises(UserError, match="give a key"):
    run(grid=grid)


def test_unknown_solvers_are_refused():
  with pytest.raises(UserError, match="'rk4' is not one of consistency, eu"):
    solvers.solve(
      lambda *a: a, jnp.ones((1, 1)), jnp.ones(1), jnp.ones(2), (), "rk4"
    )


# --- the rollout -------------------------------------------------------------


def loop(start, t_start, text, grid, solver, keep=None, told=None):
  """The rollout of the linear model as a plain loop in float64."""
  grid, start = np.asarray(grid, np.float64), np.asarray(start, np.float64)
  spread = lambda z: z.reshape(-1, *(1,) * (start.ndim - 2))
  past = []
  slope = lambda x, t: linear.velocity(x, t, past, text)
  for i, x in enumerate(start):
    level = t_start[:, i]
    for now, then in itertools.pairwise(grid):
      dt = spread((then - now) * level)
      v = slope(x, now * level)
      if solver == "heun":
        v = (v + slope(x + dt * v, then * level)) / 2
      x = x + dt * v
    if keep is not None:
      which, given = keep
      x = np.where(spread(which[:, i]), given[i], x)
    past.append((x, np.zeros(len(x)) if told is None else told[:, i]))
  return np.stack([x for x, _ in past])


@pytest.fixture(params=[1, 2], ids=["frame", "chunk"])
def setting(request):
  """(denoiser, start, t_start, text, kept, told) with chunks of 1 or 2."""
  frames = request.param
  start, text = linear.batch(f=4 * frames)
  rng = np.random.default_rng(5)
  level, told = (
    jnp.asarray(rng.uniform(0.2, 1, (2, 4)), jnp.float32) for _ in range(2)
  )
  kept = jnp.array([[True, False, True, False], [False, True, False, False]])
  given = linear.batch(f=4 * frames, seed=7)[0]
  return linear.denoiser(frames), start, level, text, (kept, given), told


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_rollout_is_the_plain_loop(setting, solver):
  denoiser, start, level, text, keep, told = setting
  split = lambda x: np.asarray(
    rollout.split_chunks(x, denoiser.chunk_frames), np.float64
  )
  grid = solvers.time_grid(3, 2.0)

  @jax.jit
  def roll(keep, told):
    cache = denoiser.init_cache(start[:, : denoiser.chunk_frames], 4)
    return rollout.rollout(
      denoiser,
      linear.params(),
      start,
      level,
      text,
      cache,
      grid=grid,
      solver=solver,
      keep=keep,
      told=told,
    )

  for k, u in ((None, None), (keep, told)):
    made, cache = roll(k, u)
    expected = loop(
      split(start),
      np.asarray(level),
      text,
      grid,
      solver,
      None if k is None else (np.asarray(k[0]), split(k[1])),
      None if u is None else np.asarray(u),
    )
    np.testing.assert_allclose(split(made), expected, atol=2e-5)
    # The cache holds the finished chunks, at the level they are told.
    np.testing.assert_allclose(cache[0], expected, atol=2e-5)
    np.testing.assert_array_equal(
      cache[1].T, np.zeros((2, 4)) if u is None else u
    )


def test_segments_are_the_rollout_in_one_go(setting):
  denoiser, start, level, text, _, _ = setting
  cut = 3 * denoiser.chunk_frames
  grid = solvers.time_grid(2)
  roll = jax.jit(
    functools.partial(rollout.rollout, denoiser, grid=grid, solver="heun")
  )
  fresh = denoiser.init_cache(start[:, : denoiser.chunk_frames], 4)
  whole, whole_cache = roll(linear.params(), start, level, text, fresh)
  head, cache = roll(linear.params(), start[:, :cut], level[:, :3], text, fresh)
  tail, cache = roll(
    linear.params(),
    start[:, cut:],
    level[:, 3:],
    text,
    cache,
    first_chunk=jnp.int32(3),
  )
  np.testing.assert_allclose(jnp.concatenate([head, tail], 1), whole, atol=1e-6)
  for ours, theirs in zip(cache, whole_cache, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_prefill_is_keeping_the_given_chunks(setting):
  denoiser, start, level, text, _, _ = setting
  frames = denoiser.chunk_frames
  given = linear.batch(f=4 * frames, seed=9)[0]
  grid = solvers.time_grid(2)
  fresh = denoiser.init_cache(start[:, :frames], 4)
  kept, kept_cache = rollout.rollout(
    denoiser,
    linear.params(),
    start,
    level,
    text,
    fresh,
    grid=grid,
    keep=(jnp.broadcast_to(jnp.arange(4) < 2, (2, 4)), given),
  )
  cut = 2 * frames
  cache = rollout.prefill(
    denoiser, linear.params(), given[:, :frames], text, fresh
  )
  cache = rollout.prefill(
    denoiser, linear.params(), given[:, frames:cut], text, cache, first_chunk=1
  )
  made, cache = rollout.rollout(
    denoiser,
    linear.params(),
    start[:, cut:],
    level[:, 2:],
    text,
    cache,
    grid=grid,
    first_chunk=2,
  )
  np.testing.assert_allclose(made, kept[:, cut:], atol=1e-6)
  np.testing.assert_array_equal(kept[:, :cut], given[:, :cut])
  for ours, theirs in zip(cache, kept_cache, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_chunks_split_and_join():
  x = linear.batch(f=6)[0]
  chunks = rollout.split_chunks(x, 2)
  assert chunks.shape == (3, 2, 2, 1, 2, 3)
  np.testing.assert_array_equal(chunks[1, 0], x[0, 2:4])
  np.testing.assert_array_equal(rollout.join_chunks(chunks), x)


# --- guidance ----------------------------------------------------------------


def guided(scale):
  null = jnp.full((4,), 3, jnp.int32)
  return guidance.classifier_free(linear.denoiser(), scale, null), null


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_guidance_is_two_separate_passes(scale):
  wrapped, null = guided(scale)
  plain, params = linear.denoiser(), linear.params()
  (x, text), t = linear.batch(f=3), jnp.full((2, 3), 0.4)
  nulls = jnp.broadcast_to(null, text.shape)
  for history in (None, History(linear.batch(f=3, seed=4)[0], t / 2)):
    v = jax.jit(wrapped.parallel)(params, x, t, text, history)
    with_text, without = (
      jax.jit(plain.parallel)(params, x, t, c, history) for c in (text, nulls)
    )
    expected = without + scale * (with_text - without)
    np.testing.assert_allclose(v, expected, atol=1e-6)
    assert np.abs(with_text - without).max() > 1e-3


def test_guided_rollout_is_the_loop_with_two_histories():
  """Both branches condition on the same, guided, past."""
  wrapped, null = guided(4.0)
  plain, params = linear.denoiser(), linear.params()
  start, text = linear.batch(f=3)
  nulls = jnp.broadcast_to(null, text.shape)
  fresh = lambda d: d.init_cache(start[:, :1], 3)
  made, _ = rollout.rollout(
    wrapped,
    params,
    start,
    jnp.ones((2, 3)),
    text,
    fresh(wrapped),
    grid=solvers.time_grid(2),
  )
  cache, branches = fresh(plain), []
  for i in range(3):
    x = start[:, i : i + 1]
    for t in (1.0, 0.5):
      with_text, without = (
        plain.cached(params, x, jnp.full(2, t), c, cache, jnp.int32(i))[0]
        for c in (text, nulls)
      )
      x = x - 0.5 * (without + 4.0 * (with_text - without))
    _, cache = plain.cached(params, x, jnp.zeros(2), text, cache, jnp.int32(i))
    branches.append(x)
  np.testing.assert_allclose(
    made, jnp.concatenate(branches, 1), atol=1e-4, rtol=1e-5
  )
