"""Classifier-free guidance as a wrapper: a Denoiser in, a Denoiser out."""

import jax
import jax.numpy as jnp

from avd_jax.typing import Denoiser, NullText


def classifier_free(
  denoiser: Denoiser, scale: float, null_text: NullText
) -> Denoiser:
  """v_null + scale (v_text - v_null), each branch with its own cache.

  Both branches run as one batch of twice the size, so that a cached rollout
  stays one program; the doubled cache is the wrapper's own.

  Args:
    denoiser: a model trained with text dropout.
    scale: 1 is no guidance.
    null_text: the text that dropout trained, [m] or [m d].
  """
  twice = lambda z: jnp.concatenate([z, z])

  def texts(text):
    null = jnp.broadcast_to(null_text, text.shape).astype(text.dtype)
    return jnp.concatenate([text, null])

  def mix(v):
    with_text, without = jnp.split(v, 2)
    return without + scale * (with_text - without)

  def parallel(params, x, t, text, history=None):
    # A history that holds a cache was made by this wrapper: doubled already.
    keep = None if history is None else history.cache
    both = jax.tree.map(twice, history and history._replace(cache=None))
    both = both and both._replace(cache=keep)
    return mix(denoiser.parallel(params, twice(x), twice(t), texts(text), both))

  def cached(params, x, t, text, cache, chunk):
    v, cache = denoiser.cached(
      params, twice(x), twice(t), texts(text), cache, chunk
    )
    return mix(v), cache

  def init_cache(x, chunks, keep_all=False):
    x = jax.ShapeDtypeStruct((2 * x.shape[0], *x.shape[1:]), x.dtype)
    return denoiser.init_cache(x, chunks, keep_all)

  return Denoiser(parallel, cached, init_cache, denoiser.chunk_frames)
