"""Sampling: fillings of the one rollout, in segments, with progress.

A rollout of any length runs as equal segments of one compiled program: given
chunks are prefilled, then each call makes `segment` chunks and hands the cache
on. What a chunk looks like does not depend on how a video was cut in segments:
its noise belongs to its absolute index.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from avd_jax import checkpoint
from avd_jax import config as config_lib
from avd_jax.data.pipeline import DataConfig
from avd_jax.diffusion import guidance, rollout, solvers
from avd_jax.errors import UserError
from avd_jax.models import denoiser as denoiser_lib
from avd_jax.models.dit_config import DiTConfig
from avd_jax.typing import Denoiser, Params

CHANGEABLE = (*config_lib.WEIGHTLESS, "sampling.", "evaluation.")


@dataclasses.dataclass(frozen=True)
class Sampler:
  """A trained model, ready to continue videos.

  Attributes:
    config: the run's.
    params: its weights.
    make: makes the network's two faces; who wants to look on wraps
      `denoiser.make`.
  """

  config: ConfigDict
  params: Params
  make: Callable[[DiTConfig], Denoiser] = denoiser_lib.make

  @functools.cached_property
  def model(self) -> DiTConfig:
    return config_lib.typed(DiTConfig, self.config.model)

  @functools.cached_property
  def _denoiser(self) -> Denoiser:
    denoiser, options = self.make(self.model), self.config.sampling
    if options.guidance != 1.0 and self.model.text != "none":
      null = self.model.text_struct(self.config.data.text_length)
      null = jnp.zeros(null.shape, null.dtype)
      denoiser = guidance.classifier_free(denoiser, options.guidance, null)
    # Outermost: with and without text, a noised past is one and the same.
    if options.history_guidance != 1.0:
      denoiser = guidance.history_guided(
        denoiser, options.history_guidance, options.history_level
      )
    return denoiser

  @functools.cached_property
  def _prefill(self):
    return jax.jit(
      functools.partial(rollout.prefill, self._denoiser), donate_argnums=3
    )

  @functools.cached_property
  def _segment(self):
    options, frames = self.config.sampling, self.model.chunk_frames
    noised = options.context_noise

    def make(params, text, cache, key, first, shape, chunks):
      # By a chunk's place in the video, wherever in a cache it lies.
      index, place = first
      keys = _fold(key, index + jnp.arange(chunks))
      b, _, *space = shape
      noise = jax.vmap(lambda k: jax.random.normal(k, (b, frames, *space)))(
        keys
      )
      return rollout.rollout(
        self._denoiser,
        params,
        rollout.join_chunks(noise),
        jnp.ones((b, chunks)),
        text,
        cache,
        grid=solvers.time_grid(options.steps, options.shift),
        solver=options.solver,
        first_chunk=place,
        told=jnp.full((b, chunks), self._told),
        context_noise=noised,
        keys=_context_keys(keys),
      )

    return jax.jit(make, static_argnums=(5, 6), donate_argnums=2)

  @property
  def _told(self) -> float:
    """The level at which made chunks are remembered."""
    options = self.config.sampling
    if options.context_told is None:
      return options.context_noise
    return options.context_told

  @functools.cached_property
  def _as_context(self):
    """(made chunks [b f h w c], key, index of the first) -> as remembered."""
    frames, level = self.model.chunk_frames, self.config.sampling.context_noise

    def see(made, key, index):
      chunks = rollout.split_chunks(made, frames)
      keys = _context_keys(_fold(key, index + jnp.arange(len(chunks))))
      seen = jax.vmap(rollout.as_context, (0, 0, None))(chunks, keys, level)
      return rollout.join_chunks(seen)

    return jax.jit(see)

  def stream(
    self,
    given: np.ndarray,
    text: np.ndarray,
    frames: int,
    seed: int = 0,
  ) -> Iterator[np.ndarray]:
    """Yields the frames made, a segment at a time.

    Args:
      given: first frames [b g h w c], whole chunks of them; g may be 0.
      text: int32 [b m], or embeddings [b m d].
      frames: length of the whole video, given frames included.
      seed: of the noise.

    Raises:
      UserError: frames that are not whole chunks, or nothing to make.
    """
    for made, _ in self.segments(given, text, frames, seed):
      yield made

  def segments(
    self,
    given: np.ndarray,
    text: np.ndarray,
    frames: int,
    seed: int = 0,
  ) -> Iterator[tuple[np.ndarray, Any]]:
    """As `stream`, each with the cache after it, gone when the next is made.

    With `sampling.recompute`, a cache never holds more than that many chunks:
    then the last `recompute_keep` chunks of the video fill a fresh one, as if
    the video had started with them; made ones as noised as they were before.
    """
    size, options = self.model.chunk_frames, self.config.sampling
    if given.shape[1] % size or frames % size:
      raise UserError(
        f"{given.shape[1]} given frames and {frames} in all must be whole"
        f" chunks of {size} frames"
      )
    done, total = given.shape[1] // size, frames // size
    if done >= total:
      raise UserError(
        f"{frames} frames are asked for and {given.shape[1]} are given:"
        " nothing is left to make"
      )
    segment, room = self._room(done, total)
    window, keep = options.recompute, options.recompute_keep
    key, past = jax.random.key(seed), np.asarray(given, np.float32)
    told = np.zeros((len(given), done), np.float32)
    shape = (given.shape[0], size, *given.shape[2:])
    like = jax.ShapeDtypeStruct(shape, jnp.float32)
    while done < total:
      place, until = past.shape[1] // size, total
      if window is not None:
        until = min(total, done - place + window)
      cache = self._denoiser.init_cache(like, room)
      if place:
        cache = self._prefill(
          self.params, jnp.asarray(past), text, cache, told=told
        )
      while done < until:
        first = (jnp.int32(done), jnp.int32(place))
        made, cache = self._segment(
          self.params, text, cache, key, first, shape, segment
        )
        count = min(segment, until - done)
        if window is not None:
          seen = self._as_context(made, key, jnp.int32(done))
          seen = np.asarray(seen)[:, : count * size]
          past = np.concatenate([past, seen], 1)[:, -keep * size :]
          now = np.full((len(told), count), self._told, np.float32)
          told = np.concatenate([told, now], 1)[:, -keep:]
        done, place = done + count, place + segment
        yield np.asarray(made)[:, : count * size], cache

  def _room(self, done: int, total: int) -> tuple[int, int]:
    """(chunks made by a call, chunks that a cache has room for).

    Raises:
      UserError: more given chunks than a cache may hold.
    """
    options = self.config.sampling
    window = options.recompute
    if window is None:
      segment = min(options.segment, total - done)
      # Whole segments: the last one may run past the end, unseen.
      return segment, done + -(-(total - done) // segment) * segment
    if done >= window:
      raise UserError(
        f"{done} given chunks fill sampling.recompute {window}: nothing new"
        " would be made; give fewer frames or raise it"
      )
    segment = min(options.segment, window - options.recompute_keep)
    return segment, window + segment  # one program for all of its caches

  def extend(
    self,
    given: np.ndarray,
    text: np.ndarray,
    frames: int,
    seed: int = 0,
    on_frames: Callable[[int], Any] = lambda count: None,
  ) -> np.ndarray:
    """The whole video [b frames h w c]: the given frames and what follows.

    Args and errors as `stream`; `on_frames` hears of every segment's length.
    """
    parts = [np.asarray(given, np.float32)]
    for made in self.stream(given, text, frames, seed):
      parts.append(made)
      on_frames(made.shape[1])
    return np.concatenate(parts, 1)


def _fold(key: jax.Array, index: jax.Array) -> jax.Array:
  """A key for each chunk, by its absolute index."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def _context_keys(keys: jax.Array) -> jax.Array:
  """Another stream than the noise that chunks start from."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, 1)


def load(
  workdir: str | Path, overrides: Sequence[str] = (), frames: int = 0
) -> Sampler:
  """The newest EMA weights of a run, as a sampler.

  Args:
    workdir: the run's.
    overrides: `--config.field=value` arguments for what weights do not depend
      on: how attention sees the history, and how to sample and evaluate.
    frames: of the videos to be made, where longer than the run's own.

  Raises:
    UserError: no such run, a torn checkpoint, or a field that may not change.
  """
  checkpoints, step = checkpoint.open_existing(workdir)
  try:
    config = config_lib.from_json(checkpoints.record(step)["config"])
    config_lib.override(config, list(overrides), CHANGEABLE)
    if overrides:
      config_lib.check(config, frames, trains=False)
    model = config_lib.typed(DiTConfig, config.model)
    data = config_lib.typed(DataConfig, config.data)
    shape = (1, model.chunk_frames, data.height, data.width, model.channels)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    text = model.text_struct(1, data.text_length)
    target = denoiser_lib.abstract_params(model, x, text)
    return Sampler(config, checkpoints.restore(step, {"ema": target})["ema"])
  finally:
    checkpoints.close()
