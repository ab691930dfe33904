"""Whether a generated video obeys the law of its scene.

Each law is read off the pixels of the rollout itself (`fitting.Fit`): a model
that is late, or has chosen a colour of its own for a tower that it had not seen
yet, breaks none. Where a video departs from the truth, `state_error` says.

Arrays are [b f ...]: videos, frames, and m layers of a scene.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from avd_jax.data import scenes, worlds
from avd_jax.evaluation import fitting, objects

# What a rollout may be off by before a law counts as broken; a true video is
# off by less than a fifth of each. Levels are in pixels, hues in turns, colours
# in RGB distance; the others are shares: of the world's speed, of a width, an
# amount, an energy.
SPEED_TOLERANCE = 0.5
HUE_TOLERANCE = 0.08
COLOUR_TOLERANCE = 0.3
LEVEL_TOLERANCE = 1.0
WIDTH_TOLERANCE = 0.15
AMOUNT_TOLERANCE = 0.3
ENERGY_TOLERANCE = 0.35

# At half its contrast an object stops to be there; of what is half hidden,
# colour and place are not asked.
_THERE = 0.5
_IN_VIEW = 0.5
_WHOLE = 0.75
# Frames that a ball may come out from behind the bar too early or too late.
_LENIENT = 2
# Pixels of liquid that must be seen where the truth has them.
_WET = 8.0


class Verdict(NamedTuple):
  """What a law says of every frame, [b f].

  Attributes:
    intact: the scene's objects are there, and no other.
    broken_law: the law is broken.
    hue_error: circular distance of hues in [0, .5] to the truth, mean over the
      objects in view; .5 for one that is gone, 0 where none should be seen.
    state_error: pixels between what is measured and the truth: of the camera,
      the ball, the level, the width. A frame's height where it is gone, 0
      where a bar hides it.
  """

  intact: np.ndarray
  broken_law: np.ndarray
  hue_error: np.ndarray
  state_error: np.ndarray


def _turn(hue: np.ndarray, other: np.ndarray) -> np.ndarray:
  apart = np.abs(hue - other)
  return np.minimum(apart, 1 - apart)


def _hue_error(seen: fitting.Fit, there, expected, state) -> np.ndarray:
  """Compares hues of objects [b f k], layers 1 to k, where expected."""
  k = there.shape[-1]
  hue = objects.hue_of(seen.colour[..., 1 : k + 1, :])
  error = _turn(hue, np.asarray(state["hue"])[:, None])
  error = np.where(there, error, 0.5) * expected
  return error.sum(-1) / np.maximum(expected.sum(-1), 1)


def _state_error(apart: np.ndarray, there: np.ndarray, config) -> np.ndarray:
  return np.where(there, apart, float(config.height))


def _single(seen: fitting.Fit) -> np.ndarray:
  """Says [b f] where there is no second ball."""
  return seen.spare < objects.CONTRAST**2


def _pan(seen: fitting.Fit, readable, state, config) -> Verdict:
  """A tower has the colour that it was first seen whole with."""
  width, heights = scenes.tower_sizes(config)
  share = seen.area[..., 1:] / (width * heights)
  in_view, there = share >= _IN_VIEW, seen.strength[..., 1:] >= _THERE
  intact = ~(in_view & ~there).any(-1)
  clear = (share >= _WHOLE) & there & readable[..., None]
  colour = seen.colour[..., 1:, :]
  known, memory = np.zeros_like(clear[:, 0]), np.zeros_like(colour[:, 0])
  broken = np.zeros(clear.shape[:2], bool)
  for f in range(clear.shape[1]):
    apart = np.linalg.norm(colour[:, f] - memory, axis=-1)
    broken[:, f] = (clear[:, f] & known & (apart > COLOUR_TOLERANCE)).any(-1)
    new = clear[:, f] & ~known
    memory = np.where(new[..., None], colour[:, f], memory)
    known = known | new
  apart = np.abs(seen.geometry[..., 0] - state["camera"])
  return Verdict(
    intact,
    broken,
    _hue_error(seen, there, in_view, state),
    _state_error(apart, there.any(-1), config),
  )


def _ways(place: np.ndarray, size: int, config) -> np.ndarray:
  """Gives how far a ball may have gone in each step along an axis.

  A wall that it met in between turned it round: its way was to the wall and
  back. A wall further off than a step was not met.

  Args:
    place: [b f], of its centre.
    size: of the frame along the axis.
    config: the world.

  Returns:
    [3 b f-1] pixels: straight, by the lower and by the upper wall.
  """
  straight = np.diff(place)
  low, high = place - config.radius, size - config.radius - place
  round_trips = np.stack([x[:, 1:] + x[:, :-1] for x in (low, high)])
  met = round_trips < 1.5 * config.speed
  return np.stack([straight, *np.where(met, round_trips, straight)])


def _nearest(readings: np.ndarray, expected) -> np.ndarray:
  """Gives, of [r b f] possible readings, the ones nearest to the expected."""
  best = np.abs(readings - expected).argmin(0)
  return np.take_along_axis(readings, best[None], 0)[0]


def _speed_error(position, clear, config) -> np.ndarray:
  """Gives how much the speed is off [b f], 0 where it cannot be read.

  The bar leaves too little room for flight that is near no wall, so that all
  ways count that a wall allows.
  """
  down = _ways(position[..., 0], config.height, config)
  across = _ways(position[..., 1], config.width, config)
  speed = np.hypot(down[:, None], across).reshape(-1, *down.shape[1:])
  error = np.abs(_nearest(speed, config.speed) - config.speed)
  known = clear[:, 1:] & clear[:, :-1]
  return np.pad(np.where(known, error, 0), ((0, 0), (1, 0)))


def _occluder(seen: fitting.Fit, readable, state, config) -> Verdict:
  """The ball comes out in time, with the hue it went behind the bar with.

  It may be out of sight for as long as its speed takes it to the bar and across
  from where it was seen last, and two frames more; and it comes out where that
  speed can have taken it, or two frames further.
  """
  disc = np.pi * config.radius**2
  there = (seen.strength[..., 1] >= _THERE) & readable
  clear = there & (seen.area[..., 1] >= _IN_VIEW * disc)
  left, right = scenes.bar_edges(config)
  across = np.abs(np.asarray(state["velocity"])[:, 0, 1])
  hue = objects.hue_of(seen.colour[..., 1, :])
  place = seen.geometry
  # What it was when it was seen last, and before it was hidden last. A video
  # may begin behind the bar.
  last = np.asarray(state["position"])[:, 0, 0].astype(np.float64)
  last_hue = before = np.full(len(last), np.nan)
  hidden = np.zeros(len(last))
  absent, turned, leapt = np.zeros((3, *clear.shape), bool)
  for f in range(clear.shape[1]):
    now = clear[:, f]
    far = np.linalg.norm(place[:, f] - last, axis=-1)
    leap = far > config.speed * (hidden + 1 + _LENIENT)
    leapt[:, f] = now & (hidden > 0) & leap
    before = np.where(now & (hidden > 0), last_hue, before)
    turned[:, f] = now & (_turn(hue[:, f], before) > HUE_TOLERANCE)
    hidden = np.where(now, 0, hidden + 1)
    last = np.where(now[:, None], place[:, f], last)
    last_hue = np.where(now, hue[:, f], last_hue)
    way = np.maximum(np.maximum(left - last[:, 1], last[:, 1] - right), 0)
    early = across * hidden < way - 1
    late = across * (hidden - _LENIENT) > way + right - left
    absent[:, f] = ~now & (early | late)
  speed_error = _speed_error(place, clear, config)
  wrong_speed = speed_error > SPEED_TOLERANCE * config.speed
  apart = np.linalg.norm(place - state["position"][:, :, 0], axis=-1)
  hue_error = np.where(clear, _turn(hue, state["hue"]), 0.5 * absent)
  return Verdict(
    ~absent & _single(seen),
    absent | turned | leapt | wrong_speed,
    hue_error,
    np.where(clear | absent, _state_error(apart, clear, config), 0),
  )


def _lasting(values: np.ndarray) -> np.ndarray:
  """Gives the running maximum [b f] before each frame, of what lasts two.

  One frame that is misread would else convict all that follow.
  """
  steady = np.minimum(values[:, 1:], values[:, :-1])
  maximum = np.maximum.accumulate(steady, axis=1)
  start = np.full((len(values), min(2, values.shape[1])), -np.inf)
  return np.concatenate([start, maximum[:, :-1]], axis=1)


def _pour(seen: fitting.Fit, readable, state, config) -> Verdict:
  """The level does not fall below what it has reached."""
  area, strength = seen.area[..., 2], seen.strength[..., 2]
  wet = (area > 0) & (strength >= _THERE) & readable
  level = np.where(wet, seen.geometry[..., 0], 0)
  highest = _lasting(np.where(readable, level, 0))
  expected = _true_area(state, config)[..., 2] >= _WET
  hue = objects.hue_of(seen.colour[..., 2, :])
  error = np.where(wet, _turn(hue, state["hue"]), 0.5)
  apart = np.abs(level - state["level"])
  return Verdict(
    wet | ~expected,
    level < highest - LEVEL_TOLERANCE,
    np.where(expected, error, 0),
    _state_error(apart, wet | ~expected, config),
  )


def _steady(values: np.ndarray) -> np.ndarray:
  """Gives the median [b f] of each frame and the two before."""
  start = np.repeat(values[:, :1], 2, axis=1)
  padded = np.concatenate([start, values], axis=1)
  frames = values.shape[1]
  return np.median([padded[:, i : i + frames] for i in range(3)], axis=0)


def _true_area(state, config) -> np.ndarray:
  scene = scenes.SCENES[config.kind]
  return scene.layers(config, scene.geometry(state)).sum((-1, -2))


def amount_of_ink(colour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Reads the ink off background and drop, [... 2 3], as seen.

  Returns:
    The amount as a share of the true one, and the hue, [...] each: the pair
    that explains the contrast best.
  """
  hues = np.arange(96) / 96
  wanted = worlds.hue_to_rgb(hues) - colour[..., :1, :]
  contrast = colour[..., 1:, :] - colour[..., :1, :]
  size = np.square(wanted).sum(-1)
  amount = np.maximum((wanted * contrast).sum(-1) / size, 0)
  best = (amount**2 * size).argmax(-1)
  pick = lambda a: np.take_along_axis(a, best[..., None], -1)[..., 0]
  return pick(amount), hues[best]


def _ink(seen: fitting.Fit, readable, state, config) -> Verdict:
  """The drop grows no smaller; the amount of ink stays.

  Both are medians over three frames: dry ink is faint.
  """
  amount, hue = amount_of_ink(seen.colour)
  there = (amount >= _THERE) & readable
  amount = _steady(amount)
  width = np.where(there, seen.geometry[..., 2], 0)
  steady = np.where(there, _steady(seen.geometry[..., 2]), 0)
  shrunk = steady < (1 - WIDTH_TOLERANCE) * _lasting(steady)
  changed = np.abs(amount - 1) > AMOUNT_TOLERANCE
  return Verdict(
    there,
    shrunk | changed,
    np.where(there, _turn(hue, state["hue"]), 0.5),
    _state_error(np.abs(width - state["width"]), there, config),
  )


def energy_of(position: np.ndarray, config, near: np.ndarray) -> np.ndarray:
  """Gives the energy of a falling ball over each step, [b f-1].

  In free flight it follows from two places exactly. If the ball met the floor
  or a wall in between, its way is that of the unfolded path; of the readings
  that are possible the one nearest to an energy is given.

  Args:
    position: [b f 2] (y, x) in pixels.
    config: the world.
    near: [b], the energy that is expected.
  """
  pull = scenes.gravity(config)
  height = np.maximum(config.height - config.radius - position[..., 0], 0)
  low, high = height[:, :-1], height[:, 1:]
  free = pull * ((low + high) / 2 + pull / 8) + (high - low) ** 2 / 2
  # 3/8: between a bounce at an end of the step and one in its middle.
  bounced = (low + high + 0.375 * pull) ** 2 / 2
  sideways = _ways(position[..., 1], config.width, config)
  energy = np.stack([free, bounced])[:, None] + sideways**2 / 2
  return _nearest(energy.reshape(-1, *free.shape), near[:, None])


def _fall(seen: fitting.Fit, readable, state, config) -> Verdict:
  """The median energy of the last three steps is the video's."""
  there = (seen.strength[..., 1] >= _THERE) & readable
  energy = np.asarray(state["energy"], np.float64)
  steps = energy_of(seen.geometry, config, energy)
  steps = np.where(there[:, 1:] & there[:, :-1], steps, np.nan)
  off = np.zeros(there.shape, bool)
  for f in range(3, there.shape[1]):
    recent = np.median(steps[:, f - 3 : f], axis=1)
    off[:, f] = np.abs(recent / energy - 1) > ENERGY_TOLERANCE
  apart = np.linalg.norm(seen.geometry - state["position"][:, :, 0], axis=-1)
  expected = np.ones_like(there[..., None])
  return Verdict(
    there & _single(seen),
    off,
    _hue_error(seen, there[..., None], expected, state),
    _state_error(apart, there, config),
  )


_LAWS = {
  "pan": _pan,
  "occluder": _occluder,
  "pour": _pour,
  "ink": _ink,
  "fall": _fall,
}


def judge(
  seen: fitting.Fit,
  readable: np.ndarray,
  state: Mapping[str, np.ndarray],
  config: worlds.WorldConfig,
) -> Verdict:
  """Applies the law of the world's kind.

  Args:
    seen: the fits of [b f] frames.
    readable: [b f], frames that the scene could have drawn; from others
      nothing is read.
    state: the truth, leaves [b ...].
    config: the world; not of kind "balls".
  """
  return _LAWS[config.kind](seen, readable, state, config)
