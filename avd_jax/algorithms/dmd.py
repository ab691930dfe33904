"""DMD on a model's own rollouts: Self Forcing, the rival that needs a teacher.

The other way to sample in few steps, and to train on imperfect history: the
student makes whole videos as it would at test, and what it made is pulled to
where the teacher finds it more likely and the student's own videos less so.
Two more networks of the model's size say which way that is: the teacher, here
the many-step model itself, frozen as the stage began, and a critic, which
learns the velocity of what the student makes.

Yin et al., arXiv 2405.14867 (DMD2); Huang et al., arXiv 2506.08009 (Self
Forcing). Two things are not theirs. Their teacher sees a whole video at once;
ours, causal, judges every chunk given the student's own chunks before it. And
their critic takes its five updates on videos made for each, ours on one.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from avd_jax.algorithms import histories
from avd_jax.algorithms.flow_loss import chunk_mean, scored
from avd_jax.diffusion import flow_matching, rollout, solvers
from avd_jax.errors import UserError
from avd_jax.typing import (
  Batch,
  Denoiser,
  History,
  LossFn,
  NullText,
  Params,
  StepContext,
  Text,
)

TEACHER, CRITIC = "teacher", "critic"  # of their entries in a step's memory


@dataclasses.dataclass(frozen=True)
class DMDConfig:
  """How the student samples, and who judges it.

  Attributes:
    steps: of the student, whose solver is `solvers.consistency`.
    shift: s of their grid; as sampling's.
    critic_updates: of the critic, to one of the student.
    critic_learning_rate: constant; the optimizer is the run's own.
    guidance: of the teacher, by text; 1 is none.
    least_level, most_level: between which the two are asked.
  """

  steps: int = 4
  shift: float = 1.0
  critic_updates: int = 5
  critic_learning_rate: float = 1e-3
  guidance: float = 1.0
  least_level: float = 0.02
  most_level: float = 0.98

  def __post_init__(self):
    if self.steps < 1 or self.critic_updates < 1:
      raise UserError(
        f"dmd: steps {self.steps} and critic_updates {self.critic_updates}"
        " must be at least 1"
      )
    for name in ("shift", "critic_learning_rate"):
      if getattr(self, name) <= 0:
        raise UserError(f"dmd: {name} {getattr(self, name)} must be positive")
    if not 0 < self.least_level < self.most_level <= 1:
      raise UserError(
        f"dmd: least_level {self.least_level} and most_level"
        f" {self.most_level} must rise within (0, 1]"
      )


class Critic(NamedTuple):
  """Attributes:
  params: of a network like the student.
  optimizer: its own optimizer's state.
  """

  params: Params
  optimizer: Any


def memory(
  params: Params, tx: optax.GradientTransformation
) -> dict[str, Params | Critic]:
  """Teacher and critic, alike as a stage begins.

  Args:
    params: their weights.
    tx: the critic's optimizer.
  """
  copy = lambda: jax.tree.map(jnp.copy, params)
  return {TEACHER: copy(), CRITIC: Critic(copy(), tx.init(params))}


class Made(NamedTuple):
  """A video as the student makes it.

  Attributes:
    x: what came out; chunks that were given are the data.
    shown: what the student saw when it took its last step.
    t: the level of that.
    cache: keys and values of `x`.
  """

  x: Float[Array, "b f h w c"]
  shown: Float[Array, "b f h w c"]
  t: Float[Array, ""]
  cache: Any


def _recording(denoiser: Denoiser) -> Denoiser:
  """A denoiser whose cache also keeps what its solver was shown last.

  A level of 0 shows nothing: there a video is finished.
  """

  def cached(params, x, t, text, cache, chunk):
    kv, shown = cache
    v, kv = denoiser.cached(params, x, t, text, kv, chunk)
    at = chunk * denoiser.chunk_frames
    old = jax.lax.dynamic_slice_in_dim(shown, at, denoiser.chunk_frames, 1)
    new = jnp.where(t[:, None, None, None, None] > 0, x, old)
    shown = jax.lax.dynamic_update_slice_in_dim(shown, new, at, 1)
    return v, (kv, shown)

  def remember(params, x, t, text, cache, chunk):
    kv, shown = cache
    kv = rollout.remember(denoiser, params, x, t, text, kv, chunk)
    return kv, shown

  return denoiser._replace(cached=cached, remember=remember)


def self_rollout(
  denoiser: Denoiser,
  config: DMDConfig,
  params: Params,
  x: Float[Array, "b f h w c"],
  text: Text,
  given: Array,
  key: Array,
  prefix: int = 0,
) -> Made:
  """The student makes whole videos, and stops at a step that is drawn.

  Chunk after chunk from noise, each down to the same one of the grid's levels
  and from there straight to clean: what a step other than the last one makes
  must be good as well, since the next starts from it. Nothing in here carries a
  gradient.

  Args:
    denoiser: the model.
    config: its solver's steps.
    params: the student's.
    x: the data.
    text: the condition.
    given: bool [b n], chunks that are the data's.
    key: of the noise and the step.
    prefix: first chunks that all videos are given; they cost less.
  """
  params, x, text = jax.lax.stop_gradient((params, x, text))
  frames, n = denoiser.chunk_frames, given.shape[1]
  key_noise, key_last, key_chunks = jax.random.split(key, 3)
  start = jax.random.normal(key_noise, x.shape, x.dtype)
  last = jax.random.randint(key_last, (), 0, config.steps)
  grid = solvers.time_grid(config.steps, config.shift)
  ended = jnp.where(jnp.arange(config.steps + 1) <= last, grid, 0.0)
  cut = prefix * frames
  kv = denoiser.init_cache(x[:, :frames], n, keep_all=True)
  if prefix:
    kv = rollout.prefill(denoiser, params, x[:, :cut], text, kv)
  made, (kv, shown) = rollout.rollout(
    _recording(denoiser),
    params,
    start[:, cut:],
    jnp.ones((x.shape[0], n - prefix)),
    text,
    (kv, jnp.zeros_like(x)),
    grid=ended,
    solver="consistency",
    first_chunk=prefix,
    keep=(given[:, prefix:], x[:, cut:]),
    keys=jax.random.split(key_chunks, n - prefix),
  )
  return Made(jnp.concatenate([x[:, :cut], made], 1), shown, grid[last], kv)


def dmd(
  denoiser: Denoiser,
  sample_levels: flow_matching.SampleLevels,
  tx: optax.GradientTransformation,
  config: DMDConfig = DMDConfig(),
  options: histories.Degradation = histories.Degradation(),
  *,
  null_text: NullText,
  skip_chunks: int = 0,
) -> LossFn:
  """1/2 || G - sg[G - (f_critic(G_t) - f_teacher(G_t)) / w] ||^2 a chunk.

  G is what the student made in its last step, given the chunks that it made
  before (their keys are the rollout's: no gradient goes through them, nor
  through the steps before), f(x_t) = x_t - t v(x_t, h, t, c), G_t is G noised
  to level t, and w = mean |G - f_teacher(G_t)|, of a chunk. That is the
  gradient of DMD, whose teacher and critic say where the two densities rise.

  Args:
    denoiser: the model.
    sample_levels: of the levels at which the student is judged.
    tx: the critic's optimizer, at learning rate 1.
    config: the student's steps, the critic's updates.
    options: which first chunks are given (clean_prefix, random_prefix).
    null_text: [m] or [m d], what guidance leads away from.
    skip_chunks: first chunks without loss.

  The context must hold, in its memory, what `memory` gives.
  """
  size = denoiser.chunk_frames
  options = dataclasses.replace(
    options, clean_prefix=max(options.clean_prefix, skip_chunks)
  )
  spread = lambda t: flow_matching.per_frame(t, size)[..., None, None, None]

  def noised(x, key):
    """(x_t, its levels [b n], the noise)."""
    key_level, key_noise = jax.random.split(key)
    t = sample_levels(key_level, (x.shape[0], x.shape[1] // size))
    t = jnp.clip(t, config.least_level, config.most_level)
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    x_t = flow_matching.interpolate(x, noise, flow_matching.per_frame(t, size))
    return x_t, t, noise

  def guided(params, x, t, text, h):
    v = denoiser.parallel(params, x, t, text, h)
    if config.guidance == 1.0:
      return v
    null = jnp.broadcast_to(null_text, text.shape).astype(text.dtype)
    plain = denoiser.parallel(params, x, t, null, h)
    return plain + config.guidance * (v - plain)

  def learn(critic, x, text, h, weight, key):
    """(the critic after its updates, their mean loss)."""

    def loss(params, key):
      x_t, t, noise = noised(x, key)
      v = denoiser.parallel(params, x_t, t, text, h)
      error = (v - flow_matching.velocity(x, noise)) ** 2
      return chunk_mean(error, weight, skip_chunks)

    def update(critic, key):
      value, gradient = jax.value_and_grad(loss)(critic.params, key)
      change, state = tx.update(gradient, critic.optimizer, critic.params)
      rate = config.critic_learning_rate
      change = jax.tree.map(lambda u: rate * u, change)
      return Critic(optax.apply_updates(critic.params, change), state), value

    keys = jax.random.split(key, config.critic_updates)
    critic, values = jax.lax.scan(update, critic, keys)
    return critic, values.mean()

  def loss_fn(params, batch: Batch, key, context=StepContext()):
    key_given, key_made, key_critic, key_level = jax.random.split(key, 4)
    x, text, kept = batch.x, batch.text, dict(context.memory)
    b, n = x.shape[0], x.shape[1] // size
    context = context._replace(given=batch.given)
    given = histories.clean_chunks(options, key_given, b, n, context)
    # What is drawn for each video has no prefix that all of them share.
    prefix = 0 if options.random_prefix else min(options.clean_prefix, n - 1)
    made = self_rollout(
      denoiser, config, params, x, text, given, key_made, prefix
    )
    clean = jnp.zeros((b, n))
    weight = scored(batch, n, skip_chunks) * ~given
    h = History(made.x, clean)
    critic, critic_loss = learn(
      kept[CRITIC], made.x, text, h, weight, key_critic
    )
    x_t, t, _ = noised(made.x, key_level)
    v_teacher = guided(kept[TEACHER], x_t, t, text, h)
    v_critic = denoiser.parallel(critic.params, x_t, t, text, h)
    away = made.x - x_t + spread(t) * v_teacher
    w = jnp.abs(away).reshape(b, n, -1).mean(-1)
    pull = spread(t) * (v_teacher - v_critic) / spread(jnp.maximum(w, 1e-6))
    own = History(made.x, clean, made.cache)
    levels = jnp.broadcast_to(made.t, (b, n))
    v = denoiser.parallel(params, made.shown, levels, text, own)
    end = made.shown - spread(levels) * v
    error = (end - jax.lax.stop_gradient(end - pull)) ** 2 / 2
    loss = chunk_mean(error, weight, skip_chunks)
    kept[CRITIC] = critic
    metrics = {"loss": loss, "critic_loss": critic_loss}
    return loss, (metrics, kept)

  return loss_fn
