"""The front door of attention: mask structure in, (out, lse) out.

`attend` takes a `Sight` (which chunk sees which) and, where history is routed,
a `Routing`, and hands both to one of the implementations below: the one that
is named, or the one that `choose` picks from platform, shapes and mask, with
its reason. What an implementation cannot do it refuses by name; nothing falls
back in silence.

| name | what | where |
|---|---|---|
| reference | one masked product, the definition | anywhere, small |
| xla | per-chunk products, a loop over slots, grouped routing | anywhere |
| cudnn | per-chunk calls of cuDNN's flash attention | GPU |
| triton | our kernels: key ranges, routed tiles | GPU |
| splash | JAX's splash attention: a mask computed inside, or slots | TPU |
| tpu | our routed kernel | TPU |
"""

import dataclasses
import functools
import importlib
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from avd_jax.errors import UserError
from avd_jax.ops import cudnn, per_device
from avd_jax.ops import routing as routing_lib
from avd_jax.ops.masks import Sight
from avd_jax.ops.problem import Problem, describe
from avd_jax.ops.reference import reference
from avd_jax.ops.routing import Routing

# What a program will run on: a platform ("cpu", "gpu", "tpu"), a mesh, or None,
# which asks JAX for its default backend.
Place = str | Mesh | None

IMPLEMENTATIONS = ("reference", "xla", "cudnn", "triton", "splash", "tpu")

# Those that XLA cannot split over a mesh by itself.
KERNELS = ("triton", "splash", "tpu")

# Logits up to which one masked product beats several smaller ones on a CPU:
# `avd bench attention` shows where they cross.
SMALL = 2**16
# Bytes of keys and values that per-chunk calls may copy for their backward
# pass before the range kernel, which copies none, is worth its lower rate.
COPIES = 4 * 2**30
# Plain JAX groups queries by the chunk they chose when chunks have this many
# tokens; a decoded chunk's few queries, spread over a long history, fill no
# groups: each then fetches its own choice.
GROUPED = 64
FETCHED, CROWD = 64, 8


def platform_of(place: Place) -> str:
  """The platform of a place."""
  if isinstance(place, Mesh):
    return place.devices.flat[0].platform
  return place or jax.default_backend()


def capability_of(place: Place) -> float | None:
  """The compute capability of a mesh of CUDA GPUs, if it is one."""
  if not isinstance(place, Mesh):
    return None
  said = getattr(place.devices.flat[0], "compute_capability", None)
  return float(said) if said else None


class Choice(NamedTuple):
  """An implementation and why it was taken.

  Attributes:
    name: one of IMPLEMENTATIONS.
    reason: why.
    slow: whether an accelerator must do without a kernel at a size where
      that shows.
  """

  name: str
  reason: str
  slow: bool = False


def _module(problem: Problem, name: str) -> Any:
  """Where an implementation of this problem lives; imported when asked for."""
  routed = problem.top_k is not None
  holes = not problem.static and not problem.prefix
  path = {
    "reference": "masked",
    "xla": "kernels.grouped" if routed and _grouped(problem) else "chunked",
    "cudnn": "cudnn",
    "triton": f"kernels.triton_{'routed' if routed or holes else 'ranges'}",
    "splash": "kernels.splash",
    "tpu": "kernels.tpu_routed",
  }[name]
  return importlib.import_module(f"avd_jax.ops.{path}")


def _grouped(problem: Problem) -> bool:
  """Whether plain JAX groups queries by choice instead of masking."""
  if problem.tokens < GROUPED:
    return False
  crowd = problem.tokens * problem.top_k / problem.columns
  return problem.static or problem.tokens > FETCHED or crowd >= CROWD


def _logits(problem: Problem) -> int:
  return problem.rows * problem.columns * problem.tokens**2


def _copies(problem: Problem) -> int:
  """Bytes that per-chunk calls keep of keys and values for the backward."""
  if not problem.static:
    return 0
  size = 4 if problem.dtype == "float32" else 2
  row = problem.heads * problem.head_dim * problem.tokens * problem.batch
  return 2 * problem.pairs * row * size


def refusals(problem: Problem) -> dict[str, str | None]:
  """Why each implementation cannot do a problem; None where it can."""
  return {
    name: _module(problem, name).refuses(problem) for name in IMPLEMENTATIONS
  }


def choose(problem: Problem, implementation: str = "auto") -> Choice:
  """The implementation for a problem, and why.

  Args:
    problem: what is asked.
    implementation: "auto", or one of IMPLEMENTATIONS.

  Raises:
    UserError: an unknown name, or an implementation that refuses.
  """
  if implementation != "auto":
    if implementation not in IMPLEMENTATIONS:
      raise UserError(
        f"model.attention.implementation {implementation!r} is not one of"
        f" auto, {', '.join(IMPLEMENTATIONS)}"
      )
    reason = _module(problem, implementation).refuses(problem)
    if reason is not None:
      able = [name for name, no in refusals(problem).items() if no is None]
      raise UserError(
        f"model.attention.implementation {implementation!r}: {reason};"
        f" able here: {', '.join(able)} (or 'auto')"
      )
    return Choice(implementation, "asked for by name")
  refused = []
  for name, reason in _preferences(problem):
    no = _module(problem, name).refuses(problem)
    if no is None:
      return Choice(name, reason)
    refused.append(f"{name}: {no}")
  small = _logits(problem) <= SMALL
  return Choice(
    "reference" if small else "xla",
    f"plain JAX, since no kernel fits: {'; '.join(refused)}",
    slow=not small,
  )


def _preferences(problem: Problem) -> list[tuple[str, str]]:
  """(name, reason), best first, of what would be fast on this platform."""
  routed = problem.top_k is not None
  if problem.platform == "cpu":
    if _logits(problem) <= SMALL:
      return [("reference", "so small that one masked product is fastest")]
    if routed and _grouped(problem):
      return [("xla", "queries grouped by the chunk they chose")]
    if routed and not problem.static:
      return [("xla", "each query fetches its choice: flat in the history")]
    return [("xla", "a product per chunk: the mask's work and no more")]
  if problem.platform == "tpu":
    if routed:
      return [("tpu", "our kernel: queries grouped by the chunk they chose")]
    skips = "skips blocks by a mask computed inside the kernel"
    slots = "a kernel's call for each chunk of the cache that is seen"
    return [
      ("splash", skips if problem.static else slots),
      ("tpu", "our kernel, every chunk in sight chosen"),
    ]
  if routed:
    return [("triton", "our kernels: queries grouped by the chunk they chose")]
  dense = [
    ("cudnn", "per-chunk calls of cuDNN do the mask's work and no more"),
    ("triton", "one kernel over ranges of keys, nothing copied or masked"),
  ]
  return dense[::-1] if _copies(problem) > COPIES else dense


def explain(problem: Problem) -> list[tuple[str, str]]:
  """(implementation, verdict) for each, the chosen one marked as such."""
  picked = choose(problem)
  lines = []
  for name, no in refusals(problem).items():
    verdict = "could" if no is None else f"cannot: {no}"
    if name == picked.name:
      verdict = f"chosen: {picked.reason}"
    lines.append((name, verdict))
  return lines


def attend(
  q: Float[Array, "b *q a d"],
  k: Float[Array, "b *k a d"],
  v: Float[Array, "b *k a d"],
  sight: Sight,
  *,
  routing: Routing | None = None,
  q_sink: Float[Array, "b *q a d"] | None = None,
  implementation: str = "auto",
  place: Place = None,
) -> tuple[Float[Array, "b *q a d"], Float[Array, "b *q a"]]:
  """One softmax over what each query sees: its own chunk and its history.

  Args:
    q: queries, sight.tokens for each row of the sight; [b q a d], or by chunk
      [b n s a d], which is what a mesh can cut along tokens.
    k: keys, sight.tokens for each column.
    v: values.
    sight: which chunk sees which.
    routing: restricts each query to its own chunk and the chunks of history
      that it chooses; None attends to all that is seen.
    q_sink: queries to the sight's sink columns, where those are met at another
      rotary distance.
    implementation: "auto", or one of IMPLEMENTATIONS.
    place: what the program will run on. On a mesh of several devices, kernels
      run per device, over its share of videos, tokens and heads.

  Returns:
    (out, of q's shape, and lse, float32, without the last axis).

  Raises:
    UserError: an implementation that cannot do this, with the reason.
  [RF Eq. 9]
  """
  if routing and routing.top_k >= routing_lib.most_candidates(sight):
    routing = None  # all in sight is chosen: dense attention
  top_k, shape = None if routing is None else routing.top_k, q.shape
  problem = describe(
    platform_of(place),
    q,
    k,
    sight,
    top_k,
    q_sink is not None,
    capability_of(place),
  )
  several = isinstance(place, Mesh) and place.size > 1
  picked = choose(share(problem, place), implementation)
  if picked.slow:
    warnings.warn(f"attention falls back to {picked.reason}", stacklevel=2)
  module = _module(share(problem, place), picked.name)
  if routing is None and module.__name__.endswith("_routed"):
    routing = routing_lib.everything(_flat(q), sight)
  opaque = picked.name in KERNELS or (
    # What XLA would split, but by gathering every device's queries.
    picked.name == "xla"
    and routing is not None
    and _divides(place, q, sight.tokens)
  )
  call, given = module.attend, (q, k, v, sight, routing, q_sink)
  if several and (opaque or place.shape["context"] > 1):
    return per_device.attend(call, place, *given)
  if routing is not None:
    routing = routing._replace(q=_flat(routing.q))
  q, k, v, q_sink = map(_flat, (q, k, v, q_sink))
  out, lse = call(q, k, v, sight, routing=routing, q_sink=q_sink)
  return out.reshape(shape), lse.reshape(shape[:-1])


def _flat(x):
  return None if x is None else x.reshape(x.shape[0], -1, *x.shape[-2:])


def _divides(place: Place, q: jax.Array, tokens: int) -> bool:
  several = isinstance(place, Mesh)
  return several and per_device.divides(place, len(q), tokens, q.shape[-2])


def share(problem: Problem, place: Place) -> Problem:
  """A device's part of a problem; all of it where there is no mesh."""
  if not isinstance(place, Mesh) or place.size == 1:
    return problem
  videos, context, heads = per_device.shards(place)
  # Where `per_device.attend` gathers keys.
  gathered = context if problem.static and problem.top_k is None else 1
  return dataclasses.replace(
    problem,
    batch=max(1, problem.batch // videos),
    columns=problem.columns * gathered,
    pairs=problem.pairs * gathered,
    parts=gathered,
    tokens=max(1, problem.tokens // context),
    heads=max(1, problem.heads // heads),
  )


# Queries that attention to everything takes at a time where no kernel keeps
# its logits out of memory.
BLOCK = 4096


def attend_all(
  q: Float[Array, "b *q a d"],
  k: Float[Array, "b m a d"],
  v: Float[Array, "b m a d"],
  place: Place = None,
) -> Float[Array, "b *q a d"]:
  """Attention of every query to every key, such as to text.

  cuDNN's where it can; else plain JAX, a block of queries at a time, so that
  the logits of a long video never exist all at once. Queries by chunk may be
  cut along tokens, as `attend` takes them.
  """
  call = functools.partial(_attend_all, platform=platform_of(place))
  if isinstance(place, Mesh) and place.shape["context"] > 1:
    return per_device.attend_all(call, place, q, k, v)
  return call(q, k, v)


def _attend_all(q, k, v, platform):
  shape, q = q.shape, _flat(q)
  sight = Sight(np.ones((1, 1), bool), np.zeros(1, np.int32), q.shape[1], 1)
  problem = describe(platform, q, k, sight)
  if problem.platform == "gpu" and cudnn.refuses(problem) is None:
    out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return out.reshape(shape)
  length, blocks = q.shape[1], -(-q.shape[1] // BLOCK)
  if blocks == 1:
    return reference(q, k, v)[0].reshape(shape)
  size = -(-length // blocks)
  room = ((0, 0), (0, blocks * size - length), (0, 0), (0, 0))
  cut = jnp.pad(q, room).reshape(q.shape[0], blocks, size, *q.shape[2:])
  product = jax.checkpoint(lambda q: reference(q, k, v)[0])
  out = jax.lax.map(product, cut.swapaxes(0, 1)).swapaxes(0, 1)
  return out.reshape(q.shape[0], -1, *q.shape[2:])[:, :length].reshape(shape)
