"""Whether the balls of a generated frame are still the balls of its world.

Everything here reads a frame through its fit, `manifold.Fit`: n frames, k
balls in depth order, p pixels; colours are RGB in [0, 1].
"""

import itertools

import numpy as np
from scipy import ndimage

from avd_jax.data import worlds
from avd_jax.evaluation import manifold

# RGB distance above which a pixel is not background.
CONTRAST = 0.3
# Foreground, in areas of the fitted balls, that still is those balls.
_AREA = (0.5, 1.75)
# What is not a ball of the fit is an object from this share of a ball: of its
# area if it lies apart, else of what a ball changes in the image. Blur, noise
# and fading stay below .05; a second ball two radii away is above .3.
_EXTRA = 0.25
# A ball of which less than this share shows is hidden, not missing.
_HIDDEN = 0.1


def shown(config: worlds.WorldConfig, true_position: np.ndarray) -> np.ndarray:
  """Says [n k] which balls at [n k 2] show; one behind another may not."""
  share = manifold.coverage(config, true_position)
  return manifold.visible(share).sum(-1) >= _HIDDEN * share.sum(-1)


def present(frames: np.ndarray, fit: manifold.Fit) -> np.ndarray:
  """Says which fitted balls are really there.

  They are the ones of the subset that the frame is nearest to: at half its
  contrast or half its area a ball stops to be there. Counting patches instead
  would lose every pair of balls that touch.

  Args:
    frames: [n p 3].
    fit: of the frames.

  Returns:
    bool [n k].
  """
  k = fit.position.shape[1]
  subsets = np.array(list(itertools.product((True, False), repeat=k)))
  images = (
    manifold.composite(
      fit.drawn_background, fit.share * subset[:, None], fit.colour
    )
    for subset in subsets
  )
  errors = [np.square(frames - image).sum((1, 2)) for image in images]
  return subsets[np.argmin(errors, axis=0)]


def intact(
  frames: np.ndarray,
  drawn: np.ndarray,
  fit: manifold.Fit,
  there: np.ndarray,
  expected: np.ndarray,
  config: worlds.WorldConfig,
) -> np.ndarray:
  """Says where the objects are exactly those that should be there.

  That is: (1) as many balls are there as the truth shows in that frame (one
  that another covers cannot be asked for); (2) what stands out from the
  background has a plausible area, next to what the same detector finds in the
  fit; (3) no patch of it lies apart from the balls; (4) one ball more would not
  explain the frame much better.

  Args:
    frames: [n p 3].
    drawn: [n p 3], the fit as an image.
    fit: of the frames.
    there: [n k], of `present`.
    expected: [n k], the true balls that `shown` sees.
    config: the world.

  Returns:
    bool [n].
  """
  enough = there.sum(1) >= expected.sum(1)

  standing_out = _differs(frames, fit.background)
  area = standing_out.sum(1)
  fitted = _differs(drawn, fit.drawn_background).sum(1)
  plausible = (area >= _AREA[0] * fitted) & (area <= _AREA[1] * fitted)

  centre = np.mgrid[: config.height, : config.width].reshape(2, -1).T + 0.5
  offset = fit.position[:, :, None] - centre.astype(np.float32)
  # A pixel more than the ball reaches, so that a soft edge is not an object.
  apart = (np.linalg.norm(offset, axis=-1) > config.radius + 1.5).all(1)
  patches = (standing_out & apart).reshape(-1, config.height, config.width)
  # Joined within a frame, never from one frame to the next.
  joined = np.zeros((3, 3, 3), bool)
  joined[1] = True
  labels = np.empty(patches.shape, np.int32)
  ndimage.label(patches, joined, output=labels)
  large = np.bincount(labels.ravel()) >= _EXTRA * np.pi * config.radius**2
  large[0] = False
  patch = large[labels].any((1, 2))

  contrast = fit.colour - fit.drawn_background[:, None]
  ball = np.square(fit.share).sum(-1) * np.square(contrast).sum(-1)
  spare = fit.spare >= _EXTRA * ball.min(1)
  return enough & plausible & ~patch & ~spare


def _differs(image: np.ndarray, colour: np.ndarray) -> np.ndarray:
  return np.linalg.norm(image - colour[:, None], axis=-1) > CONTRAST


def seen_colour(frames: np.ndarray, fit: manifold.Fit) -> np.ndarray:
  """Gives the colour [n k 3] of each fitted ball, as seen.

  That is the mean of the pixels it fills; the fitted colour where there are
  none, since its edge shows other colours as well.
  """
  full = manifold.visible(fit.share) > 0.999
  count = full.sum(-1, keepdims=True)
  mean = full.astype(np.float32) @ frames / np.maximum(count, 1)
  return np.where(count > 0, mean, fit.colour)


def hue_of(rgb: np.ndarray) -> np.ndarray:
  """Gives the hue in [0, 1) of colours [... 3], as in HSV."""
  r, g, b = np.moveaxis(np.asarray(rgb, np.float64), -1, 0)
  high = rgb.max(-1)
  chroma = np.maximum(high - rgb.min(-1), 1e-9)
  sector = np.where(
    high == r,
    (g - b) / chroma,
    np.where(high == g, 2 + (b - r) / chroma, 4 + (r - g) / chroma),
  )
  return sector / 6 % 1


def hue_error(
  hue: np.ndarray,
  there: np.ndarray,
  true_hue: np.ndarray,
  expected: np.ndarray,
) -> np.ndarray:
  """Compares hues of fitted balls with those of the true ones, frame by frame.

  Args:
    hue: [n k], of the fitted balls.
    there: [n k], which of these are there.
    true_hue: [n k].
    expected: [n k], the true balls that `shown` sees; others do not count.

  Returns:
    The mean circular distance [n] of hues, .5 for a ball that is not there, at
    the assignment of balls that makes it smallest.
  """
  apart = np.abs(hue[:, None] - true_hue[:, :, None])  # [n true fitted]
  apart = np.where(there[:, None], np.minimum(apart, 1 - apart), 0.5)
  apart *= expected[:, :, None]
  k = hue.shape[1]
  orders = np.array(list(itertools.permutations(range(k))))
  cost = apart[:, np.arange(k), orders].sum(-1)  # [n orders]
  # The ball in front always shows, so that the count is never 0.
  return cost.min(1) / expected.sum(1)


def speed_error(
  position: np.ndarray, there: np.ndarray, config: worlds.WorldConfig
) -> np.ndarray:
  """Compares speeds with the world's, for balls that fly freely.

  A ball is the one nearest to it in the last frame (all balls together: the
  pairing of least total distance).

  Args:
    position: [b f k 2].
    there: [b f k].
    config: the world.

  Returns:
    [b f] pixels a frame, mean over the balls that were there in this frame and
    the last and within a step of no wall; NaN without any.
  """
  wall = np.array([config.height, config.width]) - config.radius
  free = (position > config.radius + config.speed) & (
    position < wall - config.speed
  )
  good = there & free.all(-1)
  orders = np.array(list(itertools.permutations(range(position.shape[2]))))
  before = position[:, :-1, orders]  # [b f-1 orders k 2]
  step = np.linalg.norm(position[:, 1:, None] - before, axis=-1)
  best = step.sum(-1).argmin(-1)[..., None, None]
  pick = lambda x: np.take_along_axis(x, best, 2)[:, :, 0]
  known = good[:, 1:] & pick(good[:, :-1, orders])
  error = np.where(known, np.abs(pick(step) - config.speed), 0).sum(-1)
  count = known.sum(-1)
  mean = np.where(count > 0, error / np.maximum(count, 1), np.nan)
  return np.pad(mean, ((0, 0), (1, 0)), constant_values=np.nan)
