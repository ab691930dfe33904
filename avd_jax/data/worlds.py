"""Procedural worlds: balls that bounce on a plain background, and scenes.

The embedded default data set. A world is drawn where it is asked for, from
(seed, index) alone, so that it needs no files, has any length, and its truth
(where every ball is, in any frame) is known in closed form. The background
colour and the hues are continuous and last for the whole video: such content
can drift, where a small palette is an attractor a model finds by itself.

Positions are (y, x) in pixels, the origin at the frame's upper left corner, so
that the centre of the first pixel is (.5, .5). Colours are RGB in [0, 1];
videos are in [-1, 1].
"""

from typing import Any

import numpy as np

from avd_jax.data import scenes
from avd_jax.data.drawing import (
  LONGEST_COLOUR,
  WorldConfig,
  bounce,
  colour_name,
  hue_to_rgb,
  render,
)
from avd_jax.errors import UserError

# The streams that share a seed without sharing a video. A zero at the end does
# not change a numpy seed sequence, so stream 0 is default_rng((seed, index)).
# The stream stands last for that very reason: (seed, 1) and (seed, 1, 0) are
# the same generator, so a stream in the middle would repeat training videos.
TRAIN, EVAL = 0, 1

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def longest_caption(config: WorldConfig) -> str:
  """Gives a caption that no video of this world exceeds in length."""
  if config.kind != "balls":
    return scenes.longest_caption(config)
  name = LONGEST_COLOUR
  return _caption(config, [name] * config.num_balls, f"light {name}")


class World:
  """Random access to the videos of a world.

  `world[i]` is a dictionary:
    video: float32 [f, h, w, 3] in [-1, 1].
    caption: str.
    state: the truth: background float32 [3] and colour float32 [k, 3] in
      [0, 1], hue float32 [k] in [0, 1); of balls also position float32 [f, k,
      2] (y, x in pixels) and velocity float32 [k, 2] (pixels a frame, before
      the first bounce); what other kinds have, `scenes` says.

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
    rng = np.random.default_rng((self._seed, index, self._stream))
    if self.config.kind == "balls":
      return self._balls(rng)
    video, state = scenes.draw(self.config, rng, self.frames)
    caption = scenes.caption(self.config, state)
    return {"video": video, "caption": caption, "state": state}

  def _balls(self, rng: np.random.Generator) -> dict[str, Any]:
    config, balls = self.config, self.config.num_balls
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
