"""DMD on the model's own rollouts, against its arithmetic by hand."""

import jax
import jax.numpy as jnp
import linear
import numpy as np
import optax
import pytest
import scipy.stats
from test_methods import STILL, by_hand, spread, spy

from avd_jax.algorithms import dmd, histories
from avd_jax.diffusion import flow_matching, solvers
from avd_jax.models import denoiser as denoiser_lib
from avd_jax.models.attention import AttentionConfig
from avd_jax.models.dit_config import DiTConfig
from avd_jax.typing import Batch, Denoiser, History, StepContext

NULL = jnp.array([7, 0, 0, 0], jnp.int32)
TEACHER, CRITIC = {"own": -0.6, "text": 0.5}, {"own": 0.1, "past": 0.2}
LEVELS = flow_matching.uniform(1.0)
RATE = 0.1


def no_chunk(x):
  return jnp.zeros(x.shape[:2], bool)


def objective(denoiser, options=None, tx=None, skip_chunks=0, **config):
  config = dict(critic_updates=2, critic_learning_rate=RATE) | config
  return dmd.dmd(
    denoiser,
    LEVELS,
    tx or optax.sgd(1.0),
    dmd.DMDConfig(**config),
    options or histories.Degradation(),
    null_text=NULL,
    skip_chunks=skip_chunks,
  )


def context(teacher=None, critic=None, tx=None):
  teacher = teacher or linear.params(**TEACHER)
  critic = critic or linear.params(**CRITIC)
  state = (tx or optax.sgd(1.0)).init(critic)
  kept = {dmd.TEACHER: teacher, dmd.CRITIC: dmd.Critic(critic, state)}
  return StepContext(memory=kept | {"another's": jnp.float32(3.0)})


def go(denoiser, x, text, key=0, given=None, params=None, prefix=0, **config):
  config = dmd.DMDConfig(**config)
  given = no_chunk(x) if given is None else given
  call = jax.jit(
    lambda params, x, key: dmd.self_rollout(
      denoiser, config, params, x, text, given, key, prefix
    )
  )
  return call(params or linear.params(), x, jax.random.key(key))


# --- the student's own videos ------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_the_last_step_made_the_video(steps):
  """Every chunk is where its last step led, given the chunks made before."""
  x, text = linear.batch(3, 5)
  levels = set()
  for key in range(12 if steps > 1 else 1):
    made = go(linear.denoiser(), x, text, key, steps=steps, shift=2.0)
    t = np.full((3, 5), made.t)
    v = by_hand(made.shown, t, text, (made.x, 0 * t))
    expected = np.asarray(made.shown, np.float64) - spread(t) * v
    np.testing.assert_allclose(made.x, expected, atol=1e-5)
    chunks, told = made.cache
    np.testing.assert_array_equal(jnp.moveaxis(chunks, 0, 1)[:, :, 0], made.x)
    assert not np.any(told)
    levels.add(float(made.t))
  grid = solvers.time_grid(steps, 2.0)[:-1].tolist()
  assert levels == set(grid)


def test_what_a_step_is_shown_lies_at_its_level():
  """Of a model that leaves everything as it is: noise upon noise."""
  x, text = linear.batch(64, 4)
  seen = set()
  for key in range(6):
    made = go(linear.denoiser(), x, text, key, params=STILL, steps=2)
    np.testing.assert_array_equal(made.shown, made.x)
    t = float(made.t)
    scale = 1.0 if t == 1 else np.hypot(t, 1 - t)
    values = np.asarray(made.shown).ravel() / scale
    assert scipy.stats.kstest(values, "norm").pvalue > 0.001
    seen.add(t)
  assert seen == {0.5, 1.0}


@pytest.mark.parametrize("prefix", [0, 2])
def test_given_chunks_are_the_data(prefix):
  x, text = linear.batch(3, 5)
  given = jnp.arange(5) < jnp.array([2, 3, 5])[:, None]
  made = go(linear.denoiser(), x, text, given=given, prefix=prefix, steps=2)
  np.testing.assert_array_equal(made.x[given], x[given])
  others = np.abs(made.x - x).max((2, 3, 4))[~given]
  assert (others > 1e-3).all()


def test_no_gradient_comes_out_of_a_rollout():
  x, text = linear.batch(2, 3)

  def total(params, x):
    made = dmd.self_rollout(
      linear.denoiser(), dmd.DMDConfig(), params, x, text, no_chunk(x),
      jax.random.key(0),
    )  # fmt: skip
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(made))

  gradients = jax.jit(jax.grad(total, (0, 1)))(linear.params(), x)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("chunk_frames", [1, 2])
def test_a_network_makes_in_parallel_what_it_made_chunk_by_chunk(chunk_frames):
  """So the gradient is taken of the very step that made the video."""
  cfg = DiTConfig(
    dim=12, ffn_dim=12, num_heads=2, num_layers=2, patch=1, channels=3,
    text="none", freq_dim=4, chunk_frames=chunk_frames, remat="none",
    attention=AttentionConfig(window=2, sink=1),
  )  # fmt: skip
  denoiser, (x, text) = denoiser_lib.make(cfg), linear.batch(f=8)
  n = 8 // chunk_frames
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda s: jnp.asarray(rng.normal(size=s.shape) / 3, s.dtype),
    denoiser_lib.abstract_params(cfg, x, text),
  )
  given = jnp.zeros((2, n), bool).at[:, 0].set(True)
  made = go(denoiser, x, text, 1, given, params, prefix=1, steps=2)
  t = jnp.full((2, n), made.t)
  v = jax.jit(denoiser.parallel)(
    params, made.shown, t, text, History(made.x, 0 * t, made.cache)
  )
  new = slice(chunk_frames, None)
  np.testing.assert_allclose(
    (made.shown - made.t * v)[:, new], made.x[:, new], atol=2e-5
  )
  assert np.abs(made.t * v)[:, new].max() > 0.1


# --- the loss ----------------------------------------------------------------


@pytest.mark.parametrize(
  ("guidance", "random_prefix"), [(1.0, True), (3.0, False)]
)
def test_a_step_by_hand(guidance, random_prefix):
  """Two updates of the critic, then what it and the teacher say of G."""
  denoiser, calls = spy(linear.denoiser())
  x, text = linear.batch(3, 4)
  options = histories.Degradation(clean_prefix=1, random_prefix=random_prefix)
  config = dict(steps=2, guidance=guidance)
  key, params = jax.random.key(3), linear.params()
  loss_fn = objective(denoiser, options, **config)
  with jax.disable_jit():  # loops as well: the calls can be looked at
    loss, (metrics, kept) = loss_fn(params, Batch(x, text), key, context())
  *updates, (_, shown, t_made, own) = calls
  assert len(updates) == 2 + (1 if guidance == 1 else 2) + 1
  h = np.asarray(own.x, np.float64)
  given = np.abs(h - np.asarray(x)).max((2, 3, 4)) == 0
  assert given[:, 0].all()
  assert not given.all(1).all()
  assert (given.sum(1) == 1).all() or random_prefix
  weight, clean = spread(~given), np.zeros((3, 4))
  mean = lambda error: (weight * error).mean()

  def noise_of(x_t, t):
    t, x_t = np.asarray(t, np.float64), np.asarray(x_t, np.float64)
    assert ((t > 0.0199) & (t < 0.9801)).all()
    assert len(set(t.ravel())) > 8
    noise = (x_t - spread(1 - t) * h) / spread(t)
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 0.01
    return t, x_t, noise

  # The critic learns the velocity of what was made.
  critic, losses = linear.PARAMS | CRITIC, []
  for _, x_t, t, history in updates[:2]:
    np.testing.assert_array_equal(history.x, own.x)
    assert history.cache is None
    assert not np.any(history.t)
    t, x_t, noise = noise_of(x_t, t)
    off = by_hand(x_t, t, text, (h, clean), critic) - (noise - h)
    losses.append(mean(off**2))
    part = {
      name: by_hand(x_t, t, text, (h, clean), only(name)) for name in critic
    }
    critic = {
      name: value - RATE * mean(2 * off * part[name])
      for name, value in critic.items()
    }
  np.testing.assert_allclose(metrics["critic_loss"], np.mean(losses), rtol=1e-3)
  for name, value in kept[dmd.CRITIC].params.items():
    np.testing.assert_allclose(value, critic[name], atol=1e-4)
  assert kept["another's"] == 3
  jax.tree.map(
    np.testing.assert_array_equal,
    kept[dmd.TEACHER],
    context().memory[dmd.TEACHER],
  )
  # Both are asked where G_t is; the critic after its updates.
  _, x_t, t, _ = updates[2]
  for call in updates[3:]:
    np.testing.assert_array_equal(call[1], x_t)
    np.testing.assert_array_equal(call[2], t)
  t, x_t, _ = noise_of(x_t, t)
  end = lambda who, text: (
    x_t - spread(t) * by_hand(x_t, t, text, (h, clean), who)
  )
  plain, told = (end(TEACHER, said) for said in (np.tile(NULL, (3, 1)), text))
  real = plain + guidance * (told - plain)
  away = np.abs(h - real).mean((2, 3, 4), keepdims=True)
  pull = (end(critic, text) - real) / away
  np.testing.assert_allclose(loss, mean(pull**2 / 2), rtol=2e-3)
  np.testing.assert_array_equal(metrics["loss"], loss)
  # G's slope is that of its last step, whose history is the rollout's cache.
  assert own.cache is not None
  gradient = jax.jit(
    jax.grad(lambda p: loss_fn(p, Batch(x, text), key, context())[0])
  )
  shown, t_made = np.asarray(shown, np.float64), np.asarray(t_made)
  for name, slope in gradient(params).items():
    part = by_hand(shown, t_made, text, (h, clean), only(name))
    expected = mean(pull * -spread(t_made) * part)
    np.testing.assert_allclose(slope, expected, rtol=5e-3, atol=1e-5)


def only(name):
  """Parameters that leave one term of the linear model."""
  return {other: float(other == name) for other in linear.PARAMS}


GIVEN = jnp.array([2, 0, 3], jnp.int32)


@pytest.mark.parametrize("given", [None, GIVEN])
@pytest.mark.parametrize("skip", [0, 2])
def test_given_chunks_take_no_loss(given, skip):
  x, text = linear.batch(3, 4)
  first = jnp.zeros(3, jnp.int32) if given is None else given
  before = jnp.arange(4) < jnp.maximum(first, skip)[:, None]
  plain = linear.denoiser()
  options = histories.Degradation(clean_prefix=0)

  def loss(off):
    said = lambda params, *args: plain.parallel(params, *args) + params["off"]
    still = linear.params() | {"off": jnp.zeros_like(x)}
    return objective(plain._replace(parallel=said), options, skip_chunks=skip)(
      still | {"off": off},
      Batch(x, text, given),
      jax.random.key(1),
      context(still, still | {"own": jnp.float32(0.0)}),
    )[0]

  gradient = jax.jit(jax.grad(loss))(jnp.zeros_like(x))
  assert not np.any(gradient[before])
  assert (np.abs(gradient[~before]).max((1, 2, 3)) > 0).all()


def test_no_gradient_reaches_teacher_or_critic():
  x, text = linear.batch(2, 3)
  loss_fn, one = objective(linear.denoiser()), linear.params()

  def loss(student, teacher, critic):
    known = context(teacher, critic)
    return loss_fn(student, Batch(x, text), jax.random.key(0), known)[0]

  others = linear.params(**TEACHER), linear.params(**CRITIC)
  student, *frozen = jax.jit(jax.grad(loss, (0, 1, 2)))(one, *others)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen))
  assert all(abs(leaf) > 1e-5 for leaf in student.values())


def points() -> Denoiser:
  """Whatever it is shown, it makes one video: `to`."""

  def parallel(params, x, t, text, history=None):
    del text, history
    return (x - params["to"]) / t[..., None, None, None]

  def cached(params, x, t, text, cache, chunk):
    return parallel(params, x, jnp.maximum(t, 0.01)[:, None], text), cache

  return Denoiser(parallel, cached, lambda *args, **kwargs: jnp.zeros(1), 1)


def test_the_student_comes_to_what_the_teacher_makes():
  x, text = linear.batch(8, 4)
  at = lambda value: {"to": jnp.full((1, 1, 2, 3), value, jnp.float32)}
  tx = optax.adam(1.0)
  loss_fn = objective(
    points(), tx=tx, steps=2, critic_updates=5, critic_learning_rate=0.1
  )
  known, student = context(at(-1.0), at(1.0), tx), at(1.0)

  @jax.jit
  def step(student, memory, key):
    (_, (_, memory)), slope = jax.value_and_grad(loss_fn, has_aux=True)(
      student, Batch(x, text), key, StepContext(memory=memory)
    )
    rate = 0.1
    return jax.tree.map(lambda p, g: p - rate * g, student, slope), memory

  memory, way = dict(known.memory), []
  for i in range(400):
    student, memory = step(student, memory, jax.random.key(i))
    way.append(float(student["to"].mean()))
  assert way[0] > 0.9
  np.testing.assert_allclose(student["to"], -1.0, atol=0.3)
  np.testing.assert_allclose(memory[dmd.CRITIC].params["to"], -1.0, atol=0.3)


def test_a_student_that_makes_what_the_teacher_would_is_left_alone():
  """Critic and teacher agree: nothing pulls, whatever the video."""
  x, text = linear.batch(2, 4)
  same = linear.params()
  loss_fn = objective(linear.denoiser(), critic_learning_rate=1e-9)
  loss = lambda p: loss_fn(
    p, Batch(x, text), jax.random.key(0), context(same, same)
  )[0]
  value, slope = jax.jit(jax.value_and_grad(loss))(same)
  assert value < 1e-9
  assert all(abs(leaf) < 1e-6 for leaf in slope.values())
