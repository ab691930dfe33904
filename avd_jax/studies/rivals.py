"""Other people's attention, raced against ours where it is installed.

None of it is a dependency: what is not there is left out of the race.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from avd_jax.ops import chunked
from avd_jax.ops.masks import Sight


class Contender(NamedTuple):
  """Something that computes attention, for a race.

  Attributes:
    prepare: `(q, k, v, do) -> call`: brings arrays to where they are used.
    numpy: what a call returned, as out (, dq, dk, dv) in numpy.
    lower: `(q, k, v, do) -> compiled`, for its memory; None if unknown.
  """

  prepare: Callable[..., Callable[[], Any]]
  numpy: Callable[[Any], list[np.ndarray]]
  lower: Callable[..., Any] | None = None


def of_jax(function: Callable[..., Any]) -> Contender:
  """A function `(q, k, v, do) -> outputs` of JAX arrays, compiled."""
  compiled = jax.jit(function)
  return Contender(
    lambda *arrays: functools.partial(compiled, *arrays),
    lambda out: [np.asarray(z, np.float32) for z in jax.tree.leaves(out)],
    lambda *arrays: compiled.lower(*arrays).compile(),
  )


def others(sight: Sight, mode: str, tokens: int) -> dict[str, Contender]:
  """Dense contenders that this machine has installed."""
  found = {}
  if importlib.util.find_spec("tokamax"):
    found["tokamax"] = tokamax(sight, mode)
  if importlib.util.find_spec("torch"):
    import torch

    if torch.cuda.is_available():
      found["flex_attention"] = flex_attention(sight, mode, tokens)
  return found


def tokamax(sight: Sight, mode: str) -> Contender:
  """Per-chunk calls of tokamax, as ours of cuDNN are."""
  import tokamax as lib

  def product(q, k, v):
    out = lib.dot_product_attention(q, k, v)
    return out, jax.numpy.zeros(q.shape[:3])

  def forward(q, k, v):
    if mode == "decoding":  # the cache is full: every key is in sight
      return product(q, k, v)[0]
    return chunked.per_chunk(q, k, v, sight, product=product)[0]

  def backward(q, k, v, do):
    out, pull = jax.vjp(forward, q, k, v)
    return out, *pull(do)

  if mode == "decoding":
    return of_jax(lambda q, k, v, do: forward(q, k, v))
  return of_jax(backward)


def flex_attention(
  sight: Sight, mode: str, tokens: int, device: str = "cuda"
) -> Contender:
  """PyTorch's FlexAttention with a block mask of the same sight.

  Sequences are padded to its block of 128 inside. On a GPU it is compiled, and
  the call waits for the device before it returns.
  """
  import torch
  from torch.nn.attention import flex_attention as lib

  sees = np.asarray(sight.sees)
  table = torch.as_tensor(sees, device=device)
  q_tokens, k_tokens = (n * tokens for n in sees.shape)
  pad = lambda n: -(-n // 128) * 128

  # Lambdas: torch reads them, and could not through checked functions.
  last = [n - 1 for n in table.shape]
  chunk = lambda x, axis: torch.clamp(x // tokens, max=last[axis])
  visible = lambda b, h, q, k: table[chunk(q, 0), chunk(k, 1)] & (k < k_tokens)
  mask = lib.create_block_mask(
    visible, None, None, pad(q_tokens), pad(k_tokens), device=device
  )
  attend = lib.flex_attention
  if device == "cuda":
    attend = torch.compile(attend, dynamic=False)

  def load(x):
    """[b s a d] here to [b a s d] there, padded."""
    dtype = getattr(torch, str(x.dtype))
    y = torch.as_tensor(np.array(x, np.float32)).to(device, dtype)
    room = pad(x.shape[1]) - x.shape[1]
    return torch.nn.functional.pad(y.transpose(1, 2), (0, 0, 0, room))

  def prepare(*arrays):
    *leaves, do = (load(z) for z in arrays)
    for leaf in leaves:
      leaf.requires_grad_(mode == "training")

    def call():
      out = attend(*leaves, block_mask=mask)
      results = [out]
      if mode == "training":
        results += torch.autograd.grad(out, leaves, do)
      if device == "cuda":
        torch.cuda.synchronize()
      return results

    return call

  def numpy(results):
    lengths = (q_tokens, q_tokens, k_tokens, k_tokens)
    return [
      x.detach()[:, :, :n].transpose(1, 2).float().cpu().numpy()
      for x, n in zip(results, lengths, strict=False)
    ]

  return Contender(prepare, numpy)
