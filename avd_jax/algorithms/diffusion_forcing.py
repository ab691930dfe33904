"""Diffusion forcing: one stream, every chunk noisy at a level of its own."""

import jax
import jax.numpy as jnp

from avd_jax.algorithms.flow_loss import chunk_mean, drop_text, scored
from avd_jax.diffusion import flow_matching
from avd_jax.typing import Denoiser, LossFn, NullText, StepContext


def diffusion_forcing(
  denoiser: Denoiser,
  sample_levels: flow_matching.SampleLevels,
  *,
  null_text: NullText,
  text_dropout: float = 0.1,
  skip_chunks: int = 0,
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
  """

  def loss_fn(params, batch, key, context=StepContext()):
    key_text, key_level, key_noise = jax.random.split(key, 3)
    x = batch.x
    text = drop_text(batch.text, null_text, key_text, text_dropout)
    n = x.shape[1] // denoiser.chunk_frames
    t = sample_levels(key_level, (x.shape[0], n))
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
