"""The error bank: past mistakes of the model, added to clean data.

A cheap rival of resampling: no rollout at all. While it trains, a model's
one-step estimate of each chunk is off by some error; a few of these are kept,
bucketed by the level they were made at. Later steps add errors drawn from the
bank to the history, and to the noisy input too, while the target stays the
clean data. The idea is Stable Video Infinity's error recycling; the paper's
t_s picks the bucket here, so that levels follow the same law as for every other
history.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from avd_jax.algorithms import histories
from avd_jax.diffusion import rollout
from avd_jax.errors import UserError
from avd_jax.typing import Denoiser, History, HistoryFn, StepContext

NAME = "error_bank"  # of its entry in a step's memory


@dataclasses.dataclass(frozen=True)
class BankConfig:
  """What is kept and how it is used.

  Attributes:
    buckets: equal intervals of the level t.
    size: errors kept in a bucket; the oldest give way. At least a batch.
    input_share: share of videos whose noisy input gets errors too.
    jitter: an error is scaled by 1 +- this, drawn for each.
  """

  buckets: int = 10
  size: int = 64
  input_share: float = 0.5
  jitter: float = 0.3

  def __post_init__(self):
    if self.buckets < 1 or self.size < 1:
      raise UserError(
        f"bank: buckets {self.buckets} and size {self.size} must be at least 1"
      )
    for name in ("input_share", "jitter"):
      if not 0 <= getattr(self, name) <= 1:
        raise UserError(f"bank: {name} {getattr(self, name)} is not in [0, 1]")


class Bank(NamedTuple):
  """Attributes:
  errors: ring buffers, one a bucket.
  written: how many errors a bucket has ever taken.
  """

  errors: Float[Array, "k z g h w c"]
  written: Int[Array, "k"]


def empty(config: BankConfig, chunk: tuple[int, ...]) -> Bank:
  """A bank that has seen nothing; `chunk` is a chunk's shape (g, h, w, c)."""
  return Bank(
    jnp.zeros((config.buckets, config.size, *chunk)),
    jnp.zeros(config.buckets, jnp.int32),
  )


def _bucket(bank: Bank, t: Array) -> Array:
  buckets = len(bank.written)
  return jnp.clip((t * buckets).astype(jnp.int32), 0, buckets - 1)


def add(
  bank: Bank,
  errors: Float[Array, "e g h w c"],
  t: Float[Array, "e"],
) -> Bank:
  """Writes errors made at levels t, in order, over the oldest.

  At most `size` errors a call: more could fall on one place.
  """
  into = _bucket(bank, t)
  mine = into[:, None] == into
  before = jnp.tril(mine, -1).sum(1)  # earlier ones for the same bucket
  place = (bank.written[into] + before) % bank.errors.shape[1]
  return Bank(
    bank.errors.at[into, place].set(errors.astype(bank.errors.dtype)),
    bank.written.at[into].add(1),
  )


def draw(
  bank: Bank, config: BankConfig, t: Float[Array, "e"], key: Array
) -> Float[Array, "e g h w c"]:
  """An error for each level, scaled; zeros where its bucket is empty."""
  key_place, key_scale = jax.random.split(key)
  bucket = _bucket(bank, t)
  # Never a place that is not written yet; the first of none holds zeros.
  kept = jnp.minimum(bank.written[bucket], bank.errors.shape[1])
  place = jax.random.randint(key_place, t.shape, 0, jnp.maximum(kept, 1))
  scale = jax.random.uniform(
    key_scale, t.shape, minval=1 - config.jitter, maxval=1 + config.jitter
  )
  return bank.errors[bucket, place] * scale[:, None, None, None, None]


def _draw_video(bank, config, level, key, chunk_frames):
  """Errors [b f h w c] for levels [b n], none where a level is 0."""
  b, n = level.shape
  errors = draw(bank, config, level.reshape(-1), key)
  errors = errors * (level.reshape(-1) > 0)[:, None, None, None, None]
  return errors.reshape(b, n * chunk_frames, *errors.shape[2:])


def history(
  denoiser: Denoiser,
  options: histories.Degradation = histories.Degradation(),
  config: BankConfig = BankConfig(),
) -> HistoryFn:
  """The data, plus errors that the model once made at level t_s."""

  def make(params, x, text, key, context=StepContext()):
    del params, text
    key, key_draw = jax.random.split(key)
    n = x.shape[1] // denoiser.chunk_frames
    level, _ = histories.draw(options, key, x, n, context)
    errors = _draw_video(
      context.memory[NAME], config, level, key_draw, denoiser.chunk_frames
    )
    return History(x + errors, histories.told(options, level))

  return make


def corrupt(
  bank: Bank,
  config: BankConfig,
  x: Float[Array, "b f h w c"],
  t: Float[Array, "b n"],
  key: Array,
) -> Float[Array, "b f h w c"]:
  """The clean end of a noisy input, with errors made at its level t."""
  key_who, key_draw = jax.random.split(key)
  chosen = jax.random.uniform(key_who, x.shape[:1]) < config.input_share
  level = jnp.where(chosen[:, None], t, 0.0)
  frames = x.shape[1] // t.shape[1]
  return x + _draw_video(bank, config, level, key_draw, frames)


def record(
  bank: Bank,
  error: Float[Array, "b f h w c"],
  t: Float[Array, "b n"],
  weight: Float[Array, "b n"],
  key: Array,
) -> Bank:
  """Keeps the error of one chunk, drawn anew, of each video.

  Of those with weight: where nothing is learned, errors say nothing.
  """
  b, n = t.shape
  chunks = rollout.split_chunks(error, error.shape[1] // n)
  which = jax.random.categorical(key, jnp.log(weight))
  mine = jnp.arange(b)
  return add(bank, chunks[which, mine], t[mine, which])
