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
  told: Float[Array, "b n"] | None = None,
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
    solver: "euler" or "heun".
    first_chunk: absolute index of the first chunk in `start`.
    keep: (which, values): chunks that are given, not made.
    told: the level at which finished chunks enter the cache; 0 if None.

  Returns:
    (the chunks, the cache that now holds them). [RF Eq. 1]
  """
  n = t_start.shape[1]
  split = lambda x: split_chunks(x, denoiser.chunk_frames)
  told = jnp.zeros_like(t_start) if told is None else told
  inputs = (
    first_chunk + jnp.arange(n),
    split(start),
    t_start.T,
    told.T,
    None if keep is None else (keep[0].T, split(keep[1])),
  )

  def chunk_step(cache, inputs):
    chunk, x, t, told, kept = inputs
    call = lambda x, t, cache: denoiser.cached(params, x, t, text, cache, chunk)
    x, cache = solvers.solve(call, x, t, grid, cache, solver)
    if kept is not None:
      which, value = kept
      x = jnp.where(which.reshape(-1, *(1,) * (x.ndim - 1)), value, x)
    _, cache = call(x, told, cache)
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
) -> Any:
  """The cache after given chunks: one clean pass a chunk, nothing solved."""

  def chunk_step(cache, inputs):
    chunk, x = inputs
    t = jnp.zeros(x.shape[0])
    return denoiser.cached(params, x, t, text, cache, chunk)[1], None

  chunks = split_chunks(x, denoiser.chunk_frames)
  index = first_chunk + jnp.arange(chunks.shape[0])
  return jax.lax.scan(chunk_step, cache, (index, chunks))[0]
