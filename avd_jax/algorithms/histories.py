"""Histories: what a chunk is conditioned on while it is trained.

Most methods that mend drift are the same loss under another history; here they
are, one function each, `(params, x, text, key, context) -> History`. All but
the first degrade the truth, each in its own way, on the same chunks and at
levels of the same law, so that they can be compared. `error_bank.py` has one
more, which needs a memory.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avd_jax.diffusion import flow_matching, rollout, solvers
from avd_jax.errors import UserError
from avd_jax.typing import Denoiser, History, HistoryFn, StepContext


def ground_truth(denoiser: Denoiser) -> HistoryFn:
  """Teacher forcing: the history is the data itself. [RF Eq. 4]"""

  def make(params, x, text, key, context=StepContext()):
    del params, text, key, context
    n = x.shape[1] // denoiser.chunk_frames
    return History(x, jnp.zeros((x.shape[0], n)))

  return make


@dataclasses.dataclass(frozen=True)
class Degradation:
  """Which chunks of a history are made worse, and how much.

  Attributes:
    shift: s of Eq. 7, of the level t_s to which a video's history is noised,
      counted from clean; below 1 moves it to low noise.
    clean_prefix: first chunks that stay as given, as a prompt's are at test.
    random_prefix: draw each video's prefix from [clean_prefix, n) instead,
      n being the chunks of a video.
    share: share of videos whose history is degraded at all.
    ramp_steps: a curriculum: the share rises from 0 over so many first steps
      of the stage.
    tell: tell the model the level t_s (0 for clean chunks) instead of 0.
    steps: Euler steps from t_s to clean, where chunks are resampled; the paper
      takes one.
    detached: hand on the rollout's own KV cache as the history (self-resampled
      only), so that the gradient pass runs the noisy stream alone: half the
      cost, and no gradient reaches the weights through the history.
    full_every: with detached, every so many steps run both streams; 0 never.
  """

  shift: float = 0.6
  clean_prefix: int = 1
  random_prefix: bool = False
  share: float = 1.0
  ramp_steps: int = 0
  tell: bool = False
  steps: int = 1
  detached: bool = False
  full_every: int = 0

  def __post_init__(self):
    if self.shift <= 0 or self.steps < 1 or self.clean_prefix < 0:
      raise UserError(
        f"degradation: shift {self.shift} must be positive, steps {self.steps}"
        f" at least 1, clean_prefix {self.clean_prefix} at least 0"
      )
    if not 0 <= self.share <= 1:
      raise UserError(f"degradation: share {self.share} is not in [0, 1]")
    if self.ramp_steps < 0 or self.full_every < 0:
      raise UserError(
        f"degradation: ramp_steps {self.ramp_steps} and full_every"
        f" {self.full_every} must be at least 0"
      )
    if self.full_every and not self.detached:
      raise UserError("degradation: full_every needs detached=True")


def clean_chunks(
  options: Degradation,
  key: Array,
  batch: int,
  chunks: int,
  context: StepContext,
) -> Bool[Array, "b n"]:
  """Which chunks stay clean: a prefix of each video, or all of it."""
  key_prefix, key_share = jax.random.split(key)
  prefix = jnp.full((batch,), options.clean_prefix)
  if options.random_prefix:
    prefix = jax.random.randint(
      key_prefix, (batch,), min(options.clean_prefix, chunks - 1), chunks
    )
  if context.given is not None:
    prefix = jnp.maximum(prefix, context.given)
  share = options.share * context.ramp
  whole = jax.random.uniform(key_share, (batch,)) >= share
  prefix = jnp.where(whole, chunks, prefix)
  return jnp.arange(chunks) < prefix[:, None]


def draw(
  options: Degradation,
  key: Array,
  x: Float[Array, "b f h w c"],
  chunks: int,
  context: StepContext,
) -> tuple[Float[Array, "b n"], Float[Array, "b f h w c"]]:
  """Levels t_s, one per video and 0 where a chunk stays clean, and noise.

  The last chunk stays clean: no chunk comes after it to be conditioned.
  """
  key_level, key_noise, key_clean = jax.random.split(key, 3)
  b = x.shape[0]
  clean = clean_chunks(options, key_clean, b, chunks, context)
  clean = clean.at[:, -1].set(True)
  sample_level = flow_matching.logit_normal(options.shift)
  level = jnp.broadcast_to(sample_level(key_level, (b, 1)), (b, chunks))
  level = jnp.where(clean, 0.0, level)
  return level, jax.random.normal(key_noise, x.shape, x.dtype)


def told(options: Degradation, level: Array) -> Array:
  """What the model is told about chunks at `level`."""
  return level if options.tell else jnp.zeros_like(level)


def noise_augmented(
  denoiser: Denoiser, options: Degradation = Degradation()
) -> HistoryFn:
  """The history is the data at level t_s: plain Gaussian noise, no model."""

  def make(params, x, text, key, context=StepContext()):
    del params, text
    level, noise = draw(
      options, key, x, x.shape[1] // denoiser.chunk_frames, context
    )
    frames = flow_matching.per_frame(level, denoiser.chunk_frames)
    noised = flow_matching.interpolate(x, noise, frames)
    return History(noised, told(options, level))

  return make


def parallel_resampled(
  denoiser: Denoiser, options: Degradation = Degradation()
) -> HistoryFn:
  """Every chunk re-made at once, each from its own *clean* history.

  Errors of a single chunk, none that pile up. Nothing in here carries a
  gradient.
  """

  def make(params, x, text, key, context=StepContext()):
    params, x, text = jax.lax.stop_gradient((params, x, text))
    n = x.shape[1] // denoiser.chunk_frames
    level, noise = draw(options, key, x, n, context)
    truth = History(x, jnp.zeros_like(level))
    per_frame = lambda t: flow_matching.per_frame(t, denoiser.chunk_frames)
    h = flow_matching.interpolate(x, noise, per_frame(level))
    for step in range(options.steps):
      t = level * (1 - step / options.steps)
      v = denoiser.parallel(params, h, t, text, truth)
      dt = per_frame(level / options.steps)
      h = h - dt[..., None, None, None] * v
    return History(h, told(options, level))

  return make


def self_resampled(
  denoiser: Denoiser, options: Degradation = Degradation()
) -> HistoryFn:
  """Resampling Forcing: the model re-makes its own history.

  Chunk after chunk, each is noised to a level t_s that the video's chunks
  share, and solved back to clean on top of the already degraded chunks before
  it. Nothing in here carries a gradient. [RF Eq. 5] [RF Alg. 1]
  """

  def make(params, x, text, key, context=StepContext()):
    # Here and not at the end: a rollout of many layers would be linearized,
    # for minutes, to have its tangents thrown away.
    params, x, text = jax.lax.stop_gradient((params, x, text))
    n = x.shape[1] // denoiser.chunk_frames
    level, noise = draw(options, key, x, n, context)
    frames = flow_matching.per_frame(level, denoiser.chunk_frames)
    tell = told(options, level)
    remade, cache = _remake(
      denoiser,
      options,
      params,
      x,
      text,
      level,
      tell,
      flow_matching.interpolate(x, noise, frames),
    )
    return History(remade, tell, cache if options.detached else None)

  return make


def _remake(denoiser, options, params, x, text, level, told, noised):
  """Prefills the prefix that every video shares, then rolls out the rest."""
  frames, n = denoiser.chunk_frames, level.shape[1]
  given = 0 if options.random_prefix else min(options.clean_prefix, n - 1)
  cut, end = given * frames, (n - 1) * frames
  cache = denoiser.init_cache(x[:, :frames], n, keep_all=options.detached)
  if given:
    cache = rollout.prefill(denoiser, params, x[:, :cut], text, cache)
  made: Float[Array, "b f h w c"] = x[:, :0]
  if cut < end:
    made, cache = rollout.rollout(
      denoiser,
      params,
      noised[:, cut:end],
      level[:, given:-1],
      text,
      cache,
      grid=solvers.time_grid(options.steps),
      first_chunk=given,
      keep=(level[:, given:-1] == 0, x[:, cut:end]),
      told=told[:, given:-1],
    )
  return jnp.concatenate([x[:, :cut], made, x[:, end:]], 1), cache


def with_dropout(history: HistoryFn, rate: float) -> HistoryFn:
  """Replaces a video's whole history by noise told as such, at `rate`.

  Without it, history guidance would ask the model for a condition it has
  never seen.
  """
  if not rate:
    return history

  def make(params, x, text, key, context=StepContext()):
    key, key_drop, key_noise = jax.random.split(key, 3)
    h = history(params, x, text, key, context)
    drop = jax.random.uniform(key_drop, x.shape[:1]) < rate
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    frames = drop.reshape(-1, *(1,) * (x.ndim - 1))
    return h._replace(
      x=jnp.where(frames, noise, h.x), t=jnp.where(drop[:, None], 1.0, h.t)
    )

  return make
