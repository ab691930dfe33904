"""Latents of real videos with the embeddings of their captions, on disk.

A directory, with nothing in it that would have to be trusted to be read:

  store.json                          what every clip is (Spec)
  null.array_record                   one record: the embedding of no prompt
  part_003/shard_00012.array_record   a shard, written whole or not at all
  part_003/index.json                 what the part's process has done so far
  part_003/skipped.json               what it left out or altered, and why

Each process writes a part of its own; the parts together are the store. A
record is one of `aggregate`: its header holds the shapes `latents` and `text`
and the clip's provenance, its values are those of latents and text, one after
the other, bfloat16. Text is kept up to its prompt's end: behind it are zeros.

Records are read in the order of the videos they are from, so that the number of
processes that wrote them changes nothing.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import ml_dtypes
import numpy as np

from avd_jax import disk
from avd_jax.data import aggregate, stores
from avd_jax.errors import UserError

_log = logging.getLogger(__name__)

VERSION = 1
DTYPE = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Spec:
  """What all clips of a store have in common, and how it is written.

  Attributes:
    codec: which VAE the latents are of.
    text_encoder: which encoder the embeddings are of.
    shape: (f, h, w, c) of the latents.
    text_dim: width of an embedding.
    text_length: tokens of a prompt, padding included.
    frames, height, width: of a clip in pixels.
    fps: the rate that clips come near to; None is each video's own.
    clips_per_video: clips of a video, at most.
    shard_size: records of a shard; a part's last one may have fewer.
    processes: parts of the store.
    videos: digest of the list of videos.
    captions: digest of the file of captions, or where else they are from.
    dtype: of all values.
    version: of the format.
  """

  codec: str
  text_encoder: str
  shape: tuple[int, ...]
  text_dim: int
  text_length: int
  frames: int
  height: int
  width: int
  fps: float | None
  clips_per_video: int
  shard_size: int
  processes: int
  videos: str
  captions: str
  dtype: str = DTYPE.name
  version: int = VERSION


@dataclasses.dataclass
class Progress:
  """How far the process of a part has come.

  Attributes:
    next: (video, clip of it) that comes after the last whole shard.
    shards: name, records, bytes, sha256, and the video of each record.
    skipped: file and reason of what could not be used.
    uncaptioned: files whose caption is "" for want of another.
    cut: files whose captions lost their last tokens, and how many `tokens`.
    partial: files that have fewer `frames` than the `promised`.
    finished: whether nothing is left to do.
  """

  next: tuple[int, int] = (0, 0)
  shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  skipped: list[dict[str, str]] = dataclasses.field(default_factory=list)
  uncaptioned: list[str] = dataclasses.field(default_factory=list)
  cut: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  partial: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  finished: bool = False

  @property
  def records(self) -> int:
    """Clips in the part's shards."""
    return sum(shard["records"] for shard in self.shards)


def part(path: str | Path, process: int) -> Path:
  """Where a process writes."""
  return Path(path) / f"part_{process:03d}"


def spec(path: str | Path) -> Spec:
  """What a store holds.

  Raises:
    UserError: no store there, or one of another format.
  """
  remedy = f"make it: avd encode --videos DIR --checkpoint CKPT --out {path}"
  found = stores.read(path, Spec, "latents", remedy)
  if (found.version, found.dtype) != (VERSION, DTYPE.name):
    raise UserError(
      f"{path} has format {found.version} of {found.dtype}; this program reads"
      f" {VERSION} of {DTYPE.name}"
    )
  return found


def check_place(path: str | Path) -> None:
  """Refuses to begin a store where something else lies.

  Raises:
    UserError: a file, or a folder of others.
  """
  path = Path(path)
  if path.exists() and not path.is_dir():
    raise UserError(f"--out {path} is a file: give a directory")
  if not path.exists() or (path / stores.NAME).exists():
    return
  # Several processes may be beginning it now, or have been killed then.
  mine = (stores.NAME, "part_", "null.array_record")
  strange = [p.name for p in path.iterdir() if not p.name.startswith(mine)]
  if strange:
    more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
    raise UserError(
      f"--out {path} exists and is no store (it holds"
      f" {', '.join(sorted(strange)[:3])}{more}): give another directory"
    )


def claim(path: str | Path, wanted: Spec, process: int) -> None:
  """Makes a store, or makes sure that it is of these settings.

  Raises:
    UserError: the store is of others.
  """
  stores.create(path, wanted)
  stores.check_same(path, spec(path), wanted)
  part(path, process).mkdir(parents=True, exist_ok=True)


def pack(
  latents: np.ndarray, text: np.ndarray, header: dict[str, Any]
) -> bytes:
  """A clip's record.

  Args:
    latents: bfloat16 [f h w c].
    text: bfloat16 [tokens d], the prompt's own tokens.
    header: its provenance.
  """
  shapes = {"latents": latents.shape, "text": text.shape}
  values = np.concatenate([latents.ravel(), text.ravel()])
  return aggregate.pack(values, header | shapes)


def unpack(record: bytes) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
  """Inverts `pack`; the arrays are read-only views of the record."""
  values, header = aggregate.unpack(record)
  count = int(np.prod(header["latents"]))
  latents = values[:count].reshape(header["latents"])
  return latents, values[count:].reshape(header["text"]), header


def write_null(path: str | Path, process: int, text: np.ndarray) -> None:
  """Keeps the embedding [tokens d] of no prompt, unless it is there."""
  file = Path(path) / "null.array_record"
  if not file.exists():
    mine = part(path, process) / file.name
    nothing = np.zeros((0,), DTYPE)
    aggregate.write_shard(mine, [pack(nothing, text, {})])
    mine.replace(file)


def progress(path: str | Path, process: int) -> Progress:
  """How far a part is; nothing done where there is none.

  Raises:
    UserError: a shard is gone or damaged.
  """
  folder = part(path, process)
  file = folder / "index.json"
  if not file.exists():
    return Progress()
  try:
    values = disk.read_json(file, f"{file} is gone")
    found = Progress(**(values | {"next": tuple(values["next"])}))
    # Parts of before name the file and no more.
    found.cut = [
      {"file": entry, "tokens": "some"} if isinstance(entry, str) else entry
      for entry in found.cut
    ]
  except (TypeError, KeyError) as error:
    raise UserError(f"{file} does not describe a part: {error}") from None
  for entry in found.shards:
    shard = folder / entry["name"]
    if not shard.is_file():
      raise UserError(
        f"{shard} is gone; put it back, or delete {folder} to encode its videos"
        " again"
      )
    if shard.stat().st_size != entry["bytes"] or not aggregate.is_whole(
      shard, entry["records"]
    ):
      raise UserError(
        f"{shard} is damaged; put back a copy, or delete {folder} to encode its"
        " videos again"
      )
  return found


def save(path: str | Path, process: int, done: Progress) -> None:
  """Makes progress last."""
  folder = part(path, process)
  if done.finished:
    notes = ("skipped", "uncaptioned", "cut", "partial")
    listed = {name: getattr(done, name) for name in notes}
    disk.write_json(folder / "skipped.json", listed)
  # Last: whoever sees a finished part finds the rest.
  disk.write_json(folder / "index.json", dataclasses.asdict(done))


def add_shard(
  path: str | Path,
  process: int,
  done: Progress,
  records: Sequence[bytes],
  videos: Sequence[int],
) -> None:
  """Writes the next shard of a part, and adds it to `done` (not yet saved).

  Args:
    path: the store.
    process: whose part.
    done: its progress.
    records: of `pack`.
    videos: of each record, the place of its video among all.
  """
  file = part(path, process) / f"shard_{len(done.shards):05d}.array_record"
  aggregate.write_shard(file, records)
  with file.open("rb") as content:
    digest = hashlib.file_digest(content, "sha256").hexdigest()
  done.shards.append(
    dict(
      name=file.name,
      records=len(records),
      bytes=file.stat().st_size,
      sha256=digest,
      videos=list(videos),
    )
  )


class LatentSource:
  """The clips of a store, as a source of the pipeline.

  A record is `video`, float32 latents [f h w c]; `caption`; `text`, float32 [m
  d], its embedding, zeros behind the prompt; `given`, 0. Clips start where they
  were encoded: the VAE knows no past of a first frame, so that latents cut from
  the middle are not those of any video.

  Attributes:
    spec: what the store holds.
    shape: (f, h, w, c) of a clip.
    null_text: float32 [m d], the embedding of no prompt.

  Args:
    path: the store.
    frames: latent frames of a clip, the first ones of each.
    split: "train" or "eval".
    eval_clips: videos held out, spread evenly; "eval" is the first clip of
      each, "train" all clips of the others. With 0 the splits are the same,
      and "eval" says so in the log.
    text_dim: width of embeddings that the model reads; None takes any.

  Raises:
    UserError: no such store, one that is not finished or damaged, clips longer
      than its, more held out than there is, or another width.
  """

  def __init__(
    self,
    path: str | Path,
    frames: int,
    split: str = "train",
    eval_clips: int = 0,
    text_dim: int | None = None,
  ):
    self.spec, self._path = spec(path), Path(path)
    whole = self.spec.shape[0]
    if not 1 <= frames <= whole:
      raise UserError(
        f"{path}: frames={frames} latent frames are asked for; its clips have"
        f" {whole}"
      )
    if text_dim not in (None, self.spec.text_dim):
      raise UserError(
        f"{path}: its text embeddings have {self.spec.text_dim} dimensions, the"
        f" model reads text_dim={text_dim}"
      )
    if split not in ("train", "eval"):
      raise UserError(f"split={split!r}: give 'train' or 'eval'")
    self._frames = frames
    self.shape = (frames, *self.spec.shape[1:])
    files, videos = _shards(self._path, self.spec.processes)
    if not files:
      raise UserError(f"{path}: no clips in it (see skipped.json of its parts)")
    self._order = _split(path, np.asarray(videos), split, eval_clips)
    # Opens files where it reads, so that workers can be handed a copy of it.
    self._records = grain.sources.ArrayRecordDataSource(files)
    self.null_text = self._padded(self._null())

  def __len__(self) -> int:
    return len(self._order)

  def __repr__(self) -> str:
    return f"LatentSource({self._path}, {len(self)} clips of {self._frames})"

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The first frames of clip `index`."""
    latents, text, header = self._read(index)
    return {
      "video": latents[: self._frames].astype(np.float32),
      "caption": header["caption"],
      "text": self._padded(text),
      "given": 0,
    }

  def clip(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """The same: there is nothing to draw."""
    return self[index]

  def header(self, index: int) -> dict[str, Any]:
    """The provenance of clip `index`, its caption included."""
    return self._read(index)[2]

  def _read(self, index: int) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    if not 0 <= index < len(self):
      raise IndexError(f"clip {index} of {len(self)}")
    return self._unpacked(self._records, int(self._order[index]))

  def _null(self) -> np.ndarray:
    file = self._path / "null.array_record"
    if not (file.is_file() and aggregate.is_whole(file, 1)):
      raise UserError(f"{file} is gone or damaged; put back a copy")
    return self._unpacked(grain.sources.ArrayRecordDataSource(str(file)), 0)[1]

  def _unpacked(self, records: Any, place: int) -> Any:
    try:
      return unpack(records[place])
    except (RuntimeError, ValueError, KeyError) as error:
      raise UserError(
        f"{self._path}: record {place} is damaged ({error}); put back a copy of"
        " its shard"
      ) from error

  def _padded(self, text: np.ndarray) -> np.ndarray:
    return aggregate.padded(text, self.spec.text_length, self.spec.text_dim)


def _shards(path: Path, processes: int) -> tuple[list[str], list[int]]:
  """Files of all parts, and of each record the video it is from."""
  files: list[str] = []
  videos: list[int] = []
  for process in range(processes):
    done = progress(path, process)
    if not done.finished:
      raise UserError(
        f"{path}: part {process} of {processes} is not finished; run its"
        " `avd encode` again"
      )
    for entry in done.shards:
      files.append(str(part(path, process) / entry["name"]))
      videos += entry["videos"]
  return files, videos


def _split(
  path: str | Path, videos: np.ndarray, split: str, eval_clips: int
) -> np.ndarray:
  """The places of a split's records, by video."""
  order = np.argsort(videos, kind="stable")
  if not eval_clips:
    if split == "eval":
      _log.warning(
        "%s: data.eval_files=0, so evaluation reads the clips of training", path
      )
    return order
  names, first = np.unique(videos[order], return_index=True)
  if not 0 < eval_clips < len(names):
    raise UserError(
      f"{path}: data.eval_files={eval_clips}: give 0 to {len(names) - 1}, its"
      f" clips are of {len(names)} videos"
    )
  held = ((np.arange(eval_clips) + 0.5) * len(names) / eval_clips).astype(int)
  if split == "eval":
    return order[first[held]]
  return order[~np.isin(videos[order], names[held])]
