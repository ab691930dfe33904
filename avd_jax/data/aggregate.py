"""The aggregate: a store of trajectories with their provenance, and its union
with the videos they were made from.

A directory, with nothing in it that would have to be trusted to be read:

  store.json                          what every trajectory is (Spec)
  round_01_batch_00003.array_record   a shard, written whole or not at all
  round_01.json                       the shards of a round, once all are there

A record of a shard is, in this order: the length of its header in bytes
(unsigned, 4 bytes, little endian); the header, a JSON object in UTF-8 with
`shape`, `dtype`, `caption` (of the trajectory) and its provenance (`round`,
`clip`, `prompt`, `seed`, `checkpoint`, ...); the values, row by row, little
endian. Where captions are embeddings, the header has the shape `text` too, and
the caption's embedding, up to its end, comes after the trajectory.

A round without its round_<k>.json does not exist for a reader. What a reader
of k rounds sees is therefore fixed, whatever is added later.
"""

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python import array_record_module

from avd_jax import disk
from avd_jax.data import stores
from avd_jax.data.pipeline import Source
from avd_jax.errors import UserError

VERSION = 1
_LENGTH = struct.Struct("<I")


@dataclasses.dataclass(frozen=True)
class Spec:
  """What all trajectories of a store have in common.

  Attributes:
    codec: name of the codec whose latents they are.
    shape: (f, h, w, c) of each.
    chunk_frames: latent frames of a chunk; windows are whole chunks.
    text_encoder: name of the encoder whose embeddings captions have; "" where
      they have none.
    text_dim: width of an embedding.
    text_length: tokens of a caption, padding included.
    dtype: of the values.
    version: of the records' format.
  """

  codec: str
  shape: tuple[int, ...]
  chunk_frames: int = 1
  text_encoder: str = ""
  text_dim: int = 0
  text_length: int = 0
  dtype: str = "float32"
  version: int = VERSION


def spec(path: str | Path) -> Spec:
  """What a store holds.

  Raises:
    UserError: no store there, or one of another format.
  """
  found = stores.read(path, Spec, "trajectories")
  if found.version != VERSION:
    raise UserError(
      f"{path} has format {found.version}; this program reads {VERSION}"
    )
  return found


def claim(path: str | Path, wanted: Spec, write: bool = True) -> None:
  """Makes a store, or makes sure that it takes such trajectories.

  Args:
    path: the store's directory.
    wanted: what will be written.
    write: whether to make a store where there is none.

  Raises:
    UserError: the store holds something else.
  """
  if write:
    stores.create(path, wanted)
  if (Path(path) / stores.NAME).exists():
    stores.check_same(path, spec(path), wanted)


def pack(
  video: np.ndarray, header: dict[str, Any], text: np.ndarray | None = None
) -> bytes:
  """A trajectory [f h w c] and what is known about it, as a record.

  Args:
    video: the trajectory.
    header: what is known about it.
    text: its caption's embedding [tokens d], of the same type.
  """
  header = header | {"shape": video.shape, "dtype": video.dtype.name}
  parts = [video]
  if text is not None:
    header["text"] = text.shape
    parts.append(text.astype(video.dtype))
  little = video.dtype.newbyteorder("<")
  values = [np.ascontiguousarray(part, little).tobytes() for part in parts]
  told = json.dumps(header).encode()
  return b"".join([_LENGTH.pack(len(told)), told, *values])


def unpack(record: bytes) -> tuple[np.ndarray, dict[str, Any]]:
  """Trajectory and header of `pack`: a read-only view of the record."""
  values, header = _values(record)
  count = int(np.prod(header["shape"]))
  return values[:count].reshape(header["shape"]), header


def embedding(record: bytes) -> np.ndarray:
  """The caption's embedding [tokens d] of `pack`: a view of the record."""
  values, header = _values(record)
  count = int(np.prod(header["shape"]))
  return values[count:].reshape(header["text"])


def _values(record: bytes) -> tuple[np.ndarray, dict[str, Any]]:
  start = _LENGTH.size + _LENGTH.unpack_from(record)[0]
  header = json.loads(record[_LENGTH.size : start])
  dtype = np.dtype(header["dtype"]).newbyteorder("<")
  return np.frombuffer(record, dtype, offset=start), header


def shard(path: str | Path, round: int, batch: int) -> Path:
  """Where a batch of a round is kept."""
  name = f"round_{round:02d}_batch_{batch:05d}.array_record"
  return Path(path) / name


def write_shard(file: Path, records: Iterable[bytes]) -> None:
  """Writes a shard; it has its name once it is whole and on the disk."""
  part = file.with_name(file.name + ".part")
  writer = array_record_module.ArrayRecordWriter(str(part), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()
  with part.open("rb") as written:
    os.fsync(written.fileno())
  part.replace(file)


def is_whole(file: Path, count: int) -> bool:
  """Whether a shard is there with so many records."""
  return file.is_file() and _count(file) == count


def _count(file: Path) -> int:
  """Records in a shard; none in a damaged one."""
  reader = array_record_module.ArrayRecordReader(str(file))
  try:
    count = reader.num_records()
    reader.close()
  except RuntimeError:  # some damage shows when closing only
    return 0
  return count


def headers(file: Path) -> Iterator[dict[str, Any]]:
  """What is known about the trajectories of a shard, in order."""
  source = grain.sources.ArrayRecordDataSource(str(file))
  for index in range(len(source)):
    yield unpack(_read(source, index, file))[1]


def finish_round(
  path: str | Path, round: int, files: Sequence[Path], clips: Sequence[int]
) -> list[dict[str, Any]]:
  """Makes a round visible to readers.

  Args:
    path: the store.
    round: which.
    files: its shards.
    clips: source clips that it must hold, each one once.

  Returns:
    The shards: name, records, bytes, sha256.

  Raises:
    UserError: the shards hold other trajectories than these.
  """
  found = [header["clip"] for file in files for header in headers(file)]
  if sorted(found) != sorted(clips):
    raise UserError(
      f"{path}: the shards of round {round} do not hold every source clip of"
      f" the round once; delete {shard(path, round, 0).name} and those after"
      " it to make them again"
    )
  shards = []
  for file in files:
    entry = dict(name=file.name, records=_count(file))
    entry |= dict(bytes=file.stat().st_size, sha256=_digest(file))
    shards.append(entry)
  disk.write_json(_index(path, round), {"round": round, "shards": shards})
  return shards


def _index(path: str | Path, round: int) -> Path:
  return Path(path) / f"round_{round:02d}.json"


def is_finished(path: str | Path, round: int) -> bool:
  """Whether readers see the round."""
  return _index(path, round).exists()


def shards(
  path: str | Path, round: int, verify: bool = False
) -> list[dict[str, Any]]:
  """The shards of a finished round: name, records, bytes, sha256.

  Args:
    path: the store.
    round: which.
    verify: read them all and compare their sha256; else size and number of
      records alone, which another shard may share.

  Raises:
    UserError: the round is not finished, or a shard is gone or another one.
  """
  missing = (
    f"{path}: round {round} is not in the store (no {_index(path, round).name})"
  )
  found = disk.read_json(_index(path, round), missing)["shards"]
  for entry in found:
    file = Path(path) / entry["name"]
    if not file.is_file():
      raise UserError(f"{file} of round {round} is gone; put it back")
    if file.stat().st_size != entry["bytes"] or (
      _count(file) != entry["records"]
    ):
      raise UserError(f"{file} of round {round} is damaged; put back a copy")
    if verify and _digest(file) != entry["sha256"]:
      raise UserError(
        f"{file} of round {round} is damaged or another one; put back a copy"
      )
  return found


def _digest(file: Path) -> str:
  with file.open("rb") as content:
    return hashlib.file_digest(content, "sha256").hexdigest()


def _read(records: Any, index: int, where: Any) -> bytes:
  """A record.

  Raises:
    UserError: it is damaged.
  """
  try:
    return records[index]
  except (RuntimeError, ValueError) as error:
    reason = str(error).strip().partition("\n")[0][:200]
    raise UserError(
      f"{where}: record {index} is damaged ({reason}); put back a copy"
    ) from error


class Aggregate:
  """The trajectories of the first rounds, as a source of clips.

  A record is `video` float32 [f h w c], from drifted to real; `caption`, the
  reversed video's; `text`, its embedding float32 [m d], if it has one; `given`,
  first chunks that are context without loss.

  Args:
    path: the store.
    rounds: 1 to this are read, whatever else there is.
    frames: of a clip; 0 gives trajectories whole. `clip` cuts a window that
      starts at any chunk with equal chance, `source[i]` the last one.
    given: chunks of a clip.

  Raises:
    UserError: no such store, a round missing or damaged, or clips that cannot
      be cut from its trajectories.
  """

  def __init__(
    self, path: str | Path, rounds: int, frames: int = 0, given: int = 0
  ):
    self.spec = spec(path)
    whole, chunk = self.spec.shape[0], self.spec.chunk_frames
    self._frames, self._given = frames or whole, given
    if self._frames > whole or self._frames % chunk:
      raise UserError(
        f"{path}: clips of {self._frames} frames cannot be cut from"
        f" trajectories of {whole} frames in chunks of {chunk}"
      )
    if not 0 <= given < self._frames // chunk:
      raise UserError(
        f"{path}: a prefix of {given} chunks leaves nothing to train in clips"
        f" of {self._frames // chunk} chunks"
      )
    if rounds < 1:
      raise UserError(f"{path}: {rounds} rounds are asked for; 1 or more")
    files = [
      str(Path(path) / entry["name"])
      for round in range(1, rounds + 1)
      for entry in shards(path, round)
    ]
    # Opens files where it reads, so that workers can be handed a copy of it.
    self._records = grain.sources.ArrayRecordDataSource(files)
    self._what = f"Aggregate({path}, {rounds} rounds, {len(self)} trajectories)"

  def __len__(self) -> int:
    return len(self._records)

  def __repr__(self) -> str:
    return self._what

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The end of trajectory `index`, where it becomes real."""
    return self._window(index, self.spec.shape[0] - self._frames)

  def clip(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """A window of whole chunks of trajectory `index`."""
    chunk = self.spec.chunk_frames
    room = (self.spec.shape[0] - self._frames) // chunk
    return self._window(index, chunk * int(rng.integers(room + 1)))

  def header(self, index: int) -> dict[str, Any]:
    """The provenance of trajectory `index`."""
    return unpack(_read(self._records, index, self))[1]

  def _window(self, index: int, start: int) -> dict[str, Any]:
    record = _read(self._records, index, self)
    video, header = unpack(record)
    clip = {
      "video": video[start : start + self._frames].astype(np.float32),
      "caption": header["caption"],
      "given": self._given,
    }
    if self.spec.text_dim:
      length, dim = self.spec.text_length, self.spec.text_dim
      clip["text"] = padded(embedding(record), length, dim)
    return clip


def padded(text: np.ndarray, length: int, dim: int) -> np.ndarray:
  """An embedding [tokens d] as models read it: float32 [m d], zeros behind."""
  out = np.zeros((length, dim), np.float32)
  out[: len(text)] = text
  return out


class Mixed:
  """Seed videos and trajectories, one after the other: D + D_agg.

  Each record of either comes up once an epoch. Seed videos have no prefix:
  their `given` is 0.

  Attributes:
    shape, null_text: the seed's, where it tells them.

  Raises:
    UserError: the two are of different shapes, codecs or text encoders.
  """

  def __init__(self, seed: Source, aggregate: Aggregate):
    self.seed, self._aggregate = seed, aggregate
    self.shape = getattr(seed, "shape", None)
    self.null_text = getattr(seed, "null_text", None)
    ours, theirs = (s[0]["video"].shape for s in (seed, aggregate))
    if ours != theirs:
      raise UserError(
        f"{aggregate} gives clips of shape {theirs}, but the videos it is to"
        f" be mixed with are {ours}"
      )
    if not hasattr(seed, "spec"):
      return
    for what in ("codec", "text_encoder", "text_length"):
      ours, theirs = (getattr(s.spec, what) for s in (seed, aggregate))
      if ours != theirs:
        raise UserError(
          f"{aggregate} is of {what} {theirs!r}, but the videos it is to be"
          f" mixed with are of {ours!r}"
        )

  def __len__(self) -> int:
    return len(self.seed) + len(self._aggregate)

  def __repr__(self) -> str:
    return f"Mixed({self.seed}, {self._aggregate})"

  def __getitem__(self, index: int) -> dict[str, Any]:
    """A fixed clip of record `index`."""
    if index < len(self.seed):
      return self.seed[index]
    return self._aggregate[index - len(self.seed)]

  def clip(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """A drawn clip of record `index`."""
    if index < len(self.seed):
      return self.seed.clip(index, rng)
    return self._aggregate.clip(index - len(self.seed), rng)
