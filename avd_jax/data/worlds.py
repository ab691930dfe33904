"""Procedural worlds: balls that bounce on a plain background.

The embedded default data set. A world is drawn where it is asked for, from
(seed, index) alone, so that it needs no files, has any length, and its truth
(where every ball is, in any frame) is known in closed form. The background
colour and the hues are continuous and last for the whole video: such content
can drift, where a small palette is an attractor a model finds by itself.

Positions are (y, x) in pixels, the origin at the frame's upper left corner, so
that the centre of the first pixel is (.5, .5). Colours are RGB in [0, 1];
videos are in [-1, 1].
"""

import dataclasses
from typing import Any

import numpy as np

from avd_jax.errors import UserError

# The streams that share a seed without sharing a video. A zero at the end does
# not change a numpy seed sequence, so stream 0 is default_rng((seed, index)).
# The stream stands last for that very reason: (seed, 1) and (seed, 1, 0) are
# the same generator, so a stream in the middle would repeat training videos.
TRAIN, EVAL = 0, 1

_HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


@dataclasses.dataclass(frozen=True)
class WorldConfig:
  """What is in a world.

  Attributes:
    height, width: size of a frame in pixels.
    num_balls: balls in every video; they pass through each other, later ones
      in front.
    radius: of a ball, in pixels.
    speed: of a ball, in pixels a frame.
    background_low, background_high: range of each channel of the background.
    caption_detail: "count" names how many balls there are; "colour" names
      their colours and the background's too.

  Raises:
    UserError: balls that do not fit the frame, or a value outside its range.
  """

  height: int = 12
  width: int = 12
  num_balls: int = 1
  radius: float = 2.0
  speed: float = 1.25
  background_low: float = 0.1
  background_high: float = 0.5
  caption_detail: str = "count"

  def __post_init__(self):
    if self.num_balls < 1:
      raise UserError(f"num_balls={self.num_balls}: a world has 1 or more")
    if not 0 < 2 * self.radius < min(self.height, self.width):
      raise UserError(
        f"a ball of radius={self.radius} cannot move in a frame of "
        f"{self.height}x{self.width} pixels; make it smaller than half of that"
      )
    if not 0 <= self.background_low <= self.background_high <= 1:
      raise UserError(
        f"background_low={self.background_low}, background_high="
        f"{self.background_high}: give 0 <= low <= high <= 1"
      )
    if self.speed < 0:
      raise UserError(f"speed={self.speed}: give 0 or more pixels a frame")
    if self.caption_detail not in ("count", "colour"):
      raise UserError(
        f"caption_detail={self.caption_detail!r}: give 'count' or 'colour'"
      )


def hue_to_rgb(hue: np.ndarray) -> np.ndarray:
  """Gives the fully saturated colour of a hue: [...] in [0, 1] -> [..., 3]."""
  k = (np.array([5.0, 3.0, 1.0]) + np.asarray(hue)[..., None] * 6) % 6
  return 1 - np.clip(np.minimum(k, 4 - k), 0, 1)


def bounce(
  start: np.ndarray, velocity: np.ndarray, time: np.ndarray, low, high
) -> np.ndarray:
  """Moves points that are reflected at two walls, in closed form.

  A reflected path is a straight one in a room unfolded at its walls, so folding
  it back gives any moment without the moments before.

  Args:
    start: positions at time 0, within [low, high].
    velocity: displacement per unit of time.
    time: broadcasts against the two above.
    low, high: the walls, low < high.

  Returns:
    Positions in [low, high], the shape of the broadcast arguments.
  """
  room = high - low
  unfolded = (start - low + velocity * time) % (2 * room)
  return np.asarray(low + room - np.abs(unfolded - room))


def render(
  config: WorldConfig,
  position: np.ndarray,
  colour: np.ndarray,
  background: np.ndarray,
) -> np.ndarray:
  """Draws frames; any leading dimensions, broadcast against each other.

  A pixel's share of a ball falls linearly from 1 to 0 over the pixel that the
  ball's edge crosses: smooth in the position, so that motion below a pixel
  shows and a renderable frame can be searched for.

  Args:
    config: the world; its height, width and radius are used.
    position: [..., k, 2] centres (y, x) in pixels.
    colour: [..., k, 3] in [0, 1].
    background: [..., 3] in [0, 1].

  Returns:
    float32 [..., height, width, 3] in [-1, 1].
  """
  position = np.asarray(position, np.float32)
  # In [-1, 1] from the start: mixing is linear, and frames are the large part.
  colour = np.asarray(colour, np.float32) * 2 - 1
  background = np.asarray(background, np.float32) * 2 - 1
  rows = np.arange(config.height, dtype=np.float32) + np.float32(0.5)
  columns = np.arange(config.width, dtype=np.float32) + np.float32(0.5)
  dy = np.square(rows - position[..., 0, None])
  dx = np.square(columns - position[..., 1, None])
  share = np.sqrt(dy[..., :, None] + dx[..., None, :])
  np.subtract(np.float32(config.radius + 0.5), share, out=share)
  np.clip(share, 0, 1, out=share)
  rest = 1 - share
  leading = np.broadcast_shapes(
    position.shape[:-2], colour.shape[:-2], background.shape[:-1]
  )
  size = (config.height, config.width)
  # Channel by channel: a last dimension of 3 is slow to broadcast over.
  video = np.empty((*leading, *size, 3), np.float32)
  for c in range(3):
    plane = background[..., c, None, None]
    for ball in range(position.shape[-2]):
      # Two products, not one of a difference: exact where the share is 0 or 1.
      paint = colour[..., ball, c, None, None] * share[..., ball, :, :]
      plane = plane * rest[..., ball, :, :] + paint
    video[..., c] = plane
  return video


def colour_name(rgb: np.ndarray) -> str:
  """Names the hue of a colour, [3] in [0, 1]: the nearest of six, or grey."""
  r, g, b = (float(v) for v in rgb)
  high, low = max(r, g, b), min(r, g, b)
  if high - low < 0.08:
    return "grey"
  if high == r:
    hue = (g - b) / (high - low)
  elif high == g:
    hue = 2 + (b - r) / (high - low)
  else:
    hue = 4 + (r - g) / (high - low)
  return _HUES[round(hue) % 6]


def longest_caption(config: WorldConfig) -> str:
  """Gives a caption that no video of this world exceeds in length."""
  name = max(_HUES, key=len)
  return _caption(config, [name] * config.num_balls, f"light {name}")


class World:
  """Random access to the videos of a world.

  `world[i]` is a dictionary:
    video: float32 [f, h, w, 3] in [-1, 1].
    caption: str.
    state: the truth: position float32 [f, k, 2] (y, x in pixels), velocity
      float32 [k, 2] (pixels a frame, before the first bounce), colour float32
      [k, 3] and background float32 [3] in [0, 1], hue float32 [k] in [0, 1).

  A video depends on (config, seed, stream, index) only; more frames of it begin
  with the same frames.

  Args:
    config: what is in it.
    seed: 0 or more.
    num_videos: length of the source; costs nothing.
    frames: of each video.
    stream: TRAIN or EVAL; no video is in both.

  Raises:
    UserError: negative seed, or no videos or frames.
  """

  def __init__(
    self,
    config: WorldConfig,
    seed: int,
    num_videos: int,
    frames: int,
    stream: int = TRAIN,
  ):
    if seed < 0:
      raise UserError(f"seed={seed}: give 0 or more")
    if num_videos < 1 or frames < 1:
      raise UserError(
        f"num_videos={num_videos}, frames={frames}: give 1 or more of each"
      )
    self.config = config
    self.frames = frames
    self._seed = seed
    self._stream = stream
    self._num_videos = num_videos
    wall = np.array([config.height, config.width], np.float64)
    self._low, self._high = config.radius, wall - config.radius
    self._time = np.arange(frames, dtype=np.float64)[:, None, None]

  def __len__(self) -> int:
    return self._num_videos

  def __repr__(self) -> str:
    return (
      f"World({self.config}, seed={self._seed}, num_videos={len(self)}, "
      f"frames={self.frames}, stream={self._stream})"
    )

  def __getitem__(self, index: int) -> dict[str, Any]:
    index = int(index)
    if not 0 <= index < self._num_videos:
      raise IndexError(f"video {index} of {self._num_videos}")
    config, balls = self.config, self.config.num_balls
    rng = np.random.default_rng((self._seed, index, self._stream))
    draw = rng.random(4 * balls + 3)
    start = self._low + draw[: 2 * balls].reshape(balls, 2) * (
      self._high - self._low
    )
    angle = 2 * np.pi * draw[2 * balls : 3 * balls]
    hue = draw[3 * balls : 4 * balls]
    background = config.background_low + draw[4 * balls :] * (
      config.background_high - config.background_low
    )
    velocity = config.speed * np.stack([np.sin(angle), np.cos(angle)], -1)
    position = bounce(start, velocity, self._time, self._low, self._high)
    state = {
      "position": position.astype(np.float32),
      "velocity": velocity.astype(np.float32),
      "colour": hue_to_rgb(hue).astype(np.float32),
      "hue": hue.astype(np.float32),
      "background": background.astype(np.float32),
    }
    video = render(
      config, state["position"], state["colour"], state["background"]
    )
    names = [colour_name(c) for c in state["colour"]]
    shade = "dark" if background.mean() < 0.5 else "light"
    caption = _caption(config, names, f"{shade} {colour_name(background)}")
    return {"video": video, "caption": caption, "state": state}

  def clip(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """Gives a video whole; nothing is left to draw, so `rng` is not used."""
    del rng
    return self[index]


def _caption(config: WorldConfig, balls: list[str], background: str) -> str:
  if config.caption_detail == "colour":
    named = " and ".join(f"a {name} ball" for name in balls)
    return f"{named}, {background} background"
  count = len(balls)
  number = _NUMBERS[count] if count < len(_NUMBERS) else str(count)
  # Of the range, not of the video: a count gives away no colour.
  middle = (config.background_low + config.background_high) / 2
  shade = "dark" if middle < 0.5 else "light"
  return f"{number} {'ball' if count == 1 else 'balls'} on a {shade} background"
