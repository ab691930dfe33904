"""The nearest frame a world could have drawn.

How far a generated frame lies from everything its world can draw says how
broken it is, whatever the ball has done in the meantime. The search is over
the background (clipped to its range), and over centre, hue and depth of each
ball. The number of balls is fixed: a frame that lost its ball is compared with
frames that have one, and so is off the manifold.

Colours are RGB in [0, 1] here and frames are lists of pixels, [n p 3].
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from avd_jax.data import worlds

# Spacing of the first search, in radii, and the steps of the later ones.
_GRID = 0.3
_STEPS = (0.1, 0.033, 0.011)
# Two balls in one place look like one. Without a distance between them, a ball
# that vanished would be explained as hidden behind another, at no cost.
_CLOSEST = 0.5
# Frames fitted at a time: keeps the [n, grid] scores in the cache.
_BLOCK = 512


class Fit(NamedTuple):
  """A renderable frame for each of n frames; balls are in depth order.

  Attributes:
    background: [n 3], as seen: not clipped to the world's range.
    drawn_background: [n 3], clipped.
    position: [n k 2] centres (y, x) in pixels.
    colour: [n k 3], fully saturated.
    share: [n k p], the share of each pixel that a ball covers.
    spare: [n], the squared error that one ball more, behind the others, would
      take away; below 0 where any would add to it.
  """

  background: np.ndarray
  drawn_background: np.ndarray
  position: np.ndarray
  colour: np.ndarray
  share: np.ndarray
  spare: np.ndarray


def background_of(frames: np.ndarray, contrast: float) -> np.ndarray:
  """Gives the background colour of each frame: a median, twice.

  The second one leaves out the pixels further than `contrast` from the first,
  so that large balls, all brighter in a channel, do not pull it.

  Args:
    frames: [n p 3] in [0, 1].
    contrast: RGB distance between a ball and the background.

  Returns:
    [n 3]; exact where the background is one colour.
  """
  median = np.median(frames, axis=1)
  far = np.linalg.norm(frames - median[:, None], axis=-1) > contrast
  # Sorting what is left out to the end is much faster than np.nanmedian.
  ordered = np.sort(np.where(far[..., None], np.inf, frames), axis=1)
  middle = np.maximum((~far).sum(1) - 1, 0) // 2
  inner = ordered[np.arange(len(frames)), middle]
  return np.where(np.isfinite(inner), inner, median)


def coverage(config: worlds.WorldConfig, position: np.ndarray) -> np.ndarray:
  """Gives the share [... p] of each pixel that a ball at [... 2] covers."""
  black, white = np.zeros(3), np.ones((1, 3))
  drawn = worlds.render(config, position[..., None, :], white, black)
  return (drawn[..., 0].reshape(*position.shape[:-1], -1) + 1) / 2


def composite(
  background: np.ndarray, share: np.ndarray, colour: np.ndarray
) -> np.ndarray:
  """Paints balls [n k p], [n k 3] on a background [n 3], the last in front."""
  pixels = share.shape[-1]
  image = np.repeat(background[:, None], pixels, axis=1)
  for i in range(share.shape[1]):
    image += share[:, i, :, None] * (colour[:, i, None] - image)
  return image


def visible(share: np.ndarray) -> np.ndarray:
  """Gives the share [n k p] of each pixel in which a ball is seen."""
  seen = np.array(share)
  clear = np.ones_like(share[:, 0])
  for i in reversed(range(share.shape[1])):
    seen[:, i] *= clear
    clear = clear * (1 - share[:, i])
  return seen


class _Slot(NamedTuple):
  """Sums that score any ball put between the others of its frame.

  With T = D + A a B (what is left to explain by a ball of coverage a, seen
  through A, over the image B behind it), the error of a colour c is
  |T|^2 - (2 c . sum(A a T) - |c|^2 sum(A^2 a^2)): linear in a and a^2.
  """

  constant: np.ndarray  # [n]
  linear: np.ndarray  # [n 4 p]
  square: np.ndarray  # [n 5 p]


def _slot(frames, background, behind, front) -> _Slot:
  below = composite(background, *behind)
  above = composite(np.zeros_like(background), *front)
  clear = np.prod(1 - front[0], axis=1)[..., None]
  rest = frames - above - clear * below
  parts = lambda *maps: np.concatenate(maps, -1).swapaxes(1, 2)
  linear = parts(
    2 * (clear * below * rest).sum(-1, keepdims=True), clear * rest
  )
  clear = clear**2
  square = parts(
    (clear * below**2).sum(-1, keepdims=True), clear * below, clear
  )
  return _Slot(np.square(rest).sum((1, 2)), linear, square)


def _sums(maps: np.ndarray, share: np.ndarray) -> np.ndarray:
  if share.ndim == 3:
    return maps @ share
  # One large product: numpy would make n small ones of it, three times slower.
  n, kinds, pixels = maps.shape
  return (maps.reshape(-1, pixels) @ share).reshape(n, kinds, -1)


def _score(slot: _Slot, share: np.ndarray) -> tuple[np.ndarray, ...]:
  """Scores coverages [(n) p g], each in its best saturated colour.

  The saturated colour nearest to a colour has its largest channel at 1, its
  smallest at 0 and the middle one as it is: no search over hues.

  Returns:
    Squared error [n g] and the sums [n 3 g], [n g] that give the colour.
  """
  linear, square = _sums(slot.linear, share), _sums(slot.square, share**2)
  paint, weight = linear[:, 1:] + square[:, 1:4], square[:, 4]
  high, low = paint.max(1), paint.min(1)
  middle = paint.sum(1) - high - low
  tau = np.clip(middle / np.maximum(weight, 1e-6), 0, 1)
  gain = 2 * high - weight + tau * (2 * middle - weight * tau)
  error = slot.constant[:, None] + linear[:, 0] + square[:, 0] - gain
  return error, paint, weight


def _saturated(paint: np.ndarray, weight: np.ndarray) -> np.ndarray:
  """Gives the colour [n 3] that `_score` scored, from its sums [n 3], [n]."""
  order = np.argsort(paint, axis=1)
  rows = np.arange(len(paint))
  colour = np.zeros_like(paint)
  colour[rows, order[:, 2]] = 1
  middle = paint[rows, order[:, 1]] / np.maximum(weight, 1e-6)
  colour[rows, order[:, 1]] = np.clip(middle, 0, 1)
  return colour


class _Balls(NamedTuple):
  position: np.ndarray  # [n k 2]
  colour: np.ndarray  # [n k 3]
  share: np.ndarray  # [n k p]

  def part(self, index) -> tuple[np.ndarray, np.ndarray]:
    return self.share[:, index], self.colour[:, index]

  def insert(self, depth: int, position, colour, share) -> "_Balls":
    return _Balls(
      np.insert(self.position, depth, position, 1),
      np.insert(self.colour, depth, colour, 1),
      np.insert(self.share, depth, share, 1),
    )

  def drop(self, index: int) -> "_Balls":
    return _Balls(*(np.delete(a, index, 1) for a in self))


class _Search:
  """The search in one block of frames."""

  def __init__(self, frames, background, closest, config):
    self.frames, self.background = frames, background
    self.closest = closest
    self.config = dataclasses.replace(config, num_balls=1)
    self.low = np.float32(config.radius)
    self.high = np.array([config.height, config.width], np.float32) - self.low
    # The walls belong to the grid: balls are often there.
    spacing = _GRID * config.radius
    axes = (
      np.linspace(self.low, high, 1 + int(np.ceil((high - self.low) / spacing)))
      for high in self.high
    )
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    self.grid = grid.reshape(-1, 2).astype(np.float32)
    self.grid_share = coverage(self.config, self.grid)

  def error(self, balls: _Balls) -> np.ndarray:
    image = composite(self.background, balls.share, balls.colour)
    return np.square(self.frames - image).sum((1, 2))

  def place(self, others: _Balls, depth: int, near=None, step=0.0):
    """Finds the best place of one ball between others; (error, ball).

    Without `near` the whole frame is searched, else that place [n 2] and
    eight at `step` radii around it.
    """
    slot = _slot(
      self.frames,
      self.background,
      others.part(slice(None, depth)),
      others.part(slice(depth, None)),
    )
    if near is None:
      places, share = self.grid[None], self.grid_share.T
    else:
      around = np.mgrid[-1:2, -1:2].reshape(2, -1).T
      around = np.float32(step * self.config.radius) * around
      places = np.clip(near[:, None] + around, self.low, self.high)
      share = coverage(self.config, places).swapaxes(1, 2)
    error, paint, weight = _score(slot, share)
    for i in range(others.position.shape[1]):
      away = np.linalg.norm(places - others.position[:, i, None], axis=-1)
      error = np.where(away < self.closest[:, None] - 1e-4, np.inf, error)
    best, rows = error.argmin(1), np.arange(len(error))
    if near is None:
      position, share = self.grid[best], self.grid_share[best]
    else:
      position, share = places[rows, best], share[rows, :, best]
    colour = _saturated(paint[rows, :, best], weight[rows, best])
    return error[rows, best], (position, colour, share)

  def first(self, count: int) -> _Balls:
    """Places balls one by one, each where and at the depth it helps most."""
    n, pixels, _ = self.frames.shape
    balls = _Balls(*(np.zeros((n, 0, d), np.float32) for d in (2, 3, pixels)))
    for placed in range(count):
      error, best = np.full(n, np.inf), balls
      for depth in range(placed + 1):
        new_error, ball = self.place(balls, depth)
        new = balls.insert(depth, *ball)
        if depth == 0:
          error, best = new_error, new
        else:
          error, best = _better((error, best), (new_error, new))
      balls = best
    return balls

  def refine(self, error: np.ndarray, balls: _Balls, steps) -> tuple:
    """Moves one ball at a time; None as a step searches the whole frame."""
    for step in steps:
      for i in range(balls.position.shape[1]):
        others, near = balls.drop(i), balls.position[:, i]
        where = (None, 0.0) if step is None else (near, step)
        new_error, ball = self.place(others, i, *where)
        new = others.insert(i, *ball)
        error, balls = _better((error, balls), (new_error, new))
    return error, balls


def _better(old: tuple, new: tuple) -> tuple[np.ndarray, _Balls]:
  """Takes, frame by frame, the lower error and its balls."""
  wins = new[0] < old[0]
  pairs = zip(old[1], new[1], strict=True)
  balls = (np.where(wins[:, None, None], b, a) for a, b in pairs)
  return np.where(wins, new[0], old[0]), _Balls(*balls)


def _distance(position: np.ndarray) -> np.ndarray:
  """Gives the smallest distance between any two of [n k 2]; inf for one."""
  apart = np.linalg.norm(position[:, :, None] - position[:, None], axis=-1)
  apart[:, *np.diag_indices(position.shape[1])] = np.inf
  return apart.min((1, 2))


def fit(
  frames: np.ndarray,
  truth_position: np.ndarray,
  truth_colour: np.ndarray,
  config: worlds.WorldConfig,
  contrast: float,
) -> Fit:
  """Finds a renderable frame near each frame.

  The truth of a frame is where the search starts if that is better than what
  the search finds: balls that hide each other can only be found so.

  Args:
    frames: float32 [n p 3] in [0, 1].
    truth_position: [n k 2].
    truth_colour: [n k 3].
    config: the world.
    contrast: RGB distance between a ball and the background.
  """
  blocks = []
  for start in range(0, len(frames), _BLOCK):
    part = slice(start, start + _BLOCK)
    truth = np.asarray(truth_position[part], np.float32)
    background = background_of(frames[part], contrast)
    drawn = np.clip(background, config.background_low, config.background_high)
    closest = np.minimum(_CLOSEST * config.radius, _distance(truth))
    search = _Search(frames[part], drawn, closest, config)
    colour = np.asarray(truth_colour[part], np.float32)
    known = _Balls(truth, colour, coverage(search.config, truth))
    balls = search.first(config.num_balls)
    state = search.error(balls), balls
    if config.num_balls > 1:
      state = search.refine(*state, steps=(None,))
    state = _better(state, (search.error(known), known))
    error, balls = search.refine(*state, steps=_STEPS)
    # What the truth hides does not excuse a ball too many.
    search.closest = np.full_like(closest, _CLOSEST * config.radius)
    spare = error - search.place(balls, 0)[0]
    blocks.append((background, drawn, *balls, spare))
  return Fit(*(np.concatenate(a) for a in zip(*blocks, strict=True)))
