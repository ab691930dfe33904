"""Diffusion forcing: one stream, every chunk noisy at a level of its own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from avd_jax.algorithms.flow_loss import chunk_mean, drop_text, scored
from avd_jax.diffusion import flow_matching
from avd_jax.typing import Batch, Denoiser, LossFn, NullText, StepContext


def diffusion_forcing(
  denoiser: Denoiser,
  sample_levels: flow_matching.SampleLevels,
  *,
  null_text: NullText,
  text_dropout: float = 0.1,
  skip_chunks: int = 0,
  clean_context: float = 0.0,
) -> LossFn:
  """The flow loss where a chunk's history is the noisy chunks before it.

  What a chunk is conditioned on is at any level, so that the model knows what
  a noised history is: at test it may be told of one, or guided by one. Given
  chunks are fed clean, at t = 0, and take no loss.

  Args:
    denoiser: the model.
    sample_levels: draws the level of each chunk.
    null_text: [m] or [m d], stands in for dropped text.
    text_dropout: rate of dropped text.
    skip_chunks: first chunks without loss; they are noised like the others.
    clean_context: share of videos of which some first chunks, 1 to n - 1, are
      given. Without it a model never sees a clean history while it trains.
  """

  def loss_fn(params, batch, key, context=StepContext()):
    key_text, key_level, key_noise, key_given = jax.random.split(key, 4)
    x = batch.x
    text = drop_text(batch.text, null_text, key_text, text_dropout)
    n = x.shape[1] // denoiser.chunk_frames
    t = sample_levels(key_level, (x.shape[0], n))
    if clean_context:
      batch = _give(batch, n, clean_context, key_given)
    if batch.given is not None:
      t = jnp.where(jnp.arange(n) < batch.given[:, None], 0.0, t)
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    frames = flow_matching.per_frame(t, denoiser.chunk_frames)
    x_t = flow_matching.interpolate(x, noise, frames)
    v = denoiser.parallel(params, x_t, t, text)
    error = (v - flow_matching.velocity(x, noise)) ** 2
    loss = chunk_mean(error, scored(batch, n, skip_chunks), skip_chunks)
    return loss, ({"loss": loss}, dict(context.memory))

  return loss_fn


def _give(batch: Batch, chunks: int, share: float, key: Array) -> Batch:
  """The batch with some first chunks given, of a share of its videos."""
  key_who, key_count = jax.random.split(key)
  videos = batch.x.shape[:1]
  count = jax.random.randint(key_count, videos, 1, max(chunks, 2))
  chosen = jax.random.uniform(key_who, videos) < share
  given = jnp.where(chosen, count, 0)
  if batch.given is not None:
    given = jnp.where(batch.given > 0, batch.given, given)
  return batch._replace(given=given)
