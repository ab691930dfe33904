"""Sources of recorded videos: a folder of files, a TFDS data set.

Both have the face the pipeline reads (`len`, `source[i]`, `clip(i, rng)`) and
give clips of one size, float32 [f, h, w, 3] in [-1, 1]. A record that turns out
unreadable or too short gives way to the next one, the same one every time, so
that a damaged file neither stops a long run nor makes it unrepeatable.
"""

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from avd_jax.data import video
from avd_jax.errors import UserError

_log = logging.getLogger(__name__)

# Records tried in a row before a source is called unreadable.
_TRIES = 64
# Frames decoded in a row while a whole file is read: bounds the memory.
_AT_ONCE = 64


class VideoFolderSource:
  """The videos of a folder and of all folders in it, by sorted path.

  Files are probed when the source is made; those that cannot be read or are too
  short are skipped, counted and named in a log line. A caption is the text of
  the .txt file beside a video, "" without one.

  Attributes:
    paths: of the usable files.
    captions: of each.
    infos: of each, video.VideoInfo.

  Args:
    path: the folder.
    frames: of a clip.
    height, width: of a clip, pixels; videos are scaled to cover, then cropped.
    stride: every stride-th frame.
    fps: if given, the stride nearest to this rate, file by file.
    split: "train" or "eval".
    eval_files: files held out for "eval", spread evenly over all files found
      (before any is skipped, so that clips of another length, or a file gone
      bad, do not move others between the splits). With 0 the splits are the
      same, and "eval" says so in the log.
    cache_mb: a folder whose frames fit in this, at the size of a clip, is
      decoded once, file by file, and kept; 0 decodes every clip anew.

  Raises:
    UserError: no such folder, no video in it, none readable, none long enough,
      more held out than there are, or a caption that is not UTF-8.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    frames: int,
    height: int,
    width: int,
    stride: int = 1,
    fps: float | None = None,
    split: str = "train",
    eval_files: int = 0,
    cache_mb: int = 0,
  ):
    self._size = (height, width)
    self._frames, self._stride, self._fps = frames, stride, fps
    self._warned: set[int] = set()
    files = _hold_out(path, find(path), split, eval_files)
    with ThreadPoolExecutor(min(8, len(files))) as pool:
      probed = list(pool.map(_probe, files))
    good = [
      (file, info)
      for file, info in zip(files, probed, strict=True)
      if isinstance(info, video.VideoInfo)
    ]
    bad = [str(error) for error in probed if isinstance(error, UserError)]
    if not good:
      raise UserError(
        f"{path}: none of its {len(files)} video files can be read; the first: "
        f"{bad[0]}"
      )
    long = [(f, info) for f, info in good if self._span(info) <= info.frames]
    if not long:
      file, info = max(good, key=lambda pair: pair[1].frames)
      raise UserError(
        f"{path}: every video is shorter than a clip; the longest, "
        f"{file.name}, has {info.frames} frames and {self._span(info)} are "
        f"needed (frames={frames}, stride={self._stride_of(info)}); lower "
        "frames or stride"
      )
    bad += [
      f"{f}: {info.frames} frames, {self._span(info)} needed"
      for f, info in good
      if self._span(info) > info.frames
    ]
    if bad:
      _log.warning(
        "%s: skipped %d of %d files: %s",
        path,
        len(bad),
        len(files),
        "; ".join(bad),
      )
    self.paths = [f for f, _ in long]
    self.infos = [info for _, info in long]
    self.captions = [caption_beside(f) for f in self.paths]
    total = sum(info.frames for info in self.infos) * height * width * 3
    self._keep = total <= cache_mb << 20
    self._kept: dict[int, np.ndarray | None] = {}
    self._locks = [threading.Lock() for _ in self.paths]

  def __len__(self) -> int:
    return len(self.paths)

  def __repr__(self) -> str:
    return f"VideoFolderSource({len(self)} videos, clips of {self._frames})"

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The middle clip of video `index`."""
    return self._clip(index, 0.5)

  def clip(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """A clip of video `index` that starts anywhere, with equal chance."""
    return self._clip(index, rng.random())

  def _clip(self, index: int, where: float) -> dict[str, Any]:
    def read(i: int) -> dict[str, Any]:
      info = self.infos[i]
      start = int(where * (info.frames - self._span(info) + 1))
      stride = self._stride_of(info)
      whole = self._whole(i)
      if whole is not None:
        frames = whole[start : start + self._span(info) : stride]
      else:
        frames = video.read_clip(self.paths[i], start, self._frames, stride)
        frames = video.resize_crop(frames, *self._size)
      return {"video": video.to_float(frames), "caption": self.captions[i]}

    return _first_readable(read, index, len(self), self._warned)

  def _whole(self, i: int) -> np.ndarray | None:
    """All frames of video i at the clip's size, or None if they are not kept.

    A file that does not decode to its end is not kept: its good clips can
    still be read one by one.
    """
    if not self._keep:
      return None
    with self._locks[i]:
      if i not in self._kept:
        count = self.infos[i].frames
        parts = []
        try:
          for start in range(0, count, _AT_ONCE):
            part = min(_AT_ONCE, count - start)
            part = video.read_clip(self.paths[i], start, part)
            parts.append(video.resize_crop(part, *self._size))
          self._kept[i] = np.concatenate(parts)
        except UserError:
          self._kept[i] = None
      return self._kept[i]

  # Worker processes get a copy of the source; locks stay behind.
  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_locks": None, "_kept": {}}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._locks = [threading.Lock() for _ in self.paths]

  def _stride_of(self, info: video.VideoInfo) -> int:
    if self._fps is None:
      return self._stride
    return max(1, round(info.fps / self._fps))

  def _span(self, info: video.VideoInfo) -> int:
    return (self._frames - 1) * self._stride_of(info) + 1


class TfdsSource:
  """The videos of a TensorFlow Datasets split, without TensorFlow.

  The data set must have been prepared as array_record, and its frames must be a
  Tensor or a Sequence of Image: TFDS needs TensorFlow for its Video feature and
  for other formats.

  Args:
    name: of the data set; "" where data_dir is its own folder.
    data_dir: where data sets lie, or the folder of one version of one, with its
      dataset_info.json.
    split: as TFDS writes it, slices too: "train[:90%]".
    frames, height, width, stride: as for VideoFolderSource.
    fps: None; the data carries no rate.
    video_key: feature with the frames, uint8 [f, h, w, 3]; "a/b" is feature b
      of feature a.
    caption_key: feature with the text; "" leaves captions empty.

  Raises:
    UserError: the data set, split or feature is not there, or needs TensorFlow.
  """

  def __init__(
    self,
    name: str,
    data_dir: str | os.PathLike,
    split: str,
    frames: int,
    height: int,
    width: int,
    stride: int = 1,
    fps: float | None = None,
    video_key: str = "video",
    caption_key: str = "",
  ):
    if fps is not None:
      raise UserError(f"fps={fps}: a TFDS data set has no rate, give a stride")
    self._what = f"TFDS data set {name or data_dir!r}, split {split!r}"
    self._size = (height, width)
    self._frames, self._stride = frames, stride
    self._keys = (video_key, caption_key)
    self._warned: set[int] = set()
    self._records = _open_tfds(name, data_dir, split, self._what)
    if not len(self._records):
      raise UserError(f"{self._what}: no records in it")
    first = self._read(0)
    if first.ndim != 4 or first.shape[-1] != 3 or first.dtype != np.uint8:
      raise UserError(
        f"{self._what}: feature {video_key!r} is {first.dtype} of shape "
        f"{first.shape}, not uint8 [f, h, w, 3]"
      )

  def __len__(self) -> int:
    return len(self._records)

  def __repr__(self) -> str:
    return f"TfdsSource({self._what}, {len(self)} records)"

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The middle clip of record `index`."""
    return self._clip(index, 0.5)

  def clip(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """A clip of record `index` that starts anywhere, with equal chance."""
    return self._clip(index, rng.random())

  def _clip(self, index: int, where: float) -> dict[str, Any]:
    span = (self._frames - 1) * self._stride + 1

    def read(i: int) -> dict[str, Any]:
      record = self._records[i]
      frames = self._feature(record, self._keys[0])
      if len(frames) < span:
        raise UserError(
          f"{self._what}: record {i} has {len(frames)} frames, {span} are "
          "needed; lower frames or stride"
        )
      start = int(where * (len(frames) - span + 1))
      clip = np.asarray(frames[start : start + span : self._stride])
      caption = self._feature(record, self._keys[1]) if self._keys[1] else ""
      if isinstance(caption, bytes):
        caption = caption.decode()
      clip = video.to_float(video.resize_crop(clip, *self._size))
      return {"video": clip, "caption": str(caption)}

    return _first_readable(read, index, len(self), self._warned)

  def _read(self, index: int) -> np.ndarray:
    record = self._records[index]
    if self._keys[1]:
      self._feature(record, self._keys[1])
    return np.asarray(self._feature(record, self._keys[0]))

  def _feature(self, record: Any, key: str) -> Any:
    for part in key.split("/"):
      if not isinstance(record, dict) or part not in record:
        have = sorted(record) if isinstance(record, dict) else "no features"
        raise UserError(f"{self._what}: no feature {key!r}; it has {have}")
      record = record[part]
    return record


def find(path: str | os.PathLike) -> list[Path]:
  """The video files of a folder and of all folders in it, by sorted path.

  Raises:
    UserError: no such folder, or no video in it.
  """
  folder = Path(path)
  if not os.fspath(path) or not folder.is_dir():
    raise UserError(
      f"path={os.fspath(path)!r}: no such folder; give one with video files"
    )
  files = sorted(
    file
    for file in folder.rglob("*")
    if file.suffix.lower() in video.SUFFIXES
    and not file.name.startswith(".")
    and file.is_file()
  )
  if not files:
    raise UserError(
      f"{path}: no video in it or below it (looked for "
      f"{', '.join(video.SUFFIXES)})"
    )
  return files


def _hold_out(
  path: str | os.PathLike, files: list[Path], split: str, eval_files: int
) -> list[Path]:
  if not eval_files:
    if split == "eval":
      _log.warning(
        "%s: eval_files=0, so evaluation reads the videos of training", path
      )
    return files
  if eval_files >= len(files):
    raise UserError(
      f"{path}: eval_files={eval_files} leaves none of {len(files)} videos to "
      "train on; lower it"
    )
  held = {int((j + 0.5) * len(files) / eval_files) for j in range(eval_files)}
  return [f for i, f in enumerate(files) if (i in held) == (split == "eval")]


def _probe(file: Path) -> video.VideoInfo | UserError:
  try:
    return video.probe(file)
  except UserError as error:
    return error


def caption_beside(file: Path) -> str:
  """The text of the .txt beside a video, "" without one.

  Raises:
    UserError: text that is not UTF-8.
  """
  beside = file.with_suffix(".txt")
  if not beside.is_file():
    return ""
  try:
    return beside.read_text(encoding="utf-8").strip()
  except UnicodeDecodeError:
    raise UserError(f"{beside}: not UTF-8 text; save it as such") from None


def _first_readable(
  read: Callable[[int], dict[str, Any]],
  index: int,
  count: int,
  warned: set[int],
) -> dict[str, Any]:
  """Reads record `index`, or the next one that can be read."""
  if not 0 <= index < count:
    raise IndexError(f"video {index} of {count}")
  problem = None
  for step in range(min(count, _TRIES)):
    i = (index + step) % count
    try:
      return read(i)
    except UserError as error:
      problem = problem or error
      if i not in warned:
        warned.add(i)
        _log.warning("took the next video instead: %s", error)
  raise UserError(f"{min(count, _TRIES)} in a row cannot be used: {problem}")


def _open_tfds(
  name: str, data_dir: str | os.PathLike, split: str, what: str
) -> Any:
  # Not at the top: it is slow to import, and only this needs it.
  import tensorflow_datasets as tfds

  advice = (
    "prepare it with file_format='array_record' and frames as a Tensor or a "
    "Sequence of Image"
  )
  try:
    if (Path(data_dir) / "dataset_info.json").is_file():
      builder: Any = tfds.builder_from_directory(os.fspath(data_dir))
      return builder.as_data_source(split=split)
    return tfds.data_source(
      name, split=split, data_dir=os.fspath(data_dir) or None, download=False
    )
  except Exception as error:  # TFDS raises a type of its own per cause.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    needs_more = isinstance(error, ModuleNotFoundError | NotImplementedError)
    raise UserError(
      f"{what}: cannot be opened ({lines[0]})" + f"; {advice}" * needs_more
    ) from error
