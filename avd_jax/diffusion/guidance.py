"""Guidance as wrappers: a Denoiser in, a Denoiser out.

Both run two branches as one batch of twice the size, so that a cached rollout
stays one program; the doubled cache is the wrapper's own. They compose.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from avd_jax.diffusion.flow_matching import interpolate
from avd_jax.diffusion.rollout import join_chunks, remember, split_chunks
from avd_jax.typing import Denoiser, History, NullText

_twice = lambda z: jnp.concatenate([z, z])


def _mix(v: jax.Array, scale: float) -> jax.Array:
  """null + scale (full - null)."""
  full, null = jnp.split(v, 2)
  return null + scale * (full - null)


def _init_cache(denoiser: Denoiser) -> Callable:
  def init_cache(x, chunks, keep_all=False):
    x = jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype)
    return denoiser.init_cache(x, chunks, keep_all)

  return init_cache


def classifier_free(
  denoiser: Denoiser, scale: float, null_text: NullText
) -> Denoiser:
  """v_null + scale (v_text - v_null), each branch with its own cache.

  Args:
    denoiser: a model trained with text dropout.
    scale: 1 is no guidance.
    null_text: the text that dropout trained, [m] or [m d].
  """

  def texts(text):
    null = jnp.broadcast_to(null_text, text.shape).astype(text.dtype)
    return jnp.concatenate([text, null])

  def parallel(params, x, t, text, history=None):
    # A history that holds a cache was made by this wrapper: doubled already.
    keep = None if history is None else history.cache
    both = jax.tree.map(_twice, history and history._replace(cache=None))
    both = both and both._replace(cache=keep)
    v = denoiser.parallel(params, _twice(x), _twice(t), texts(text), both)
    return _mix(v, scale)

  def cached(params, x, t, text, cache, chunk):
    v, cache = denoiser.cached(
      params, _twice(x), _twice(t), texts(text), cache, chunk
    )
    return _mix(v, scale), cache

  def keep_chunk(params, x, t, text, cache, chunk):
    return remember(
      denoiser, params, _twice(x), _twice(t), texts(text), cache, chunk
    )

  return Denoiser(
    parallel, cached, _init_cache(denoiser), denoiser.chunk_frames, keep_chunk
  )


def history_guided(
  denoiser: Denoiser, scale: float, level: float = 1.0, seed: int = 0
) -> Denoiser:
  """v_null + scale (v_history - v_null), the null branch's history noised.

  At level 1 its history is pure noise, told as such: no history at all. Below
  1 it is a partly noised one, which keeps what is slow and drops what is fast
  (DFoT's fractional guidance).

  Args:
    denoiser: a model that has seen noised histories at their level: trained by
      diffusion forcing, or with history dropout.
    scale: 1 is no guidance.
    level: of the null branch's history, in (0, 1].
    seed: of its noise; each chunk folds its index in, and then 2.
  """

  def noised(x, chunk):
    # The 2 parts it from what a sampler of the same seed draws.
    key = jax.random.fold_in(jax.random.key(seed), chunk)
    key = jax.random.fold_in(key, 2)
    noise = jax.random.normal(key, x.shape, x.dtype)
    return interpolate(x, noise, jnp.float32(level))

  def parallel(params, x, t, text, history):
    chunks = split_chunks(history.x, denoiser.chunk_frames)
    null = join_chunks(jax.vmap(noised)(chunks, jnp.arange(len(chunks))))
    both = History(
      jnp.concatenate([history.x, null]),
      jnp.concatenate([history.t, jnp.full_like(history.t, level)]),
    )
    v = denoiser.parallel(params, _twice(x), _twice(t), _twice(text), both)
    return _mix(v, scale)

  def cached(params, x, t, text, cache, chunk):
    v, cache = denoiser.cached(
      params, _twice(x), _twice(t), _twice(text), cache, chunk
    )
    return _mix(v, scale), cache

  def keep_chunk(params, x, t, text, cache, chunk):
    x = jnp.concatenate([x, noised(x, chunk)])
    t = jnp.concatenate([t, jnp.full_like(t, level)])
    return remember(denoiser, params, x, t, _twice(text), cache, chunk)

  return Denoiser(
    parallel, cached, _init_cache(denoiser), denoiser.chunk_frames, keep_chunk
  )
