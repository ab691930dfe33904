"""Is one Euler step from x_{t_s} a fair proxy for a rollout's errors?

Resampling Forcing trains on histories that one step from a noised truth has
degraded; at test, history is what many steps from pure noise have made. Here a
model's errors of both kinds, and of the cheaper stand-ins, are made on the same
held-out videos and compared: how large, at which spatial frequencies, how they
persist from chunk to chunk, and whether they point where the real error points.
Then every model is asked to go on from every kind of history.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from avd_jax import sampling
from avd_jax.algorithms import flow_loss, histories
from avd_jax.models import denoiser as denoiser_lib
from avd_jax.models.dit_config import DiTConfig
from avd_jax.sampling import Sampler
from avd_jax.studies.rollouts import Prompts
from avd_jax.training.program import LEVELS
from avd_jax.typing import Batch, History, HistoryFn, Params, StepContext

CHUNKS = 20  # made after the given ones
# Radial bands of a chunk's spatial spectrum, as edges in cycles over the frame
# (the first is the mean colour alone).
BANDS = ("mean colour", "< 1", "1 to 2", "2 to 4", "> 4")
_EDGES = (0.25, 1.0, 2.0, 4.0)
REAL = "rollout"
# Ways to degrade a history, by label: maker and options.
KINDS = {
  "noise, s=.1": (histories.noise_augmented, dict(shift=0.1)),
  "parallel, s=.1": (histories.parallel_resampled, dict(shift=0.1)),
  "one step, s=.1": (histories.self_resampled, dict(shift=0.1)),
  "one step, s=.6": (histories.self_resampled, dict(shift=0.6)),
  "4 steps, s=.6": (histories.self_resampled, dict(shift=0.6, steps=4)),
}


def band_shares(error: Float[np.ndarray, "b n h w c"]) -> np.ndarray:
  """The share of an error's energy in each of BANDS, over all of its frames."""
  spectrum = scipy.fft.dctn(error, axes=(2, 3), norm="ortho") ** 2
  rows, columns = (np.arange(size) / 2 for size in error.shape[2:4])
  radius = np.hypot(rows[:, None], columns[None])
  band = np.digitize(radius, _EDGES)
  energy = np.array(
    [spectrum[:, :, band == i].sum() for i in range(len(BANDS))]
  )
  return energy / max(energy.sum(), 1e-12)


def by_chunk(
  error: Float[np.ndarray, "b f h w c"], frames: int
) -> Float[np.ndarray, "b n h w d"]:
  """An error chunk by chunk, the frames of a chunk as if they were channels."""
  b, f, h, w, c = error.shape
  chunks = error.reshape(b, f // frames, frames, h, w, c)
  return np.moveaxis(chunks, 2, 4).reshape(b, -1, h, w, frames * c)


def cosine(
  one: Float[np.ndarray, "b n *s"], other: Float[np.ndarray, "b n *s"]
) -> np.ndarray:
  """[n], the mean over videos of the angle's cosine between two errors."""
  a, b = (e.reshape(*e.shape[:2], -1) for e in (one, other))
  norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
  return ((a * b).sum(-1) / np.maximum(norms, 1e-9)).mean(0)


def statistics(
  error: Float[np.ndarray, "b n h w c"], real: Float[np.ndarray, "b n h w c"]
) -> dict[str, Any]:
  """One kind of error beside the real one.

  Returns:
    rms [n] by chunk; bands, shares of energy; persistence, the cosine between
    errors of neighbouring chunks; direction [n], the cosine with the real error
    of the same video and chunk; chance [n], with another video's.
  """
  return {
    "rms": np.sqrt((error**2).mean((0, 2, 3, 4))).tolist(),
    "bands": band_shares(error).tolist(),
    "persistence": float(cosine(error[:, 1:], error[:, :-1]).mean()),
    "direction": cosine(error, real).tolist(),
    "chance": cosine(error, np.roll(real, 1, 0)).tolist(),
  }


@functools.cache
def _makers(model: DiTConfig, given: int) -> dict[str, HistoryFn]:
  """A compiled function a kind; models of one shape share them."""
  denoiser = denoiser_lib.make(model)
  out = {}
  for label, (maker, options) in KINDS.items():
    options = histories.Degradation(clean_prefix=given, **options)
    out[label] = jax.jit(maker(denoiser, options))
  return out


def _histories(
  sampler: Sampler, prompts: Prompts, seed: int
) -> dict[str, History]:
  """A model's own history of every kind, the real one last."""
  (x, text, _), model = prompts.truth, sampler.model
  given = prompts.given // model.chunk_frames
  key = jax.random.key(seed)
  out = {
    label: make(sampler.params, x, text, key, StepContext())
    for label, make in _makers(model, given).items()
  }
  made = sampler.extend(x[:, : prompts.given], text, x.shape[1], seed)
  clean = jnp.zeros((len(x), x.shape[1] // model.chunk_frames))
  return out | {REAL: History(jnp.asarray(made), clean)}


@functools.cache
def _loss(
  model: DiTConfig, given: int, levels: str, shift: float
) -> Callable[[Params, Batch, History, Array], Array]:
  """The flow loss of made chunks under a history, compiled."""

  def loss(params, batch, history, key):
    loss_fn = flow_loss.flow_loss(
      denoiser_lib.make(model),
      lambda *_: history,
      LEVELS[levels](shift),
      null_text=jnp.zeros(batch.text.shape[1:], jnp.int32),
      text_dropout=0.0,
      skip_chunks=given,
    )
    return loss_fn(params, batch, key)[0]

  return jax.jit(loss)


def _cut(prompts: Prompts, chunk_frames: int) -> Prompts:
  frames = prompts.given + CHUNKS * chunk_frames
  x = prompts.truth.x[:, :frames]
  return dataclasses.replace(prompts, truth=Batch(x, prompts.truth.text))


def measure(
  workdirs: Mapping[str, Path],
  configs: Mapping[str, ConfigDict],
  prompts: Prompts,
  seed: int,
) -> dict[str, Any]:
  """The errors of some models, and how each goes on from every history.

  Args:
    workdirs: of trained runs, by label.
    configs: what they are sampled with, by label.
    prompts: held-out videos, CHUNKS chunks longer than what is given.
    seed: of all noise, the same for all models and histories.

  Returns:
    errors[model][kind], see `statistics`; loss[model][kind], the flow loss
    under the model's own history of that kind, "truth" being the data.
  """
  errors: dict[str, Any] = {}
  losses: dict[str, dict[str, float]] = {}
  for label, workdir in workdirs.items():
    # A run may have been trained with other settings of sampling.
    config = configs[label]
    sampler = dataclasses.replace(sampling.load(workdir), config=config)
    model, key = sampler.model, jax.random.key(seed)
    size = model.chunk_frames
    cut = _cut(prompts, size)
    made = _histories(sampler, cut, seed)
    # Without the last chunk: nobody degrades it.
    part = slice(prompts.given, -size)
    error = {
      kind: by_chunk((np.asarray(h.x) - cut.truth.x)[:, part], size)
      for kind, h in made.items()
    }
    errors[label] = {
      kind: statistics(e, error[REAL]) for kind, e in error.items()
    }
    truth = History(jnp.asarray(cut.truth.x), jnp.zeros_like(made[REAL].t))
    given = prompts.given // size
    loss = _loss(model, given, config.loss.levels, config.loss.shift)
    losses[label] = {
      kind: float(loss(sampler.params, cut.truth, h, key))
      for kind, h in ({"truth": truth} | made).items()
    }
  return {"errors": errors, "loss": losses}
