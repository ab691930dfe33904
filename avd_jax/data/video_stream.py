"""Video files that are written while their frames are still being made.

An .mp4 grows by fragments of one frame each, behind a header that needs no end:
it plays while it is written, but for its very last frame, and stays playable
whatever happens to its writer. For that H.264 must not look ahead, which costs
some compression. .mkv grows too; .gif and .webp are written at the end.
"""

import os
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from avd_jax.data import video
from avd_jax.errors import UserError

# codec, pixel format, the codec's options, the container's.
_CODECS = {
  ".mp4": (
    "libx264",
    "yuv420p",
    {"crf": "16", "tune": "zerolatency", "g": "48"},
    {"movflags": "+frag_every_frame+empty_moov+default_base_moof"},
  ),
  ".mkv": ("ffv1", "bgr0", {}, {}),
}


class VideoWriter:
  """Writes a video as its frames come; a context manager.

  Left by an error or by Ctrl-C, it closes the file over what was written.

  Args:
    path: file to write; the suffix says how, as for `video.write_video`. Its
      folders are made where they are missing.
    fps: frames a second.
    scale: whole factor to enlarge by, pixels staying sharp.

  Raises:
    UserError: an unknown suffix, or a file that cannot be written.
  """

  def __init__(self, path: str | os.PathLike, fps: float, scale: int = 1):
    self.path, self.fps = Path(path), fps
    self.frames = 0
    self._scale, self._kept = scale, []
    self._container: Any = None
    check_writable(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)

  def write(self, frames: np.ndarray) -> None:
    """Adds frames [f h w 3], uint8 or float in [-1, 1].

    Raises:
      UserError: the file cannot be written.
    """
    frames = video.enlarge(video.to_uint8(frames), self._scale)
    if self.path.suffix.lower() in _CODECS:
      self._encode(frames)
    else:
      self._kept.append(frames)
    self.frames += len(frames)

  def close(self) -> None:
    """Ends the file.

    Raises:
      UserError: the file cannot be written.
    """
    if self._kept:
      kept, self._kept = np.concatenate(self._kept), []
      try:
        video.write_video(self.path, kept, self.fps)
      except OSError as error:
        raise UserError(f"{self.path}: {error.strerror or error}") from error
    if self._container is not None:
      container, self._container = self._container, None
      try:
        container.mux(self._stream.encode(None))
        container.close()
      except FFmpegError as error:
        raise self._failed(error) from error

  def _open(self, height: int, width: int) -> None:
    codec, pixels, options, movie = _CODECS[self.path.suffix.lower()]
    rate = Fraction(self.fps).limit_denominator(1001)
    self._container = av.open(
      os.fspath(self.path), "w", options=movie | {"flush_packets": "1"}
    )
    self._stream: Any = self._container.add_stream(
      codec, rate=rate, options=options
    )
    self._stream.height, self._stream.width = height, width
    self._stream.pix_fmt = pixels

  def _encode(self, frames: np.ndarray) -> None:
    if self.path.suffix.lower() == ".mp4":  # 4:2:0 takes even sizes only
      odd = [size % 2 for size in frames.shape[1:3]]
      frames = np.pad(
        frames, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), "edge"
      )
    try:
      if self._container is None:
        self._open(*frames.shape[1:3])
      for frame in frames:
        picture = av.VideoFrame.from_ndarray(
          np.ascontiguousarray(frame), format="rgb24"
        )
        self._container.mux(self._stream.encode(picture))
    except FFmpegError as error:
      raise self._failed(error) from error

  def _failed(self, error: FFmpegError) -> UserError:
    return UserError(f"{self.path}: {error.strerror or error}")

  def __enter__(self) -> "VideoWriter":
    return self

  def __exit__(self, *error: object) -> None:
    self.close()


def check_writable(path: str | os.PathLike) -> None:
  """Refuses a file that could not be written, having written nothing.

  Raises:
    UserError: an unknown suffix, a directory, or a place that takes no files.
  """
  path = Path(path)
  if path.suffix.lower() not in video.WRITABLE:
    raise UserError(f"{path}: give one of {', '.join(video.WRITABLE)}")
  if path.is_dir():
    raise UserError(f"{path} is a directory: give a file")
  place = path if path.exists() else path.absolute().parent
  while not place.exists():
    place = place.parent
  try:
    if place == path:
      path.open("ab").close()
    else:  # a file without a name, gone when it is closed
      tempfile.TemporaryFile(dir=place).close()
  except OSError as error:
    raise UserError(
      f"{path}: {place} cannot be written to ({error.strerror})"
    ) from error
