"""The one autoregressive loop.

Sampling starts it from noise, self-resampling from x_{t_s}, extension and
prefill from given chunks. Chunk after chunk, under `lax.scan`: solve down to
clean against the KV cache of what was made before, then run the finished
chunk through the network once more at t = 0, so that its keys and values are
those of a clean chunk.

A long video is made in segments: pass the returned cache and the next
`first_chunk` (traced, so one compilation serves every segment).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from avd_jax.diffusion import solvers
from avd_jax.diffusion.flow_matching import interpolate
from avd_jax.errors import UserError
from avd_jax.typing import Denoiser, Params, Text


def split_chunks(
  x: Float[Array, "b f *s"], chunk_frames: int
) -> Float[Array, "n b g *s"]:
  """[b f ...] to [n b chunk_frames ...], ready to scan over."""
  b, f = x.shape[:2]
  x = x.reshape(b, f // chunk_frames, chunk_frames, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)


def join_chunks(x: Float[Array, "n b g *s"]) -> Float[Array, "b f *s"]:
  """The inverse of `split_chunks`."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def remember(
  denoiser: Denoiser,
  params: Params,
  x: Float[Array, "b g h w c"],
  t: Float[Array, "b"],
  text: Text,
  cache: Any,
  chunk: Int[Array, ""],
) -> Any:
  """Takes a finished chunk into the cache, told to be at level t."""
  if denoiser.remember is not None:
    return denoiser.remember(params, x, t, text, cache, chunk)
  return denoiser.cached(params, x, t, text, cache, chunk)[1]


def as_context(
  x: Float[Array, "b g h w c"], key: Array, level: float
) -> Float[Array, "b g h w c"]:
  """A finished chunk as its successors see it: noised to a level."""
  if not level:
    return x
  # The chunk's solver has the first half of its key.
  noise = jax.random.normal(jax.random.split(key)[1], x.shape, x.dtype)
  return interpolate(x, noise, jnp.float32(level))


def _hold(
  x: Float[Array, "b g h w c"],
  known: tuple[Bool[Array, "g"], Float[Array, "b g h w c"]] | None,
  noise: Float[Array, "b g h w c"],
  t: Float[Array, "b"],
) -> Float[Array, "b g h w c"]:
  """A chunk with its known frames put at level t [b]."""
  if known is None:
    return x
  which, values = known
  return jnp.where(which[:, None, None, None], interpolate(values, noise, t), x)


def rollout(
  denoiser: Denoiser,
  params: Params,
  start: Float[Array, "b f h w c"],
  t_start: Float[Array, "b n"],
  text: Text,
  cache: Any,
  *,
  grid: Float[Array, "g"],
  solver: str = "euler",
  first_chunk: Int[Array, ""] | int = 0,
  keep: tuple[Bool[Array, "b n"], Float[Array, "b f h w c"]] | None = None,
  held: tuple[Bool[Array, "f"], Float[Array, "b f h w c"]] | None = None,
  told: Float[Array, "b n"] | None = None,
  context_noise: float = 0.0,
  keys: Array | None = None,
) -> tuple[Float[Array, "b f h w c"], Any]:
  """Makes chunks first_chunk, first_chunk + 1, ... one after another.

  Args:
    denoiser: the model.
    params: its parameters.
    start: where each chunk's ODE starts: noise, or x_{t_s}.
    t_start: the level of `start`.
    text: the condition.
    cache: holds the chunks before first_chunk.
    grid: levels from 1 to 0, as fractions of t_start (`solvers.time_grid`).
    solver: one of `solvers.SOLVERS`.
    first_chunk: absolute index of the first chunk in `start`.
    keep: (which, values): chunks that are given, not made.
    held: (which, values): frames that are known of chunks that are made, all of
      them from noise. Wherever the model looks, they are mixed with the noise
      that they start from to the level of the others; in the end they are
      clean (replacement conditioning).
    told: the level at which finished chunks enter the cache; 0 if None.
    context_noise: level to which a finished chunk is noised on its way into
      the cache; what is returned stays clean.
    keys: [n], of that noise and the solver's, one a chunk.

  Returns:
    (the chunks, the cache that now holds them).

  Raises:
    UserError: an unknown solver, or no keys where noise is drawn.

  [RF Eq. 1]
  """
  n = t_start.shape[1]
  split = lambda x: split_chunks(x, denoiser.chunk_frames)
  told = jnp.zeros_like(t_start) if told is None else told
  if context_noise and keys is None:
    raise UserError(f"context_noise {context_noise} is drawn: give keys")
  inputs = (
    first_chunk + jnp.arange(n),
    split(start),
    t_start.T,
    told.T,
    keys,
    None if keep is None else (keep[0].T, split(keep[1])),
    None if held is None else (held[0].reshape(n, -1), split(held[1])),
  )

  def chunk_step(cache, inputs):
    chunk, noise, t, told, key, kept, known = inputs
    solver_key = None if key is None else jax.random.split(key)[0]

    def call(x, t, cache):
      x = _hold(x, known, noise, t)
      return denoiser.cached(params, x, t, text, cache, chunk)

    x, cache = solvers.solve(call, noise, t, grid, cache, solver, solver_key)
    x = _hold(x, known, noise, jnp.zeros_like(t))
    if kept is not None:
      which, value = kept
      x = jnp.where(which.reshape(-1, *(1,) * (x.ndim - 1)), value, x)
    seen = x if key is None else as_context(x, key, context_noise)
    cache = remember(denoiser, params, seen, told, text, cache, chunk)
    return cache, x

  cache, x = jax.lax.scan(chunk_step, cache, inputs)
  return join_chunks(x), cache


def prefill(
  denoiser: Denoiser,
  params: Params,
  x: Float[Array, "b f h w c"],
  text: Text,
  cache: Any,
  *,
  first_chunk: Int[Array, ""] | int = 0,
  told: Float[Array, "b n"] | None = None,
) -> Any:
  """The cache after given chunks: one pass a chunk, nothing solved.

  Args:
    denoiser: the model.
    params: its parameters.
    x: the chunks.
    text: the condition.
    cache: holds the chunks before first_chunk.
    first_chunk: absolute index of the first chunk in `x`.
    told: the level at which each enters the cache; 0 if None.
  """

  def chunk_step(cache, inputs):
    chunk, x, t = inputs
    return remember(denoiser, params, x, t, text, cache, chunk), None

  chunks = split_chunks(x, denoiser.chunk_frames)
  index = first_chunk + jnp.arange(chunks.shape[0])
  told = jnp.zeros((x.shape[0], len(index))) if told is None else told
  return jax.lax.scan(chunk_step, cache, (index, chunks, told.T))[0]
