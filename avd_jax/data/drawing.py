"""A world's settings, and what its frames are drawn with.

Positions are (y, x) in pixels, the origin at the frame's upper left corner, so
that the centre of the first pixel is (.5, .5). Colours are RGB in [0, 1];
videos are in [-1, 1].
"""

import dataclasses

import numpy as np

from avd_jax.errors import UserError

# Of worlds: balls that bounce, and the scenes of `scenes`.
KINDS = ("balls", "pan", "occluder", "pour", "ink", "fall")

_HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")
LONGEST_COLOUR = max(_HUES, key=len)


@dataclasses.dataclass(frozen=True)
class WorldConfig:
  """What is in a world.

  Attributes:
    kind: which scene, one of KINDS; `scenes` says what each one shows.
    height, width: size of a frame in pixels.
    num_balls: balls in every video; they pass through each other, later ones
      in front. Only "balls" has more than one.
    radius: of a ball, in pixels; the standard deviation of a fresh drop of ink.
    speed: of a ball or the camera, in pixels a frame; what falls, pours or
      spreads is faster in proportion.
    background_low, background_high: range of each channel of the background.
    caption_detail: "count" names how many balls there are; "colour" names
      their colours and the background's too.

  Raises:
    UserError: balls that do not fit the frame, or a value outside its range.
  """

  kind: str = "balls"
  height: int = 12
  width: int = 12
  num_balls: int = 1
  radius: float = 2.0
  speed: float = 1.25
  background_low: float = 0.1
  background_high: float = 0.5
  caption_detail: str = "count"

  def __post_init__(self):
    if self.kind not in KINDS:
      raise UserError(f"kind={self.kind!r}: give one of {KINDS}")
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
    if self.kind != "balls":
      self._check_scene()

  def _check_scene(self):
    scene = f"kind={self.kind!r}"
    if self.num_balls != 1:
      raise UserError(f"num_balls={self.num_balls}: {scene} takes 1")
    if self.speed == 0:
      raise UserError(f"speed=0.0: in {scene} something moves; give more")
    if min(self.height, self.width) < 12:
      raise UserError(
        f"height={self.height}, width={self.width}: {scene} needs 12 or more"
      )
    # On both sides of a bar that hides the ball, the ball is seen whole.
    most = (self.width - 2) / 6
    if self.kind == "occluder" and self.radius > most:
      raise UserError(
        f"radius={self.radius}: beside the bar of {scene} a ball shows whole "
        f"in a frame of width={self.width} with {most:.2f} or less"
      )
    # Ink must have room to spread in.
    most = min(self.height, self.width) / 6.5
    if self.kind == "ink" and self.radius > most:
      raise UserError(
        f"radius={self.radius}: {scene} in a frame of {self.height}x"
        f"{self.width} pixels takes {most:.2f} or less"
      )


def hue_to_rgb(hue: np.ndarray) -> np.ndarray:
  """Gives the fully saturated colour of a hue: [...] in [0, 1] -> [..., 3]."""
  k = (np.array([5.0, 3.0, 1.0]) + np.asarray(hue)[..., None] * 6) % 6
  return 1 - np.clip(np.minimum(k, 4 - k), 0, 1)


def bounce(
  start: np.ndarray | float,
  velocity: np.ndarray | float,
  time: np.ndarray,
  low,
  high,
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
