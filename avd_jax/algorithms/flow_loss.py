"""The one loss: flow matching of every chunk, given a history."""

import jax
import jax.numpy as jnp

from avd_jax.diffusion import flow_matching
from avd_jax.typing import Denoiser, HistoryFn, LossFn, NullText, Text


def drop_text(
  text: Text, null_text: NullText, key: jax.Array, rate: float
) -> Text:
  """Replaces a video's text by the null text, at `rate`.

  Without it, guidance at sampling would ask the model for a condition it has
  never seen.
  """
  drop = jax.random.uniform(key, text.shape[:1]) < rate
  drop = drop.reshape(-1, *(1,) * (text.ndim - 1))
  return jnp.where(drop, jnp.asarray(null_text).astype(text.dtype), text)


def flow_loss(
  denoiser: Denoiser,
  history: HistoryFn,
  sample_levels: flow_matching.SampleLevels,
  *,
  null_text: NullText,
  text_dropout: float = 0.1,
  skip_chunks: int = 0,
) -> LossFn:
  """mean_i || (eps^i - x^i) - v(x^i_{t^i}, h^{<i}, t^i, c) ||^2.

  Each chunk draws its own level t^i; targets are always the clean data,
  whatever the history.

  Args:
    denoiser: the model.
    history: makes h; see algorithms/histories.
    sample_levels: draws t^i.
    null_text: [m] or [m d], stands in for dropped text.
    text_dropout: rate of dropped text.
    skip_chunks: first chunks without loss (always given at test).

  [RF Eq. 4]
  """

  def loss_fn(params, batch, key, resampler=None):
    key_text, key_history, key_level, key_noise = jax.random.split(key, 4)
    x = batch.x
    text = batch.text
    if text_dropout:
      text = drop_text(text, null_text, key_text, text_dropout)
    h = history(
      params if resampler is None else resampler, x, text, key_history
    )
    n = x.shape[1] // denoiser.chunk_frames
    t = sample_levels(key_level, (x.shape[0], n))
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    frames = flow_matching.per_frame(t, denoiser.chunk_frames)
    x_t = flow_matching.interpolate(x, noise, frames)
    v = denoiser.parallel(params, x_t, t, text, h)
    error = (v - flow_matching.velocity(x, noise)) ** 2
    error = error.reshape(x.shape[0], n, -1).mean(-1)[:, skip_chunks:]
    loss = error.mean()
    degraded = jnp.mean((h.x - x) ** 2)
    return loss, {"loss": loss, "history_error": degraded}

  return loss_fn
