"""Histories: what a chunk is conditioned on while it is trained.

Each method of the Resampling Forcing paper is the same loss under another
history; here they are, one function each, `(params, x, text, key) -> History`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from avd_jax.diffusion import flow_matching, rollout, solvers
from avd_jax.errors import UserError
from avd_jax.typing import Denoiser, History, HistoryFn


def ground_truth(denoiser: Denoiser) -> HistoryFn:
  """Teacher forcing: the history is the data itself. [RF Eq. 4]"""

  def make(params, x, text, key):
    del params, text, key
    n = x.shape[1] // denoiser.chunk_frames
    return History(x, jnp.zeros((x.shape[0], n)))

  return make


@dataclasses.dataclass(frozen=True)
class Resampling:
  """How self-resampling degrades a history.

  Attributes:
    shift: s of Eq. 7; below 1 moves t_s to low noise.
    steps: Euler steps from t_s to clean; the paper takes one.
    clean_prefix: first chunks that stay as given, as a prompt's are at test.
    random_prefix: draw each video's prefix from [clean_prefix, n) instead,
      n being the chunks of a video.
    share: share of videos whose history is degraded at all.
    tell: tell the model the level t_s (0 for clean chunks) instead of 0.
    detached: hand on the rollout's own KV cache as the history, so that the
      gradient pass runs the noisy stream alone: half the cost, and no gradient
      reaches the weights through the history.
  """

  shift: float = 0.6
  steps: int = 1
  clean_prefix: int = 1
  random_prefix: bool = False
  share: float = 1.0
  tell: bool = False
  detached: bool = False

  def __post_init__(self):
    if self.shift <= 0 or self.steps < 1 or self.clean_prefix < 0:
      raise UserError(
        f"resampling: shift {self.shift} must be positive, steps {self.steps}"
        f" at least 1, clean_prefix {self.clean_prefix} at least 0"
      )
    if not 0 <= self.share <= 1:
      raise UserError(f"resampling: share {self.share} is not in [0, 1]")


def _clean_chunks(
  options: Resampling, key: Array, batch: int, chunks: int
) -> Bool[Array, "b n"]:
  """Which chunks stay clean: a prefix of each video, or all of it."""
  key_prefix, key_share = jax.random.split(key)
  prefix = jnp.full((batch,), options.clean_prefix)
  if options.random_prefix:
    prefix = jax.random.randint(
      key_prefix, (batch,), min(options.clean_prefix, chunks - 1), chunks
    )
  whole = jax.random.uniform(key_share, (batch,)) >= options.share
  prefix = jnp.where(whole, chunks, prefix)
  return jnp.arange(chunks) < prefix[:, None]


def self_resampled(
  denoiser: Denoiser, options: Resampling = Resampling()
) -> HistoryFn:
  """Resampling Forcing: the model re-makes its own history.

  Chunk after chunk, each is noised to a level t_s that the video's chunks
  share, and solved back to clean on top of the already degraded chunks before
  it. The last chunk stays clean: no chunk comes after it to be conditioned.
  Nothing in here carries a gradient. [RF Eq. 5] [RF Alg. 1]
  """
  sample_level = flow_matching.logit_normal(options.shift)

  def make(params, x, text, key):
    key_level, key_noise, key_clean = jax.random.split(key, 3)
    b, n = x.shape[0], x.shape[1] // denoiser.chunk_frames
    clean = _clean_chunks(options, key_clean, b, n).at[:, -1].set(True)
    level = jnp.broadcast_to(sample_level(key_level, (b, 1)), (b, n))
    level = jnp.where(clean, 0.0, level)
    told = level if options.tell else jnp.zeros_like(level)
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    frames = flow_matching.per_frame(level, denoiser.chunk_frames)
    remade, cache = _remake(
      denoiser,
      options,
      params,
      x,
      text,
      level,
      told,
      clean,
      flow_matching.interpolate(x, noise, frames),
    )
    history = History(remade, told, cache if options.detached else None)
    return jax.lax.stop_gradient(history)

  return make


def _remake(denoiser, options, params, x, text, level, told, clean, noised):
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
      keep=(clean[:, given:-1], x[:, cut:end]),
      told=told[:, given:-1],
    )
  return jnp.concatenate([x[:, :cut], made, x[:, end:]], 1), cache
