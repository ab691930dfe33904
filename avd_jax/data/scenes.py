"""Scenes with a law: what a video must go on to obey, whatever its colours.

  pan       a view pans over a row of towers, away and back: what is seen again
            is what was seen before.
  occluder  a ball passes behind a bar: it comes out with the colour and the
            speed it had.
  pour      a glass fills: the level never falls, and stays once it is full.
  ink       a drop spreads: its width grows as the root of time until it has
            dried; the amount of ink stays.
  fall      a ball falls and bounces: its energy stays.

Each is drawn as layers that share out every pixel, each in one colour: the same
layers draw a video and are searched for in a generated one. Backgrounds, hues
and the bar's colour are continuous and last, since only such content drifts.

What has a beginning and an end (pour, ink) is met at any moment of it, before
and after included: clips of ten frames then show all that a rollout of eighty
comes to.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from avd_jax.data.drawing import (
  LONGEST_COLOUR,
  WorldConfig,
  bounce,
  colour_name,
  hue_to_rgb,
)

State = dict[str, np.ndarray]

# Light grey, and the range of a bar's channels: told from any background and,
# by their smallest channel, from any saturated hue.
GLASS = 0.8
BAR = (0.6, 1.0)
NUM_TOWERS = 4
# A drop's largest share of a pixel, in its middle at the beginning.
_DROP = 0.95
# Frames before the beginning, and after the end, that a video may start at.
# Few before: three given frames show that it has begun.
_BEFORE, _AFTER = 2, 6


class Scene(Protocol):
  """What a scene is made of; m layers, d numbers that say where they are.

  Attributes:
    paints: how each layer's colour is drawn: "background" (in the config's
      range), "hue" (fully saturated), "bar" (in BAR) or "glass" (GLASS).
    sentence: of the caption; {} is the place of the hue's name.
  """

  paints: tuple[str, ...]
  sentence: str

  def truth(self, config: WorldConfig, draw: np.ndarray, frames: int) -> State:
    """Gives what happens, of 8 numbers in [0, 1)."""
    ...

  def geometry(self, state: Mapping[str, np.ndarray]) -> np.ndarray:
    """Gives where the layers are, [... f d], of a truth of [... f]."""
    ...

  def limits(self, config: WorldConfig) -> tuple[np.ndarray, np.ndarray]:
    """Gives the lowest and the highest geometry [d] that occurs."""
    ...

  def layers(self, config: WorldConfig, geometry: np.ndarray) -> np.ndarray:
    """Gives each layer's share of each pixel, [... d] -> [... m h w]."""
    ...


def _hues(values: np.ndarray) -> State:
  colour = hue_to_rgb(values).astype(np.float32)
  return {"hue": values.astype(np.float32), "colour": colour}


def _between(low, high, draw):
  return low + draw * (high - low)


def _overlap(low, high, size: int) -> np.ndarray:
  """Gives the share of each of `size` pixels that [low, high] covers."""
  edge = np.arange(size, dtype=np.float32)
  low, high = np.asarray(low)[..., None], np.asarray(high)[..., None]
  share = np.minimum(high, edge + 1) - np.maximum(low, edge)
  return np.clip(share, 0, 1).astype(np.float32)


def _disc(config: WorldConfig, centre: np.ndarray) -> np.ndarray:
  """Gives a ball's share [... h w] of each pixel, as in `drawing.render`."""
  rows = np.arange(config.height, dtype=np.float32) + 0.5
  columns = np.arange(config.width, dtype=np.float32) + 0.5
  centre = np.asarray(centre, np.float32)
  dy = np.square(rows - centre[..., 0, None])
  dx = np.square(columns - centre[..., 1, None])
  away = np.sqrt(dy[..., :, None] + dx[..., None, :])
  return np.clip(np.float32(config.radius + 0.5) - away, 0, 1)


def _room(config: WorldConfig) -> tuple[np.ndarray, np.ndarray]:
  """Gives the lowest and the highest place (y, x) of a ball's centre."""
  wall = np.array([config.height, config.width], np.float64)
  return np.full(2, config.radius), wall - config.radius


def _stack(front: list[np.ndarray]) -> np.ndarray:
  """Puts the background behind layers that do not overlap."""
  behind = 1 - sum(front)
  return np.stack([behind, *front], axis=-3)


def tower_sizes(config: WorldConfig) -> tuple[float, np.ndarray]:
  """Gives the towers' width and their heights [NUM_TOWERS], in pixels."""
  heights = config.height * (0.3 + 0.2 * np.arange(NUM_TOWERS))
  return config.width / NUM_TOWERS, heights


class Pan:
  """Four towers of rising height, twice as wide as the view.

  The heights are the same in all videos, so that a frame tells where the camera
  is; the hues are not, and must be remembered.
  State: camera [f], the view's left edge in pixels; colour, hue of the towers.
  """

  paints = ("background", *["hue"] * NUM_TOWERS)
  sentence = "a view pans over towers"

  def truth(self, config, draw, frames):
    reach = float(config.width)
    start = draw[4] * reach
    velocity = config.speed * (1 if draw[5] < 0.5 else -1)
    camera = bounce(start, velocity, np.arange(frames), 0.0, reach)
    return {"camera": camera.astype(np.float32), **_hues(draw[:NUM_TOWERS])}

  def geometry(self, state):
    return state["camera"][..., None]

  def limits(self, config):
    return np.zeros(1), np.array([float(config.width)])

  def layers(self, config, geometry):
    camera = geometry[..., 0]
    width, heights = tower_sizes(config)
    towers = []
    for i, height in enumerate(heights):
      # As wide as the gaps, half a gap at either end.
      left = (2 * i + 0.5) * width - camera
      columns = _overlap(left, left + width, config.width)
      rows = _overlap(config.height - height, config.height, config.height)
      towers.append(rows[:, None] * columns[..., None, :])
    return _stack(towers)


def bar_edges(config: WorldConfig) -> tuple[float, float]:
  """Gives a bar's left and right edge: it hides a ball for a moment."""
  half = config.radius + 1
  return config.width / 2 - half, config.width / 2 + half


class Occluder:
  """A ball that flies more across than up, behind an upright bar.

  State: position [f 1 2] and velocity [1 2] as of `worlds.World`; colour, hue
  of the ball; bar [3], the bar's colour.
  """

  paints = ("background", "hue", "bar")
  sentence = "a {}ball passes behind a bar"

  def truth(self, config, draw, frames):
    low, high = self.limits(config)
    start = _between(low, high, draw[:2])
    # Across: no more than 30 degrees up or down, or it would rarely hide.
    angle = _between(-np.pi / 6, np.pi / 6, draw[2])
    across = np.cos(angle) * (1 if draw[3] < 0.5 else -1)
    velocity = config.speed * np.array([np.sin(angle), across])
    time = np.arange(frames)[:, None]
    position = bounce(start, velocity, time, low, high)
    return {
      "position": position[:, None].astype(np.float32),
      "velocity": velocity[None].astype(np.float32),
      "bar": _between(*BAR, draw[5:8]).astype(np.float32),
      **_hues(draw[4:5]),
    }

  def geometry(self, state):
    return state["position"][..., 0, :]

  def limits(self, config):
    return _room(config)

  def layers(self, config, geometry):
    bar = _overlap(*bar_edges(config), config.width)
    ball = _disc(config, geometry) * (1 - bar)
    return _stack([ball, np.broadcast_to(bar, ball.shape)])


class Pour:
  """A glass, and a stream that fills it at a rate of its own.

  State: level [f] in pixels above the glass's bottom; stream [f], 1 while it
  fills; rate [], pixels a frame; colour, hue of the liquid.
  """

  paints = ("background", "glass", "hue")
  sentence = "a glass fills with {}liquid"

  def full(self, config: WorldConfig) -> float:
    """Gives the highest level: a pixel below the rim."""
    return float(config.height - config.height // 4 - 2)

  def truth(self, config, draw, frames):
    full = self.full(config)
    rate = config.speed * _between(0.2, 0.6, draw[0])
    age = _start(draw[1], full / rate) + np.arange(frames)
    level = np.clip(rate * age, 0, full)
    stream = (age >= 0) & (level < full)
    return {
      "level": level.astype(np.float32),
      "stream": stream.astype(np.float32),
      "rate": np.array(rate, np.float32),
      **_hues(draw[2:3]),
    }

  def geometry(self, state):
    return np.stack([state["level"], state["stream"]], -1)

  def limits(self, config):
    return np.zeros(2), np.array([self.full(config), 1.0])

  def layers(self, config, geometry):
    level, stream = geometry[..., 0], geometry[..., 1]
    height, width = config.height, config.width
    side = width // 8
    bottom = height - 1
    outer = _overlap(side, width - side, width)
    inner = _overlap(side + 1, width - side - 1, width)
    stands = _overlap(height // 4, height, height)[:, None]
    holds = _overlap(height // 4, bottom, height)[:, None]
    glass = stands * outer - holds * inner
    wet = _overlap(bottom - level, bottom, height)[..., :, None] * inner
    middle = _overlap(width / 2 - 1, width / 2 + 1, width)
    falls = _overlap(0 * level, bottom - level, height)[..., :, None] * middle
    liquid = wet + stream[..., None, None] * falls
    return _stack([np.broadcast_to(glass, liquid.shape), liquid])


class Ink:
  """A drop of ink, a Gaussian blob, that spreads until it has dried.

  Its variance grows evenly: by `rate`, in square pixels a frame.
  State: position [2] (y, x); width [f], the standard deviation in pixels; rate
  []; colour, hue of the ink.
  """

  paints = ("background", "hue")
  sentence = "a drop of {}ink spreads"

  def widths(self, config: WorldConfig) -> tuple[float, float]:
    """Gives the width of a fresh drop, and of a dry one."""
    return config.radius, min(config.height, config.width) / 4.5

  def truth(self, config, draw, frames):
    fresh, dry = self.widths(config)
    rate = config.speed * _between(0.15, 0.45, draw[0])
    age = _start(draw[1], (dry**2 - fresh**2) / rate) + np.arange(frames)
    width = np.sqrt(np.clip(fresh**2 + rate * age, fresh**2, dry**2))
    low, high = self.limits(config)
    return {
      "position": _between(low[:2], high[:2], draw[2:4]).astype(np.float32),
      "width": width.astype(np.float32),
      "rate": np.array(rate, np.float32),
      **_hues(draw[4:5]),
    }

  def geometry(self, state):
    width = state["width"][..., None]
    position = np.asarray(state["position"])[..., None, :]
    position = np.broadcast_to(position, (*width.shape[:-1], 2))
    return np.concatenate([position, width], -1)

  def limits(self, config):
    fresh, dry = self.widths(config)
    size = np.array([config.height, config.width])
    low, high = 0.4 * size, 0.6 * size
    return np.append(low, fresh), np.append(high, dry)

  def layers(self, config, geometry):
    geometry = np.asarray(geometry, np.float32)
    width = geometry[..., 2, None]

    def across(axis: int, size: int) -> np.ndarray:
      away = np.arange(size, dtype=np.float32) + 0.5 - geometry[..., axis, None]
      return np.exp(-0.5 * np.square(away / width)) / width

    fresh = self.widths(config)[0]
    rows = _DROP * fresh**2 * across(0, config.height)
    return _stack([rows[..., :, None] * across(1, config.width)[..., None, :]])


def gravity(config: WorldConfig) -> float:
  """Gives the pull, in pixels a frame squared.

  A ball dropped from the top lands at twice the world's speed: falling, it has
  that speed on average.
  """
  return 2 * config.speed**2 / (config.height - 2 * config.radius)


class Fall:
  """A ball that falls and bounces from the floor, and from the side walls.

  State: position [f 1 2]; velocity [f 1 2] at that moment; energy [], gravity
  times height over the floor plus half the squared speed; colour, hue.
  """

  paints = ("background", "hue")
  sentence = "a {}ball falls and bounces"

  def truth(self, config, draw, frames):
    low, high = self.limits(config)
    pull = gravity(config)
    # At least half of the room, and to either side of any moment of a bounce.
    landing = np.sqrt(2 * pull * _between(0.5, 1.0, draw[0]) * (high - low)[0])
    since = (draw[1] * 2 * landing / pull + np.arange(frames)) % (
      2 * landing / pull
    )
    height = since * (landing - pull * since / 2)
    across = config.speed * _between(-0.5, 0.5, draw[2])
    start = _between(low[1], high[1], draw[3])
    x = bounce(start, across, np.arange(frames), low[1], high[1])
    turned = (start - low[1] + across * np.arange(frames)) // (high - low)[1]
    velocity = np.stack(
      [pull * since - landing, across * np.where(turned % 2, -1, 1)], -1
    )
    position = np.stack([high[0] - height, x], -1)
    return {
      "position": position[:, None].astype(np.float32),
      "velocity": velocity[:, None].astype(np.float32),
      "energy": np.array((landing**2 + across**2) / 2, np.float32),
      **_hues(draw[4:5]),
    }

  def geometry(self, state):
    return state["position"][..., 0, :]

  def limits(self, config):
    return _room(config)

  def layers(self, config, geometry):
    return _stack([_disc(config, geometry)])


def _start(draw: float, duration: float) -> float:
  """Gives the age in frames at which a video meets what lasts `duration`."""
  return _between(-_BEFORE, duration + _AFTER, draw)


SCENES: dict[str, Scene] = {
  "pan": Pan(),
  "occluder": Occluder(),
  "pour": Pour(),
  "ink": Ink(),
  "fall": Fall(),
}


def colours(kind: str, state: Mapping[str, np.ndarray]) -> np.ndarray:
  """Gives the true colour of each layer, [... m 3] in [0, 1]."""
  background = np.asarray(state["background"])[..., None, :]
  hues = np.asarray(state["colour"])
  if kind == "occluder":
    rest = [hues, np.asarray(state["bar"])[..., None, :]]
  elif kind == "pour":
    rest = [np.full_like(background, GLASS), hues]
  else:
    rest = [hues]
  return np.concatenate([background, *rest], -2)


def compose(layers: np.ndarray, colour: np.ndarray) -> np.ndarray:
  """Paints layers [... m h w] in colours [... m 3]: [... h w 3] in [-1, 1]."""
  image = np.einsum("...mhw,...mc->...hwc", layers, colour)
  return (2 * image - 1).astype(np.float32)


def draw(
  config: WorldConfig, rng: np.random.Generator, frames: int
) -> tuple[np.ndarray, State]:
  """Draws a video [f h w 3] in [-1, 1] of a scene, and its truth.

  Besides what the scene says, the truth has background [3], and colour [k 3]
  and hue [k] of its k objects.
  """
  scene = SCENES[config.kind]
  # All of them at once and before any time: more frames begin the same.
  numbers = rng.random(11)
  state = scene.truth(config, numbers[3:], frames)
  background = _between(
    config.background_low, config.background_high, numbers[:3]
  )
  state["background"] = background.astype(np.float32)
  layers = scene.layers(config, scene.geometry(state))
  return compose(layers, colours(config.kind, state)), state


def caption(config: WorldConfig, state: Mapping[str, np.ndarray]) -> str:
  """Says what is seen; of towers no colours, which must be remembered."""
  background = state["background"]
  shade = "dark" if background.mean() < 0.5 else "light"
  name = colour_name(state["colour"][0])
  return _caption(config, name, f"{shade} {colour_name(background)}")


def longest_caption(config: WorldConfig) -> str:
  """Gives a caption that no video of this world exceeds in length."""
  return _caption(config, LONGEST_COLOUR, f"light {LONGEST_COLOUR}")


def _caption(config: WorldConfig, name: str, background: str) -> str:
  sentence = SCENES[config.kind].sentence
  if config.caption_detail == "colour":
    return f"{sentence.format(name + ' ')}, {background} background"
  middle = (config.background_low + config.background_high) / 2
  shade = "dark" if middle < 0.5 else "light"
  return f"{sentence.format('')} on a {shade} background"
