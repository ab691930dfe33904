"""The one loss: flow matching of every chunk, given a history."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from avd_jax.algorithms import error_bank
from avd_jax.diffusion import flow_matching
from avd_jax.typing import (
  Batch,
  Denoiser,
  HistoryFn,
  LossFn,
  NullText,
  StepContext,
  Text,
)


def drop_text(
  text: Text, null_text: NullText, key: jax.Array, rate: float
) -> Text:
  """Replaces a video's text by the null text, at `rate`.

  Without it, guidance at sampling would ask the model for a condition it has
  never seen.
  """
  if not rate:
    return text
  drop = jax.random.uniform(key, text.shape[:1]) < rate
  drop = drop.reshape(-1, *(1,) * (text.ndim - 1))
  return jnp.where(drop, jnp.asarray(null_text).astype(text.dtype), text)


def scored(batch: Batch, chunks: int, skip_chunks: int) -> Float[Array, "b n"]:
  """1 for chunks that take loss, 0 for those that are always given."""
  given = 0 if batch.given is None else batch.given
  first = jnp.broadcast_to(jnp.maximum(given, skip_chunks), len(batch.x))
  return (jnp.arange(chunks) >= first[:, None]).astype(jnp.float32)


def chunk_mean(
  error: Float[Array, "b f h w c"],
  weight: Float[Array, "b n"],
  skip_chunks: int,
) -> Float[Array, ""]:
  """The mean over chunks that may take loss; given ones count as 0.

  So every scored chunk of a big batch weighs the same, however it is cut into
  microbatches; and exactly nothing comes from the others.
  """
  error = error.reshape(*weight.shape, -1).mean(-1)
  return jnp.where(weight > 0, error, 0.0)[:, skip_chunks:].mean()


def flow_loss(
  denoiser: Denoiser,
  history: HistoryFn,
  sample_levels: flow_matching.SampleLevels,
  *,
  null_text: NullText,
  text_dropout: float = 0.1,
  skip_chunks: int = 0,
  resampler: str = "online",
  bank: error_bank.BankConfig | None = None,
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
    resampler: "online" or "ema", the weights that re-make the history.
    bank: keep the model's errors, and add some to the noisy input.

  [RF Eq. 4]
  """

  def loss_fn(params, batch, key, context=StepContext()):
    key_text, key_history, key_level, key_noise, key_bank = jax.random.split(
      key, 5
    )
    x, memory = batch.x, dict(context.memory)
    text = drop_text(batch.text, null_text, key_text, text_dropout)
    maker = context.ema if resampler == "ema" else params
    context = context._replace(given=batch.given)
    h = history(maker, x, text, key_history, context)
    n = x.shape[1] // denoiser.chunk_frames
    t = sample_levels(key_level, (x.shape[0], n))
    noise = jax.random.normal(key_noise, x.shape, x.dtype)
    frames = flow_matching.per_frame(t, denoiser.chunk_frames)
    start = x
    if bank is not None:
      key_corrupt, key_record = jax.random.split(key_bank)
      kept = memory[error_bank.NAME]
      start = error_bank.corrupt(kept, bank, x, t, key_corrupt)
    x_t = flow_matching.interpolate(start, noise, frames)
    v = denoiser.parallel(params, x_t, t, text, h)
    error = v - flow_matching.velocity(x, noise)
    weight = scored(batch, n, skip_chunks)
    if bank is not None:
      # Where the path of x_t ends, by the model, minus where it should end. Of
      # a corrupted input that is not the clean x: an error which was put in
      # is not counted as the model's own, or it would go round and round.
      off = -frames[..., None, None, None] * jax.lax.stop_gradient(error)
      memory[error_bank.NAME] = error_bank.record(
        kept, off, t, weight, key_record
      )
    loss = chunk_mean(error**2, weight, skip_chunks)
    degraded = jnp.mean((h.x - x) ** 2)
    return loss, ({"loss": loss, "history_error": degraded}, memory)

  return loss_fn
