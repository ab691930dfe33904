"""How a tensor of a Wan file is called, and how it becomes one of ours.

A module's tensors are a list of `Tensor`, made by `dit_names`, `vae_names` and
`umt5_names` from its config; reading, writing and making files are then loops
over such a list (`importing.py`, `exporting.py`, `tiny.py`).
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

Turn = tuple[
  Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]
]


def _swap(x):
  return np.swapaxes(x, 0, 1)


def _to_conv(x):
  return np.moveaxis(x, (0, 1), (-1, -2))


def _from_conv(x):
  return np.moveaxis(x, (-1, -2), (0, 1))


# From a file's layout to ours, and back; all of them views.
TURNS: Mapping[str, Turn] = {
  "same": (lambda x: x, lambda x: x),
  # A torch Linear is [out, in], a Flax kernel [in, out].
  "linear": (_swap, _swap),
  # A torch convolution is [out, in, ...], a Flax kernel [..., in, out].
  "conv": (_to_conv, _from_conv),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a file, and its place in our parameters.

  Attributes:
    path: of the leaf in our tree, "blocks/q/kernel".
    layer: its index along the leaf's first axis, where layers are stacked;
      None for a leaf of its own.
    original: its name in the original repository's file.
    diffusers: its name in the diffusers (or transformers) layout.
    shape: in the file.
    turn: of TURNS: how the file's layout becomes ours.
    reshape: shape of ours (of one layer), where `turn` alone does not give it;
      applied after it.
  """

  path: str
  layer: int | None
  original: str
  diffusers: str
  shape: tuple[int, ...]
  turn: str = "same"
  reshape: tuple[int, ...] | None = None

  def ours(self, x: np.ndarray) -> np.ndarray:
    """The file's tensor as (a layer of) our leaf."""
    x = TURNS[self.turn][0](x)
    return x if self.reshape is None else x.reshape(self.reshape)

  def theirs(self, x: np.ndarray) -> np.ndarray:
    """(A layer of) our leaf as the file's tensor."""
    forward, back = TURNS[self.turn]
    if self.reshape is not None:
      x = x.reshape(forward(np.broadcast_to(x.flat[0], self.shape)).shape)
    return back(x)
