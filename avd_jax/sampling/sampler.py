"""The sampler: fillings of the one rollout, in segments.

A rollout of any length runs as equal segments of one compiled program: given
chunks are prefilled, then each call makes `segment` chunks and hands the cache
on. What a chunk looks like does not depend on how a video was cut in segments:
its noise belongs to its absolute index.

Where the text changes, the cache is made anew: all chunks it held go through
the network again, one after another, under the new text. So it is what it
would have been had the video been told that text from the start.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from avd_jax import config as config_lib
from avd_jax.diffusion import guidance, rollout, solvers
from avd_jax.errors import UserError
from avd_jax.models import denoiser as denoiser_lib
from avd_jax.models.dit_config import DiTConfig
from avd_jax.sampling import texts as texts_lib
from avd_jax.sampling.texts import Texts
from avd_jax.typing import Denoiser, Params


@dataclasses.dataclass(frozen=True)
class Sampler:
  """A trained model, ready to continue videos.

  Attributes:
    config: the run's.
    params: its weights.
    make: makes the network's two faces; who wants to look on wraps
      `denoiser.make`.
    null_text: what guidance by text leads away from, [m] or [m d]: the text
      that dropout trained (the embedding of no prompt), or that of a negative
      prompt. None is zeros, as bytes have it.
  """

  config: ConfigDict
  params: Params
  make: Callable[[DiTConfig], Denoiser] = denoiser_lib.make
  null_text: np.ndarray | None = None

  @functools.cached_property
  def model(self) -> DiTConfig:
    return config_lib.typed(DiTConfig, self.config.model)

  @property
  def _guides(self) -> bool:
    """Whether guidance by text is on."""
    return self.config.sampling.guidance != 1.0 and self.model.text != "none"

  def denoiser(self, null: jax.Array | None = None) -> Denoiser:
    """The network under the run's guidance, as all programs here run it.

    Args:
      null: text [m] or [m d] that guidance leads away from, traced where it is
        an argument of a program; None is zeros.
    """
    denoiser, options = self.make(self.model), self.config.sampling
    if self._guides:
      if null is None:
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
  def _empty(self):
    """(shape of a chunk [b g h w c], chunks) -> an empty cache, of which each
    device makes its own share."""

    def empty(shape, chunks):
      like = jax.ShapeDtypeStruct(shape, jnp.float32)
      return self.denoiser().init_cache(like, chunks)

    return jax.jit(empty, static_argnums=(0, 1))

  @functools.cached_property
  def _prefill(self):
    """(params, chunk, text, cache, its place, told [b 1], null) -> cache."""

    def prefill(params, x, text, cache, place, told, null):
      denoiser = self.denoiser(null)
      return rollout.prefill(
        denoiser, params, x, text, cache, first_chunk=place, told=told
      )

    return jax.jit(prefill, donate_argnums=3)

  @functools.cached_property
  def segment(self):
    """The compiled program of all videos: it makes some chunks.

    Called as `(params, text, cache, key, (index, place), shape, chunks, null,
    held)`; `shape` and `chunks` are static, the cache is donated.

    Args:
      params: the weights.
      text: [b m] or [b m d].
      cache: holds the chunks before.
      key: of the whole video's noise.
      (index, place): int32, of the first chunk: in the video, in the cache.
      shape: of a chunk [b g h w c].
      chunks: to be made.
      null: as `denoiser` takes it; may be left out.
      held: known frames; see `rollout.rollout`. May be left out.

    Returns:
      (the chunks [b f h w c], the cache that holds them too).
    """
    options, frames = self.config.sampling, self.model.chunk_frames
    noised = options.context_noise

    def make(
      params, text, cache, key, first, shape, chunks, null=None, held=None
    ):
      # By a chunk's place in the video, wherever in a cache it lies.
      index, place = first
      keys = _fold(key, index + jnp.arange(chunks))
      b, _, *space = shape
      noise = jax.vmap(lambda k: jax.random.normal(k, (b, frames, *space)))(
        keys
      )
      return rollout.rollout(
        self.denoiser(null),
        params,
        rollout.join_chunks(noise),
        jnp.ones((b, chunks)),
        text,
        cache,
        grid=solvers.time_grid(options.steps, options.shift),
        solver=options.solver,
        first_chunk=place,
        held=held,
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
    """(made chunks [b f h w c], key, index of the first) -> [n b g h w c],
    as they are remembered."""
    frames, level = self.model.chunk_frames, self.config.sampling.context_noise

    def see(made, key, index):
      chunks = rollout.split_chunks(made, frames)
      keys = _context_keys(_fold(key, index + jnp.arange(len(chunks))))
      return jax.vmap(rollout.as_context, (0, 0, None))(chunks, keys, level)

    return jax.jit(see)

  def stream(
    self,
    given: np.ndarray,
    text: np.ndarray | Texts,
    frames: int,
    seed: int = 0,
  ) -> Iterator[np.ndarray]:
    """Yields the frames made, a segment at a time.

    Args:
      given: first frames [b g h w c]; g may be 0. Whole chunks of them are
        history; what is left begins the first chunk that is made, where it is
        held: at each step of the solver it is put to that step's level with the
        chunk's own noise, and it comes out as it is (replacement
        conditioning).
      text: int32 [b m], or embeddings [b m d]; or several, by chunk.
      frames: length of the whole video, given frames included.
      seed: of the noise.

    Yields:
      Whole chunks; the first holds what was given of it.

    Raises:
      UserError: frames that are not whole chunks, nothing to make, or guidance
        by embeddings without null_text.
    """
    for made, _ in self.segments(given, text, frames, seed):
      yield np.asarray(made)

  def segments(
    self,
    given: np.ndarray,
    text: np.ndarray | Texts,
    frames: int,
    seed: int = 0,
  ) -> Iterator[tuple[jax.Array, Any]]:
    """As `stream`, each with the cache after it, gone when the next is made.

    Nothing is waited for: a segment is handed out while it is being made.

    With `sampling.recompute`, a cache never holds more than that many chunks:
    then the last `recompute_keep` chunks of the video fill a fresh one, as if
    the video had started with them; made ones as noised as they were before.
    """
    size, options = self.model.chunk_frames, self.config.sampling
    done, total = self._lengths(given.shape[1], frames)
    texts = texts_lib.constant(text)
    segment, room = self.room(done, total, texts.starts)
    window, key = options.recompute, jax.random.key(seed)
    given = jnp.asarray(given, jnp.float32)
    past = _Past(given[:, : done * size], size)
    shape = (given.shape[0], size, *given.shape[2:])
    held, null = self._held(given, done, segment), self._null()
    cache = None
    while done < total:
      if past.count == window:
        past.keep_last(options.recompute_keep)
      until = texts.until(done, total)
      if window is not None:
        until = min(until, done - past.count + window)
      now = jnp.asarray(texts.at(done))
      # Whoever was handed the last one may hold on to it: two are too large.
      jax.tree.map(lambda x: x.delete(), cache)
      cache = self._filled(past, now, null, shape, room)
      while done < until:
        first = (jnp.int32(done), jnp.int32(past.count))
        made, cache = self.segment(
          self.params, now, cache, key, first, shape, segment, null, held
        )
        held = _let_go(held)
        count = min(segment, until - done)
        if window is not None or texts.until(done, total) < total:
          seen = self._as_context(made, key, jnp.int32(done))
          past.remember(seen[:count], self._told)
        else:
          past.chunks.clear()  # nothing will be made anew any more
        past.count += count
        done += count
        yield made[:, : count * size], cache

  def _filled(
    self,
    past: "_Past",
    text: jax.Array,
    null: jax.Array | None,
    shape: tuple[int, ...],
    room: int,
  ) -> Any:
    """A cache that all past chunks of the video have gone through, one by one,
    under a text; a window's ring has kept the last of them."""
    cache = self._empty(shape, room)
    for place, (x, level) in enumerate(past.chunks):
      told = jnp.full((shape[0], 1), level)
      cache = self._prefill(
        self.params, x, text, cache, jnp.int32(place), told, null
      )
    return cache

  def _lengths(self, given: int, frames: int) -> tuple[int, int]:
    """Whole chunks that are given, and chunks in all."""
    size = self.model.chunk_frames
    if frames % size:
      raise UserError(
        f"{frames} frames in all must be whole chunks of {size} frames"
      )
    if given >= frames:
      raise UserError(
        f"{frames} frames are asked for and {given} are given: nothing is"
        " left to make"
      )
    return given // size, frames // size

  def _null(self) -> jax.Array | None:
    if not self._guides or self.null_text is None:
      if self._guides and self.model.text == "embeddings":
        raise UserError(
          "guidance by text needs null_text, the embedding of no prompt (or of"
          " a negative one); sampling.guidance 1 needs none"
        )
      return None
    return jnp.asarray(self.null_text)

  def _held(self, given: jax.Array, done: int, segment: int) -> Any:
    """(which frames [f], values [b f ...]) of the first segment, or None."""
    size = self.model.chunk_frames
    begun = given[:, done * size :]
    if not begun.shape[1]:
      return None
    rest = segment * size - begun.shape[1]
    room = ((0, 0), (0, rest), (0, 0), (0, 0), (0, 0))
    which = jnp.arange(segment * size) < begun.shape[1]
    return which, jnp.pad(begun, room)

  def room(
    self, done: int, total: int, starts: Sequence[int] = ()
  ) -> tuple[int, int]:
    """(chunks made by a call of `segment`, chunks that a cache has room for).

    Args:
      done: chunks that are given.
      total: chunks in all.
      starts: chunks at which the text changes.

    Raises:
      UserError: more given chunks than a cache may hold.
    """
    options = self.config.sampling
    window = options.recompute
    if window is None:
      segment = min(options.segment, total - done)
      # Whole segments: the last one may run past the end, unseen.
      ends = (
        first - (first - end) // segment * segment
        for first, end in texts_lib.stretches(starts, done, total)
      )
      return segment, max(ends)
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
    text: np.ndarray | Texts,
    frames: int,
    seed: int = 0,
    on_frames: Callable[[int], Any] = lambda count: None,
  ) -> np.ndarray:
    """The whole video [b frames h w c]: the given frames and what follows.

    Args and errors as `stream`; `on_frames` hears of every segment's length.
    """
    whole = given.shape[1] - given.shape[1] % self.model.chunk_frames
    parts = [np.asarray(given[:, :whole], np.float32)]
    for made in self.stream(given, text, frames, seed):
      parts.append(made)
      on_frames(made.shape[1])
    return np.concatenate(parts, 1)


class _Past:
  """What a cache holds: how many chunks, and which, where they are needed.

  Attributes:
    count: chunks in the cache.
    chunks: (chunk [b g h w c] as it is remembered, level it is told).
  """

  def __init__(self, given: jax.Array, size: int):
    self.count = given.shape[1] // size
    parts = jnp.split(given, self.count, 1) if self.count else []
    self.chunks = [(x, 0.0) for x in parts]

  def remember(self, chunks: jax.Array, told: float) -> None:
    """Takes made chunks [n b g h w c]."""
    self.chunks += [(x, told) for x in chunks]

  def keep_last(self, count: int) -> None:
    """Forgets all but the last."""
    self.chunks = self.chunks[-count:]
    self.count = len(self.chunks)


def _let_go(held: Any) -> Any:
  """The same shapes with no frame held: one program for all segments."""
  return None if held is None else (jnp.zeros_like(held[0]), held[1])


def _fold(key: jax.Array, index: jax.Array) -> jax.Array:
  """A key for each chunk, by its absolute index."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def _context_keys(keys: jax.Array) -> jax.Array:
  """Another stream than the noise that chunks start from."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
