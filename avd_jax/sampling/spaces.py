"""What a model's videos are made of: pixels, or latents of Wan's VAE."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from ml_collections import ConfigDict

from avd_jax.data import video
from avd_jax.errors import UserError
from avd_jax.models import vae
from avd_jax.models.vae import VAEConfig
from avd_jax.wan import importing

# Latents [1 f h w c] -> their frames [F H W 3], in parts, as a stream: what
# comes later follows on what came before. Nothing is waited for.
Decode = Callable[[jax.Array], list[jax.Array]]


@runtime_checkable
class Space(Protocol):
  """Between the frames that people see and those that a model makes.

  Attributes:
    fps: frames a second, where nobody says otherwise.
    frames: of a video, the same.
    side: pixels of which height and width are a multiple.
  """

  fps: float
  frames: int
  side: int

  def size(self, height: int | None, width: int | None) -> tuple[int, int]:
    """Pixels of a frame; None is the run's own. Raises UserError."""
    ...

  def grid(self, height: int, width: int) -> tuple[int, int]:
    """Latents of a frame of so many pixels."""
    ...

  def cover(self, frames: int) -> int:
    """Latent frames that so many frames need."""
    ...

  def begins(self, latent: int) -> int:
    """The first frame that a latent frame becomes."""
    ...

  def check_given(self, frames: int) -> None:
    """Refuses first frames that are no whole latent frames."""
    ...

  def encode(self, clip: np.ndarray) -> np.ndarray:
    """Frames [F H W 3], uint8 (or float, of pixels), to latents [1 f h w c]."""
    ...

  def decode(self, height: int, width: int) -> Decode:
    """What decodes a video of so many pixels, once, from its start."""
    ...


class Pixels:
  """Models that make pixels."""

  def __init__(self, config: ConfigDict):
    self._data, self._model = config.data, config.model
    self.fps, self.frames, self.side = (
      12.0,
      config.data.frames,
      config.model.patch,
    )

  def size(self, height: int | None, width: int | None) -> tuple[int, int]:
    """As `Space`."""
    own = (self._data.height, self._data.width)
    wanted = (
      own[0] if height is None else height,
      own[1] if width is None else width,
    )
    if wanted != own and self._model.spatial_embedding is not None:
      raise UserError(
        f"--height and --width: this run has places of its own for {own[0]}x"
        f"{own[1]} (model.spatial_embedding), no others can be made"
      )
    return _sized(*wanted, self.side)

  def grid(self, height: int, width: int) -> tuple[int, int]:
    """As `Space`."""
    return height, width

  def cover(self, frames: int) -> int:
    """As `Space`."""
    return frames

  def begins(self, latent: int) -> int:
    """As `Space`."""
    return latent

  def check_given(self, frames: int) -> None:
    """As `Space`."""

  def encode(self, clip: np.ndarray) -> np.ndarray:
    """As `Space`."""
    return (video.to_float(clip) if clip.dtype == np.uint8 else clip)[None]

  def decode(self, height: int, width: int) -> Decode:
    """As `Space`."""
    return lambda latents: [latents[0]]


class Wan:
  """Models that make latents of a VAE, which is loaded when first needed.

  Args:
    config: the run's.
    checkpoint: what `importing.run` wrote.

  Raises:
    UserError: no VAE there, or one of other latents than the model's.
  """

  def __init__(self, config: ConfigDict, checkpoint: str | Path):
    self._checkpoint, self._data = checkpoint, config.data
    folder = importing.component(checkpoint, "vae")
    self._cfg = importing.read_config(VAEConfig, folder)
    if self._cfg.z_dim != config.model.channels:
      raise UserError(
        f"{folder}: latents of {self._cfg.z_dim} channels, the model makes"
        f" {config.model.channels}: give its own VAE"
      )
    self.fps, self.frames = 16.0, self._cfg.frames(config.data.frames)
    self.side = self._cfg.spatial_factor * config.model.patch

  @functools.cached_property
  def _encode(self) -> Any:
    return jax.jit(functools.partial(vae.encode, self._cfg))

  @functools.cached_property
  def _params(self) -> Any:
    return importing.load_vae(self._checkpoint)[1]

  def size(self, height: int | None, width: int | None) -> tuple[int, int]:
    """As `Space`."""
    factor = self._cfg.spatial_factor
    height = self._data.height * factor if height is None else height
    width = self._data.width * factor if width is None else width
    return _sized(height, width, self.side)

  def grid(self, height: int, width: int) -> tuple[int, int]:
    """As `Space`."""
    return self._cfg.grid(height, width)

  def cover(self, frames: int) -> int:
    """As `Space`."""
    return 1 + -(-(frames - 1) // self._cfg.temporal_factor)

  def begins(self, latent: int) -> int:
    """As `Space`."""
    return self._cfg.frames(latent) if latent else 0

  def check_given(self, frames: int) -> None:
    """As `Space`."""
    step = self._cfg.temporal_factor
    if frames and (frames - 1) % step:
      nearest = 1 + step * round((frames - 1) / step)
      raise UserError(
        f"--given {frames}: the VAE takes 1 + a multiple of {step} frames,"
        f" {nearest} is the nearest"
      )

  def encode(self, clip: np.ndarray) -> np.ndarray:
    """As `Space`."""
    return np.asarray(self._encode(self._params, video.to_float(clip)[None]))

  def decode(self, height: int, width: int) -> Decode:
    """As `Space`; a latent frame at a time, memory that of one."""
    params = {"decoder": self._params["decoder"]}
    cache = vae.decoder_cache(self._cfg, 1, height, width)
    first = True

    def decode(latents: jax.Array) -> list[jax.Array]:
      nonlocal cache, first
      frames = []
      for i in range(latents.shape[1]):
        made, cache = _decode(
          self._cfg, params, latents[:, i : i + 1], cache, first=first
        )
        frames.append(made[0])
        first = False
      return frames

    return decode


_decode = jax.jit(
  vae.decode_step,
  static_argnames=("cfg", "first", "clamp"),
  donate_argnames="cache",
)


def _sized(height: int, width: int, side: int) -> tuple[int, int]:
  for name, value in (("height", height), ("width", width)):
    if value < 1 or value % side:
      nearest = side * max(1, round(value / side))
      raise UserError(
        f"--{name} {value}: give a multiple of {side}, {nearest} is the nearest"
      )
  return height, width


def of(config: ConfigDict, workdir: str | Path, wan: str | None) -> Space:
  """What a run's videos are made of.

  Args:
    config: the run's.
    workdir: the run; an imported checkpoint has a VAE of its own.
    wan: an imported checkpoint whose VAE decodes the run's latents.

  Raises:
    UserError: latents that nothing decodes.
  """
  if config.model.text != "embeddings":
    return Pixels(config)
  return Wan(config, companion(workdir, wan, "vae"))


def companion(workdir: str | Path, wan: str | None, part: str) -> str | Path:
  """The checkpoint that has a part which a run works with: itself, or `wan`.

  Raises:
    UserError: none has.
  """
  if wan is not None:
    importing.component(wan, part)
    return wan
  if not (Path(workdir) / importing.PLACES[part]).is_dir():
    raise UserError(
      f"{workdir} makes latents and has no {part} of its own: give --wan CKPT,"
      " a directory that avd import-wan wrote"
    )
  return workdir
