"""The glossary: dimension letters and the types that cross between rooms.

Letters, as they stand in every jaxtyping signature:

  b batch          f latent frames      n chunks         h w space
  c channels       s tokens             q k query / key tokens
  a heads          d head dim           m text tokens    l layers
  e model width

`t` is the noise level in [0, 1] (0 is clean, 1 is pure noise). The
autoregressive unit is a **chunk** of `chunk_frames` latent frames, so that
n = f / chunk_frames; the papers say "frame" for it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int, PyTree

Params = PyTree
Metrics = dict[str, jax.Array]
# Token ids of a byte-level conditioner, or embeddings made beforehand.
Text = Int[Array, "b m"] | Float[Array, "b m d"]
# The text of one video that says nothing; it stands in for dropped text.
NullText = Int[Array, "m"] | Float[Array, "m d"]


class Batch(NamedTuple):
  """What a training step eats.

  Attributes:
    x: clean videos or latents, [b f h w c]; pixels lie in [-1, 1].
    text: int32 [b m] byte tokens (0 pads) or [b m d] embeddings.
    given: int32 [b], first chunks of each video that are handed over as they
      are and take no loss, as BAgger's drifted prefix; None is 0 everywhere.
  """

  x: Any
  text: Any
  given: Any = None


class History(NamedTuple):
  """What chunk i is conditioned on: chunks before it, at their noise level.

  Attributes:
    x: [b f h w c], the chunks a model has (re-)made or was given.
    t: [b n], the level the model is told; 0 says clean.
    cache: keys and values of `x`, where a rollout already computed them. A
      denoiser then runs the noisy stream alone against the cache.
  """

  x: Float[Array, "b f h w c"]
  t: Float[Array, "b n"]
  cache: Any = None


class Denoiser(NamedTuple):
  """Two faces of one velocity field v_theta over a tree of parameters.

  Attributes:
    parallel: `(params, x, t, text, history) -> v`. All chunks at once under
      the training mask; `history=None` is the one-stream (block-causal) form.
    cached: `(params, x, t, text, cache, chunk) -> (v, cache)`. One chunk
      against the cache, whose slot for `chunk` it overwrites.
    init_cache: `(x, chunks, keep_all=False) -> cache` for videos of `chunks`
      chunks, `x` being one of them or its shape. Opaque to everyone but
      models/ and ops/. `keep_all` holds every chunk even where the mask's
      window would let a ring buffer forget.
    chunk_frames: latent frames in a chunk.
    remember: `(params, x, t, text, cache, chunk) -> cache`. Takes a finished
      chunk into the cache; None does it with `cached`.
  """

  parallel: Callable[..., jax.Array]
  cached: Callable[..., tuple[jax.Array, Any]]
  init_cache: Callable[..., Any]
  chunk_frames: int
  remember: Callable[..., Any] | None = None


class StepContext(NamedTuple):
  """What a loss may use besides weights, data and randomness.

  Attributes:
    ema: the averaged weights; None where there are none.
    memory: what objectives keep from step to step, by name.
    ramp: how far a curriculum has come, in [0, 1].
    given: the batch's; a history leaves these first chunks as they are.
  """

  ema: Params | None = None
  memory: Mapping[str, Any] = {}
  ramp: Float[Array, ""] | float = 1.0
  given: Int[Array, "b"] | None = None


@runtime_checkable
class HistoryFn(Protocol):
  """Makes the history a loss is conditioned on; see algorithms/histories."""

  def __call__(
    self,
    params: Params,
    x: jax.Array,
    text: Text,
    key: jax.Array,
    context: StepContext = StepContext(),
  ) -> History: ...


@runtime_checkable
class LossFn(Protocol):
  """`(params, batch, key, context) -> (loss, (metrics, memory))`.

  `memory` is the context's, with what this step adds to it.
  """

  def __call__(
    self,
    params: Params,
    batch: Batch,
    key: jax.Array,
    context: StepContext = StepContext(),
  ) -> tuple[jax.Array, tuple[Metrics, Mapping[str, Any]]]: ...
