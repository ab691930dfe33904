"""Video files: reading any frames of them exactly, and writing.

PyAV brings its own ffmpeg, so no system program is needed. A frame is found by
its presentation time, not by a rate times an index: the times of a file are
listed once from its packets (nothing is decoded for that), which holds for
variable rates, B-frames and odd starts too.

Frames are uint8 [f, h, w, 3] RGB, or float [f, h, w, 3] in [-1, 1].
"""

import contextlib
import functools
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image, ImageDraw, ImageFont

from avd_jax.errors import UserError

SUFFIXES = (".avi", ".mkv", ".mov", ".mp4", ".webm")
WRITABLE = (".gif", ".mkv", ".mp4", ".webp")
IMAGES = (".jpeg", ".jpg", ".png")

_CANVAS, _INK, _GIVEN = (24, 24, 27), (236, 236, 236), (245, 166, 35)
_FONT_SIZE = 13


class VideoInfo(NamedTuple):
  """Length (frames), rate (frames a second) and size (pixels) of a file."""

  frames: int
  fps: float
  height: int
  width: int


class _Index(NamedTuple):
  """A file's frames: their times, None where the container keeps none, and how
  many it says there are."""

  info: VideoInfo
  times: np.ndarray | None
  promised: int


def to_uint8(frames: np.ndarray) -> np.ndarray:
  """Floats in [-1, 1] (clipped to it) to uint8; uint8 is handed back."""
  frames = np.asarray(frames)
  if frames.dtype == np.uint8:
    return frames
  scaled = (np.clip(frames.astype(np.float32), -1, 1) + 1) * 127.5
  return np.rint(scaled).astype(np.uint8)


def to_float(frames: np.ndarray) -> np.ndarray:
  """Uint8 to float32 in [-1, 1]; inverted exactly by `to_uint8`."""
  return np.asarray(frames, np.float32) / np.float32(127.5) - 1


def probe(path: str | os.PathLike) -> VideoInfo:
  """Says how long, fast and large a video is, having decoded a frame of it.

  Returns:
    (frames, fps, height, width).

  Raises:
    UserError: no such file, no video in it, or one that does not decode.
  """
  info = _index(path).info
  read_clip(path, 0, 1)
  return info


def promised(path: str | os.PathLike) -> int:
  """Frames that the container says a file has; more than `probe` finds where it
  was cut off. What says nothing promises what is there.

  Raises:
    UserError: as `probe`.
  """
  return _index(path).promised


def read_clip(
  path: str | os.PathLike, start: int, frames: int, stride: int = 1
) -> np.ndarray:
  """Reads frames start, start + stride, ..., the same as a full decode gives.

  Args:
    path: the file.
    start: first frame, from 0.
    frames: how many.
    stride: distance between two of them, in frames of the file.

  Returns:
    uint8 [frames, h, w, 3].

  Raises:
    UserError: frames that the file does not have or that do not decode.
  """
  info, times, _ = _index(path)
  last = start + (frames - 1) * stride
  if start < 0 or frames < 1 or stride < 1 or last >= info.frames:
    raise UserError(
      f"{path}: asked for {frames} frames from {start} by {stride}, it has "
      f"{info.frames}"
    )
  wanted = range(start, last + 1, stride)
  with _opened(path) as container:
    clip = None if times is None else _read_after_seek(container, times[wanted])
  if clip is None:
    with _opened(path) as container:
      found = itertools.islice(
        container.decode(video=0), start, last + 1, stride
      )
      clip = [f.to_ndarray(format="rgb24") for f in found]
  if len(clip) < frames:
    raise UserError(
      f"{path}: frame {wanted[len(clip)]} does not decode; encode it again or "
      "remove it"
    )
  return np.stack(clip)


def read_image(path: str | os.PathLike) -> np.ndarray:
  """An image file as a video of one frame, uint8 [1, h, w, 3].

  Raises:
    UserError: no such file, or no image.
  """
  try:
    with Image.open(path) as image:
      return np.asarray(image.convert("RGB"))[None]
  except FileNotFoundError:
    raise UserError(f"{path}: no such file") from None
  except (OSError, SyntaxError) as error:  # what damaged files raise
    raise UserError(
      f"{path}: not an image that can be read ({error})"
    ) from error


def cropped(
  have: tuple[int, int], wanted: tuple[int, int]
) -> tuple[float, float]:
  """Shares of height and width that `resize_crop` cuts off.

  Args:
    have: (height, width) of a video.
    wanted: the same, of what it becomes.

  Returns:
    Two numbers in [0, 1); less than a pixel of the video is 0.
  """
  scale = max(to / side for to, side in zip(wanted, have, strict=True))
  height, width = (
    (side - to / scale) / side if side - to / scale >= 1 else 0.0
    for to, side in zip(wanted, have, strict=True)
  )
  return height, width


def resize_crop(frames: np.ndarray, height: int, width: int) -> np.ndarray:
  """Scales to cover height x width, then crops the centre; antialiased.

  Args:
    frames: uint8 [f, h, w, 3] of any size.
    height, width: size wanted, in pixels.

  Returns:
    uint8 [f, height, width, 3].
  """
  have_height, have_width = frames.shape[1:3]
  if (have_height, have_width) == (height, width):
    return frames
  scale = max(height / have_height, width / have_width)
  top = (have_height - height / scale) / 2
  left = (have_width - width / scale) / 2
  # Crop and scale in one resampling: Pillow's filters widen when they shrink.
  box = (left, top, left + width / scale, top + height / scale)
  return np.stack(
    [
      np.asarray(
        Image.fromarray(f).resize(
          (width, height), Image.Resampling.BICUBIC, box=box
        )
      )
      for f in frames
    ]
  )


def enlarge(frames: np.ndarray, scale: int) -> np.ndarray:
  """Nearest-neighbour enlargement of [..., h, w, 3]."""
  if scale == 1:
    return frames
  return frames.repeat(scale, axis=-3).repeat(scale, axis=-2)


def write_video(
  path: str | os.PathLike, frames: np.ndarray, fps: float, scale: int = 1
) -> None:
  """Writes a video; the suffix says how.

  .mp4 is H.264 in 4:2:0, which every browser plays, with the last row or column
  doubled where a side is odd; .mkv (FFV1) and .webp keep every pixel as it is;
  .gif keeps 256 colours a frame and rounds a frame's time to 10 ms.

  Args:
    path: file to write, its folders made where they are missing.
    frames: [f, h, w, 3], uint8 or float in [-1, 1].
    fps: frames a second.
    scale: whole factor to enlarge by, pixels staying sharp.

  Raises:
    UserError: an unknown suffix or frames of another shape.
  """
  path = Path(path)
  suffix = path.suffix.lower()
  if suffix not in WRITABLE:
    raise UserError(f"{path}: cannot write {suffix!r}, give one of {WRITABLE}")
  frames = np.asarray(frames)
  if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
    raise UserError(f"{path}: frames are {frames.shape}, not [f, h, w, 3]")
  frames = enlarge(to_uint8(frames), scale)
  path.parent.mkdir(parents=True, exist_ok=True)
  if suffix in (".gif", ".webp"):
    first, *rest = (Image.fromarray(f) for f in frames)
    options: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
    first.save(
      path,
      save_all=True,
      append_images=rest,
      duration=round(1000 / fps),
      loop=0,
      **options,
    )
  elif suffix == ".mkv":
    _encode(path, frames, fps, "ffv1", "bgr0", {})
  else:
    height, width = frames.shape[1:3]
    even = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
    # The index first, so that a page can play the file while it loads.
    options = {"crf": "16", "movflags": "+faststart"}
    _encode(
      path, np.pad(frames, even, "edge"), fps, "libx264", "yuv420p", options
    )


def side_by_side(
  videos: Sequence[np.ndarray],
  labels: Sequence[str],
  *,
  scale: int = 1,
  gap: int = 6,
  given: int = 0,
) -> np.ndarray:
  """Lays videos out for comparison: a column each, labelled, with a counter.

  Args:
    videos: columns, each [f, h, w, 3] or [b, f, h, w, 3] (b rows), uint8 or
      float in [-1, 1], all of one shape.
    labels: a line of text above each column.
    scale: whole factor to enlarge pixels by.
    gap: pixels between panels and around them.
    given: this many first frames were given, not made; they wear a frame.

  Returns:
    uint8 [f, height, width, 3] for `write_video`.

  Raises:
    UserError: columns of different shapes, or not a label for each.
  """
  columns = [np.asarray(v) for v in videos]
  columns = [c[None] if c.ndim == 4 else c for c in columns]
  shapes = {c.shape for c in columns}
  if len(shapes) != 1 or len(columns) != len(labels):
    raise UserError(
      f"{len(columns)} videos of shapes {sorted(shapes)} with {len(labels)} "
      "labels: give videos of one shape and a label for each"
    )
  columns = [enlarge(to_uint8(c), scale) for c in columns]
  rows, length, height, width, _ = columns[0].shape
  font = ImageFont.load_default(_FONT_SIZE)
  text_width = max(
    font.getlength(text) for text in (*labels, f"frame {length} (given)")
  )
  cell = max(width, int(np.ceil(text_width)))
  line = _FONT_SIZE + 4
  left = [
    gap + i * (cell + gap) + (cell - width) // 2 for i in range(len(labels))
  ]
  top = [gap + line + gap + i * (height + gap) for i in range(rows)]
  foot = top[-1] + height + gap
  canvas = Image.new(
    "RGB", (gap + len(labels) * (cell + gap), foot + line + gap), _CANVAS
  )
  draw = ImageDraw.Draw(canvas)
  for x, label in zip(left, labels, strict=True):
    draw.text((x + width / 2, gap), label, _INK, font, anchor="ma")
  film = np.empty((length, canvas.height, canvas.width, 3), np.uint8)
  edge = gap // 3
  for frame in range(length):
    page = canvas.copy()
    is_given = frame < given
    ImageDraw.Draw(page).text(
      (gap, foot),
      f"frame {frame + 1}" + " (given)" * is_given,
      _GIVEN if is_given else _INK,
      font,
    )
    film[frame] = np.asarray(page)
    for x, column in zip(left, columns, strict=True):
      for y, video in zip(top, column, strict=True):
        if is_given:
          film[
            frame, y - edge : y + height + edge, x - edge : x + width + edge
          ] = _GIVEN
        film[frame, y : y + height, x : x + width] = video[frame]
  return film


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Any]:
  """Opens a container; ffmpeg's errors become the user's, the file named."""
  if not os.path.isfile(path):
    raise UserError(f"{path}: no such file")
  try:
    with av.open(os.fspath(path)) as container:
      if not container.streams.video:
        raise UserError(f"{path}: no video stream in it")
      yield container
  except FFmpegError as error:
    reason = error.strerror or str(error)
    raise UserError(
      f"{path}: not a video that can be read ({reason}); encode it again or "
      "remove it"
    ) from error


def _index(path: str | os.PathLike) -> _Index:
  path = os.path.abspath(path)
  try:
    status = os.stat(path)
  except FileNotFoundError:
    raise UserError(f"{path}: no such file") from None
  return _cached_index(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4096)
def _cached_index(path: str, mtime_ns: int, size: int) -> _Index:
  del mtime_ns, size  # In the key alone: a file written again is read again.
  with _opened(path) as container:
    stream = container.streams.video[0]
    packets = [
      p for p in container.demux(stream) if p.size or p.dts is not None
    ]
    times = [p.pts for p in packets if p.size and not p.is_discard]
    # AVI keeps decoding order only; others may lack or repeat times if damaged.
    timed = "avi" not in container.format.name and None not in times
    timed = timed and len(set(times)) == len(times)
    rate = stream.average_rate or stream.guessed_rate or 0
    height, width = stream.codec_context.height, stream.codec_context.width
    lacking = _lacking(stream, packets, float(rate))
  if timed:
    count, times = len(times), np.sort(np.array(times, np.int64))
  else:
    with _opened(path) as container:
      count, times = sum(1 for _ in container.decode(video=0)), None
  if not count:
    raise UserError(f"{path}: not a frame in it; encode it again or remove it")
  info = VideoInfo(count, float(rate), height, width)
  return _Index(info, times, count + lacking)


def _lacking(stream, packets, rate: float) -> int:
  """Frames that a container counts, or has the time for, and does not hold."""
  if stream.frames:
    return max(0, stream.frames - len(packets))
  # Matroska counts no frames; some writers say how long a stream is.
  said = re.fullmatch(
    r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", "")
  )
  times = [p.pts for p in packets if p.pts is not None]
  if not (said and times and rate):
    return 0
  hours, minutes, seconds = map(float, said.groups())
  whole = 3600 * hours + 60 * minutes + seconds
  left = whole * rate - (float(max(times) * stream.time_base) * rate + 1)
  return round(left) if left >= 1 else 0


def _read_after_seek(container, times: np.ndarray) -> list[np.ndarray] | None:
  """Decodes from the keyframe before `times`; None where that fails."""
  stream = container.streams.video[0]
  try:
    container.seek(int(times[0]), stream=stream)
  except FFmpegError:
    return None
  remaining, clip, first = iter(times), [], True
  time = next(remaining)
  for packet in container.demux(stream):
    # Frames shown before the keyframe may lean on what was skipped.
    if first and (packet.pts is None or packet.pts > times[0]):
      return None
    first = False
    for frame in packet.decode():
      if frame.pts == time:
        clip.append(frame.to_ndarray(format="rgb24"))
        time = next(remaining, None)
        if time is None:
          return clip
  return None


def _encode(
  path: Path,
  frames: np.ndarray,
  fps: float,
  codec: str,
  pixels: str,
  options: dict[str, str],
) -> None:
  with av.open(os.fspath(path), "w") as container:
    rate = Fraction(fps).limit_denominator(1001)
    # Typed by the codec's name, which is no literal here.
    stream: Any = container.add_stream(codec, rate=rate, options=options)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = pixels
    for frame in frames:
      picture = av.VideoFrame.from_ndarray(
        np.ascontiguousarray(frame), format="rgb24"
      )
      container.mux(stream.encode(picture))
    container.mux(stream.encode(None))
