"""Real videos and captions to latents and embeddings, once and for all.

Training on them then reads arrays: no decoding, no VAE, no text encoder. Videos
are dealt to processes by their place in the sorted list; each works through its
own, a shard at a time, and goes on after its last whole shard when it is
started again.
"""

import csv
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from avd_jax.data import latent_store, sources, video
from avd_jax.errors import UserError
from avd_jax.wan.codec import TEXT_LENGTH, Encoder

_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Options:
  """Which clips, and whose share of them.

  Attributes:
    frames, height, width: of a clip, in pixels; videos are scaled to cover,
      then cropped.
    fps: every n-th frame is taken to come near to this rate; None takes all.
    clips_per_video: spread evenly over each; fewer where it is too short for
      different ones.
    shard_size: records of a shard.
    process_index, process_count: this process, of how many.

  Raises:
    UserError: a value outside its range.
  """

  frames: int = 81
  height: int = 480
  width: int = 832
  fps: float | None = 16.0
  clips_per_video: int = 1
  shard_size: int = 64
  process_index: int = 0
  process_count: int = 1

  def __post_init__(self):
    for field in ("clips_per_video", "shard_size", "process_count"):
      value = getattr(self, field)
      if value < 1:
        raise UserError(f"--{field.replace('_', '-')} {value}: at least 1")
    if self.fps is not None and not self.fps > 0:
      raise UserError(f"--fps {self.fps}: must be positive")
    if not 0 <= self.process_index < self.process_count:
      raise UserError(
        f"--process-index {self.process_index}: give 0 to --process-count"
        f" {self.process_count} - 1"
      )


def read_captions(file: str | Path) -> dict[str, str]:
  """Captions by file name, from JSON or from a table.

  Args:
    file: .json, an object {"file name": "caption"}; .csv or .tsv, with columns
      `file` and `caption`. A name is a path below the videos' folder, or its
      last part.

  Raises:
    UserError: no such file, or not one of these.
  """
  file = Path(file)
  suffix = file.suffix.lower()
  if suffix not in (".json", ".csv", ".tsv"):
    raise UserError(f"--captions {file}: give a .json, .csv or .tsv")
  try:
    text = file.read_text(encoding="utf-8-sig")
  except FileNotFoundError:
    raise UserError(f"--captions {file}: no such file") from None
  except UnicodeDecodeError:
    raise UserError(f"--captions {file}: not UTF-8 text") from None
  if suffix == ".json":
    return _from_json(file, text)
  return _from_table(file, text, "\t" if suffix == ".tsv" else ",")


def _from_json(file: Path, text: str) -> dict[str, str]:
  try:
    found = json.loads(text)
  except json.JSONDecodeError as error:
    raise UserError(f"--captions {file}: not valid JSON: {error}") from None
  values = found.values() if isinstance(found, dict) else [None]
  if not all(isinstance(caption, str) for caption in values):
    raise UserError(
      f'--captions {file}: give an object {{"file name": "caption"}}'
    )
  return found


def _from_table(file: Path, text: str, delimiter: str) -> dict[str, str]:
  rows = csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter)
  if not {"file", "caption"} <= set(rows.fieldnames or ()):
    raise UserError(
      f"--captions {file}: its first line must name the columns file and"
      f" caption, separated by {delimiter!r}; it names {rows.fieldnames}"
    )
  found: dict[str, str] = {}
  for row in rows:
    name, caption = row["file"], row["caption"]
    if not name or caption is None:
      raise UserError(
        f"--captions {file}: line {rows.line_num} lacks a file or a caption"
      )
    if found.setdefault(name, caption) != caption:
      raise UserError(f"--captions {file}: two captions for {name}")
  return found


class _Videos(NamedTuple):
  """The videos of a folder, and what is known about their captions."""

  folder: Path
  names: list[str]
  captions: Mapping[str, str] | None

  def caption(self, name: str) -> str | None:
    """Of a video; None where it has none."""
    if self.captions is not None:
      return self.captions.get(name, self.captions.get(Path(name).name))
    return sources.caption_beside(self.folder / name) or None


def _find(folder: str | Path, captions: str | Path | None) -> _Videos:
  if not Path(folder).is_dir():
    raise UserError(f"--videos {folder}: no such folder")
  known = None if captions is None else read_captions(captions)
  root = Path(folder)
  names = [file.relative_to(root).as_posix() for file in sources.find(root)]
  videos = _Videos(root, names, known)
  if known is not None and all(videos.caption(n) is None for n in names):
    raise UserError(
      f"--captions {captions}: names none of the {len(names)} videos of"
      f" {folder}; the first of those is {names[0]}"
    )
  return videos


class _Read(NamedTuple):
  """A clip that was read, or why it was not; then comes clip `after`."""

  video: int
  after: tuple[int, int]
  header: dict[str, Any]
  clip: np.ndarray | None = None
  reason: str = ""


def _clips(
  videos: _Videos, options: Options, begin: tuple[int, int]
) -> Iterator[_Read]:
  """This process's clips, in order, from `begin` on: _Read after _Read."""
  mine = range(options.process_index, len(videos.names), options.process_count)
  for place in mine:
    if place >= begin[0]:
      yield from _of_video(
        videos, place, options, begin[1] if place == begin[0] else 0
      )


def _of_video(
  videos: _Videos, place: int, options: Options, begin: int
) -> Iterator[_Read]:
  name, past = videos.names[place], (place + 1, 0)
  file, known = videos.folder / name, {"file": name}
  try:
    info = video.probe(file)
    promised = video.promised(file)
    if promised > info.frames:
      known |= {"frames": info.frames, "promised": promised}
    stride = max(1, round(info.fps / options.fps)) if options.fps else 1
    starts = _starts(file, info.frames, stride, options)
    known |= _provenance(file) | {"fps": info.fps / stride, "stride": stride}
    known["caption"] = videos.caption(name)
  except (UserError, OSError) as error:
    yield _Read(place, past, known, reason=str(error))
    return
  for i, start in enumerate(starts[begin:], begin):
    after = (place, i + 1) if i + 1 < len(starts) else past
    here = known | {"start": start}
    try:
      clip = video.read_clip(file, start, options.frames, stride)
    except (UserError, OSError) as error:
      yield _Read(place, after, here, reason=str(error))
      continue
    clip = video.resize_crop(clip, options.height, options.width)
    yield _Read(place, after, here, clip)


def _starts(
  file: Path, length: int, stride: int, options: Options
) -> list[int]:
  """First frames of a video's clips, evenly spread.

  Raises:
    UserError: it is too short for one.
  """
  span = (options.frames - 1) * stride + 1
  if length < span:
    raise UserError(f"{file}: {length} frames, {span} needed")
  count, room = options.clips_per_video, length - span + 1
  return sorted({int((i + 0.5) * room / count) for i in range(count)})


def _provenance(file: Path) -> dict[str, Any]:
  with file.open("rb") as content:
    digest = hashlib.sha256(content.read(_MIB)).hexdigest()
  return {"bytes": file.stat().st_size, "sha256_of_first_mib": digest}


def _ahead(reads: Iterator[_Read]) -> Iterator[_Read]:
  """The same, the next one being read while the last one is worked on."""
  with ThreadPoolExecutor(1) as pool:
    waiting = pool.submit(next, reads, None)
    while (read := waiting.result()) is not None:
      waiting = pool.submit(next, reads, None)
      yield read


def run(
  encoder: Encoder,
  videos: str | Path,
  captions: str | Path | None,
  out: str | Path,
  options: Options,
  on_clips: Callable[[int, int], Any] = lambda done, total: None,
) -> latent_store.Progress:
  """Encodes this process's videos into a store, or the rest of them.

  Args:
    encoder: what encodes them.
    videos: their folder; see data.sources.
    captions: file of captions (see `read_captions`); None reads the .txt beside
      each video.
    out: the store; see data.latent_store.
    options: which clips.
    on_clips: hears how many clips are done, of how many at most.

  Returns:
    What the part holds and what was skipped.

  Raises:
    UserError: no videos, captions that cannot be read, clips that the VAE
      cannot take, a store that was begun with other settings, or an `out` that
      is something else.
  """
  latent_store.check_place(out)
  shape = encoder.shape(options.frames, options.height, options.width)
  found = _find(videos, captions)
  me = options.process_index
  latent_store.claim(out, _spec(encoder, shape, found, captions, options), me)
  latent_store.write_null(out, me, encoder.text("")[0])
  done = latent_store.progress(out, me)
  if not done.finished:
    _work(encoder, found, out, options, done, on_clips)
  return done


def _spec(
  encoder: Encoder,
  shape: tuple[int, ...],
  videos: _Videos,
  captions: str | Path | None,
  options: Options,
) -> latent_store.Spec:
  names = hashlib.sha256("\n".join(videos.names).encode()).hexdigest()[:16]
  told = "the .txt beside each video"
  if captions is not None:
    told = hashlib.sha256(Path(captions).read_bytes()).hexdigest()[:16]
  return latent_store.Spec(
    codec=encoder.name,
    text_encoder=encoder.text_encoder,
    shape=shape,
    text_dim=encoder.text_dim,
    text_length=TEXT_LENGTH,
    frames=options.frames,
    height=options.height,
    width=options.width,
    fps=options.fps,
    clips_per_video=options.clips_per_video,
    shard_size=options.shard_size,
    processes=options.process_count,
    videos=f"{len(videos.names)} files, {names}",
    captions=told,
  )


def _work(
  encoder: Encoder,
  videos: _Videos,
  out: str | Path,
  options: Options,
  done: latent_store.Progress,
  on_clips: Callable[[int, int], Any],
) -> None:
  """Encodes what is left; `done` is kept up to date, here and on the disk."""
  me, records, places = options.process_index, [], []
  texts = functools.lru_cache(maxsize=1)(encoder.text)
  total = _count((len(videos.names), 0), options)
  on_clips(_count(done.next, options), total)
  for read in _ahead(_clips(videos, options, done.next)):
    done.next = read.after
    if read.clip is None:
      name, reason = read.header["file"], read.reason
      if "promised" in read.header:
        reason += f" (it ends early, {read.header['promised']} were promised)"
      done.skipped.append({"file": name, "reason": reason})
    else:
      records.append(_record(encoder.latents, texts, read, done))
      places.append(read.video)
    if len(records) == options.shard_size:
      latent_store.add_shard(out, me, done, records, places)
      latent_store.save(out, me, done)
      records, places = [], []
    on_clips(_count(done.next, options), total)
  if records:
    latent_store.add_shard(out, me, done, records, places)
  done.finished = True
  latent_store.save(out, me, done)


def _count(place: tuple[int, int], options: Options) -> int:
  """Clips before a place, as if every video had all of them."""
  before = len(range(options.process_index, place[0], options.process_count))
  return before * options.clips_per_video + place[1]


def _record(
  latents: Callable[[np.ndarray], np.ndarray],
  texts: Callable[[str], tuple[np.ndarray, int]],
  read: _Read,
  done: latent_store.Progress,
) -> bytes:
  """A clip's record; what is to be said about it goes to `done`."""
  name, caption = read.header["file"], read.header["caption"]
  text, cut = texts(caption or "")
  if caption is None and name not in done.uncaptioned[-1:]:
    done.uncaptioned.append(name)
  if cut:
    _note(done.cut, {"file": name, "tokens": cut})
  if "promised" in read.header:
    short = {key: read.header[key] for key in ("file", "frames", "promised")}
    _note(done.partial, short)
  header = read.header | {"caption": caption or "", "tokens_cut": cut}
  return latent_store.pack(latents(read.clip), text, header)


def _note(notes: list[dict[str, Any]], note: dict[str, Any]) -> None:
  """Once for all clips of a file, which come one after another."""
  if note["file"] not in [last["file"] for last in notes[-1:]]:
    notes.append(note)
