"""The nearest frame that a scene could have drawn.

A scene shares out its pixels among layers, so for layers in given places the
best colours are a least-squares problem. The search is over the places: a grid,
then smaller and smaller steps. What the colours must be (a saturated hue, a
background in its range) is asked of the result.

Frames are lists of pixels [n p 3], RGB in [0, 1]; a scene has m layers whose
places are d numbers.
"""

import itertools
from typing import NamedTuple

import numpy as np

from avd_jax.data import scenes, worlds

# Distance of the first search's places, and how far beyond the scene's limits
# it goes. 0 for a number that is 0 or 1.
_SPACING = {
  "pan": (0.25,),
  "occluder": (0.6, 0.6),
  "pour": (0.25, 0.0),
  "ink": (1.0, 1.0, 0.3),
  "fall": (0.6, 0.6),
}
_BEYOND = {"ink": np.array([1.5, 1.5, 0.6])}
_STEPS = (0.5, 0.25, 0.12, 0.06, 0.03)
# Keeps the colour of a layer that covers nothing at 0.
_RIDGE = 1e-3
# Frames fitted at a time, for the cache's sake.
_BLOCK = 256


class Fit(NamedTuple):
  """A scene that is near to each of n frames.

  Attributes:
    geometry: [n d], where the layers are.
    colour: [n m 3], the layers' colours as seen: saturated or not.
    area: [n m], pixels that a layer covers.
    strength: [n m], contrast of a hue's layer to the background as a share of
      what it should be: about 1 where the object is there, 0 where it is not.
    off_manifold: [n], mean squared error, on the [-1, 1] scale, to the nearest
      frame found that the scene could draw.
    spare: [n], squared contrast (RGB) of one object more, as large as the
      second layer, where it would explain most of what is left beside it.
  """

  geometry: np.ndarray
  colour: np.ndarray
  area: np.ndarray
  strength: np.ndarray
  off_manifold: np.ndarray
  spare: np.ndarray


def saturate(colour: np.ndarray) -> np.ndarray:
  """Gives the nearest fully saturated colour, [... 3] -> [... 3]."""
  order = np.argsort(colour, axis=-1)
  middle = np.take_along_axis(colour, order[..., 1:2], -1)
  nearest = np.zeros_like(colour)
  np.put_along_axis(nearest, order[..., 2:], 1, -1)
  np.put_along_axis(nearest, order[..., 1:2], np.clip(middle, 0, 1), -1)
  return nearest


def _allowed(colour: np.ndarray, config: worlds.WorldConfig) -> np.ndarray:
  """Gives the nearest colours [... m 3] that the scene's layers can have."""
  rules = {
    "background": lambda c: np.clip(
      c, config.background_low, config.background_high
    ),
    "hue": saturate,
    "bar": lambda c: np.clip(c, *scenes.BAR),
    "glass": lambda c: np.full_like(c, scenes.GLASS),
  }
  paints = scenes.SCENES[config.kind].paints
  parts = [rules[p](colour[..., i, :]) for i, p in enumerate(paints)]
  return np.stack(parts, -2)


class _Search:
  """The search for one world's scenes."""

  def __init__(self, config: worlds.WorldConfig):
    self.config = config
    self.scene = scenes.SCENES[config.kind]
    self.legal = self.scene.limits(config)
    beyond = _BEYOND.get(config.kind, 0.0)
    self.low, self.high = self.legal[0] - beyond, self.legal[1] + beyond
    self.spacing = np.array(_SPACING[config.kind])
    axes = (
      np.linspace(low, high, 2 + int((high - low) / step) if step else 2)
      for low, high, step in zip(self.low, self.high, self.spacing, strict=True)
    )
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    self.grid = grid.reshape(-1, len(self.spacing))
    # Layers made orthonormal: what a frame has of them is what they explain.
    layers = self.layers(self.grid)
    gram = layers @ layers.swapaxes(-1, -2)
    root = np.linalg.cholesky(gram + _RIDGE * np.eye(gram.shape[-1]))
    self.object = layers[:, 1]
    self.basis = np.linalg.solve(root, layers).astype(np.float32)
    moves = ((-1, 0, 1) if step else (0,) for step in self.spacing)
    self.moves = np.array(list(itertools.product(*moves)))

  def layers(self, geometry: np.ndarray) -> np.ndarray:
    layers = self.scene.layers(self.config, geometry)
    return layers.reshape(*layers.shape[:-2], -1)

  def solve(self, frames, geometry):
    """Gives the best colours [n k m 3] at places [n k d], the error [n k]."""
    layers = self.layers(geometry)
    gram = layers @ layers.swapaxes(-1, -2)
    target = layers @ frames[:, None]
    colour = np.linalg.solve(gram + _RIDGE * np.eye(gram.shape[-1]), target)
    explained = (colour * (2 * target - gram @ colour)).sum((-1, -2))
    return colour, -explained

  def places(self, frames: np.ndarray) -> np.ndarray:
    """Gives the best places found, [n d], for colours of any kind."""
    n, pixels, _ = frames.shape
    flat = frames.swapaxes(1, 2).reshape(-1, pixels)
    shares = flat @ self.basis.reshape(-1, pixels).T
    explained = np.square(shares).reshape(n, 3, len(self.grid), -1)
    geometry = self.grid[explained.sum((1, 3)).argmax(1)]
    for step in _STEPS:
      around = geometry[:, None] + step * self.spacing * self.moves
      around = np.clip(around, self.low, self.high)
      _, error = self.solve(frames, around)
      geometry = around[np.arange(n), error.argmin(1)]
    return geometry

  def fit(self, frames: np.ndarray) -> Fit:
    best = self.describe(frames, self.places(frames))
    nothing = _nothing(self.config)
    if nothing is None:
      return best
    # A hidden ball or an empty glass is a frame too, and has no hue.
    other = self.describe(frames, np.tile(nothing, (len(frames), 1)))
    wins = other.off_manifold < best.off_manifold
    choose = lambda a, b: np.where(wins.reshape(-1, *[1] * (a.ndim - 1)), b, a)
    return Fit(*(choose(a, b) for a, b in zip(best, other, strict=True)))

  def describe(self, frames: np.ndarray, geometry: np.ndarray) -> Fit:
    colour = self.solve(frames, geometry[:, None])[0][:, 0]
    layers = self.layers(geometry)
    legal = np.clip(geometry, *self.legal)[:, None]
    drawn = _allowed(self.solve(frames, legal)[0][:, 0], self.config)
    image = self.layers(legal[:, 0]).swapaxes(1, 2) @ drawn
    wanted = drawn - drawn[:, :1]
    seen = colour - colour[:, :1]
    size = np.maximum(np.square(wanted).sum(-1), 1e-6)
    rest = frames - image
    off = 4 * np.square(rest).mean((1, 2))
    strength = (seen * wanted).sum(-1) / size
    spare = self.spare(rest * (1 - layers[:, 1, :, None]))
    return Fit(geometry, colour, layers.sum(-1), strength, off, spare)

  def spare(self, rest: np.ndarray) -> np.ndarray:
    n, pixels, _ = rest.shape
    share = rest.swapaxes(1, 2).reshape(-1, pixels) @ self.object.T
    size = np.square(self.object).sum(-1)
    explained = np.square(share).reshape(n, 3, -1).sum(1) / (size + 1)
    return explained.max(-1) / size.max()


def _nothing(config: worlds.WorldConfig) -> np.ndarray | None:
  """Gives the place at which a scene shows no object, if there is one."""
  middle = np.array([config.height, config.width]) / 2
  return {"occluder": middle, "pour": np.zeros(2)}.get(config.kind)


def fit(frames: np.ndarray, config: worlds.WorldConfig) -> Fit:
  """Finds a scene near each frame.

  Args:
    frames: float32 [n p 3] in [0, 1].
    config: the world; not of kind "balls" (see `manifold`).
  """
  search = _Search(config)
  blocks = [
    search.fit(frames[start : start + _BLOCK])
    for start in range(0, len(frames), _BLOCK)
  ]
  return Fit(*(np.concatenate(a) for a in zip(*blocks, strict=True)))
