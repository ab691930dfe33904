"""A denoiser that can be worked out by hand, and its float64 arithmetic.

  v^i = own x^i + past * sum_{j<i} 2^-(i-j) (1 - told^j / 2) h^j
      + level t^i + text * mean(c)

Every input matters, nearer chunks matter more, and so does the level at which
a history chunk was told: what a rollout feeds to its model can be read off.
"""

import jax.numpy as jnp
import numpy as np

from avd_jax.diffusion import rollout
from avd_jax.typing import Denoiser

PARAMS = {"own": 0.4, "past": -0.7, "level": 0.3, "text": 0.02}


def params(**changes):
  """The parameters as jax arrays."""
  return {k: jnp.float32(v) for k, v in (PARAMS | changes).items()}


def _weights(query, key):
  """2^-(i-j) where j < i, else 0."""
  distance = query - key
  return jnp.where(distance > 0, 2.0 ** -jnp.maximum(distance, 0), 0.0)


def _said(text):
  text = text.astype(jnp.float32)
  return jnp.mean(text.reshape(text.shape[0], -1), 1)


def _velocity(params, x, past, t, text):
  """For one chunk or a stack of them: t and text carry x's leading dims."""
  spread = lambda z: z.reshape(z.shape + (1,) * (x.ndim - z.ndim))
  return (
    params["own"] * x
    + params["past"] * past
    + params["level"] * spread(t)
    + params["text"] * spread(text)
  )


def denoiser(chunk_frames: int = 1) -> Denoiser:
  """The two faces; the cache is (chunks [n b g h w c], their levels [n b])."""

  def parallel(params, x, t, text, history=None):
    z = rollout.split_chunks(x, chunk_frames)
    if history is None:
      chunks, levels = z, t.T
    elif history.cache is None:
      chunks = rollout.split_chunks(history.x, chunk_frames)
      levels = history.t.T
    else:
      chunks, levels = history.cache
    weight = _weights(jnp.arange(len(z))[:, None], jnp.arange(len(chunks)))
    past = jnp.einsum("nk,kb,kbghwc->nbghwc", weight, 1 - levels / 2, chunks)
    said = jnp.broadcast_to(_said(text), t.T.shape)
    return rollout.join_chunks(_velocity(params, z, past, t.T, said))

  def cached(params, x, t, text, cache, chunk):
    chunks, levels = cache[0].at[chunk].set(x), cache[1].at[chunk].set(t)
    weight = _weights(chunk, jnp.arange(len(chunks)))
    past = jnp.einsum("k,kb,kbghwc->bghwc", weight, 1 - levels / 2, chunks)
    return _velocity(params, x, past, t, _said(text)), (chunks, levels)

  def init_cache(x, chunks, keep_all=False):
    del keep_all
    return jnp.zeros((chunks, *x.shape)), jnp.zeros((chunks, x.shape[0]))

  return Denoiser(parallel, cached, init_cache, chunk_frames)


def velocity(x, t, past, text, changes=None):
  """The same in float64, for a chunk [b ...] given (chunk, told [b]) pairs."""
  p = PARAMS | (changes or {})
  spread = lambda z: np.asarray(z, np.float64).reshape(
    (-1,) + (1,) * (x.ndim - 1)
  )
  out = p["own"] * x + p["level"] * spread(t)
  out = out + p["text"] * spread(
    np.asarray(text, np.float64).reshape(len(x), -1).mean(1)
  )
  for j, (h, told) in enumerate(past):
    out = out + p["past"] * 0.5 ** (len(past) - j) * (1 - spread(told) / 2) * h
  return out


def batch(b=2, f=6, seed=0):
  """A small video [b f 1 2 3] and int32 text [b 4]."""
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.normal(size=(b, f, 1, 2, 3)), jnp.float32)
  return x, jnp.asarray(rng.integers(0, 9, (b, 4)), jnp.int32)
