"""Weight files, opened without reading them and without running them.

Two formats: safetensors, and what torch.save writes since torch 1.6, a zip
archive of one pickle and the raw bytes of each storage. The pickle is read by
an unpickler that knows tensors and dictionaries and refuses all else, so that
nothing a file names is ever imported or called.

Either way a file becomes a dictionary of `Stored`: where each tensor lies.
"""

import collections
import io
import json
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from avd_jax.errors import UserError

_BF16 = np.dtype(ml_dtypes.bfloat16)
_SAFETENSORS = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": _BF16,
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
_TORCH = {
  "DoubleStorage": np.dtype(np.float64),
  "FloatStorage": np.dtype(np.float32),
  "HalfStorage": np.dtype(np.float16),
  "BFloat16Storage": _BF16,
  "LongStorage": np.dtype(np.int64),
  "IntStorage": np.dtype(np.int32),
  "ShortStorage": np.dtype(np.int16),
  "CharStorage": np.dtype(np.int8),
  "ByteStorage": np.dtype(np.uint8),
  "BoolStorage": np.dtype(np.bool_),
}
SUFFIXES = (".safetensors", ".pth", ".pt")
_LONGEST = 100 << 20  # bytes of a header or a pickle; real ones are far below


# A tuple, not a dataclass: a pickle may set attributes of what it made.
class Stored(NamedTuple):
  """A tensor in a file, not read yet.

  Attributes:
    file: the file.
    offset: of its first element, in bytes.
    shape: its shape.
    dtype: its type.
    strides: in elements; None where it lies row by row.
  """

  file: Path
  offset: int
  shape: tuple[int, ...]
  dtype: np.dtype
  strides: tuple[int, ...] | None = None

  def view(self) -> np.ndarray:
    """The tensor, mapped: bytes are read when, and if, they are used."""
    if 0 in self.shape:
      return np.empty(self.shape, self.dtype)
    strides = self.strides
    if strides is None:
      strides = _row_by_row(self.shape)
    raw = np.memmap(
      self.file,
      np.uint8,
      "r",
      self.offset,
      (_extent(self.shape, strides) * self.dtype.itemsize,),
    )
    steps = tuple(s * self.dtype.itemsize for s in strides)
    return np.lib.stride_tricks.as_strided(
      raw.view(self.dtype), self.shape, steps, writeable=False
    )


def _row_by_row(shape: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
  """Elements from a tensor's first to its last."""
  return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def read(path: str | Path) -> Any:
  """The tensors of a file: a dictionary, nested as the file's own is.

  Raises:
    UserError: no such file, not a weight file, a damaged one, or one that
      holds anything but tensors and plain values.
  """
  path = Path(path)
  if not path.is_file():
    raise UserError(f"{path} does not exist")
  if path.suffix == ".safetensors":
    return _read_safetensors(path)
  if path.suffix in SUFFIXES:
    return _read_torch(path)
  raise UserError(f"{path}: give a file of {', '.join(SUFFIXES)}")


def _read_safetensors(path: Path) -> dict[str, Stored]:
  size = path.stat().st_size
  damaged = f"{path} is damaged or truncated: download it again"
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _LONGEST):
      raise UserError(damaged)
    try:
      header = dict(json.loads(file.read(length)))
    except (TypeError, ValueError) as error:
      raise UserError(damaged) from error
  header.pop("__metadata__", None)
  out = {}
  for name, entry in header.items():
    try:
      kind, shape = str(entry["dtype"]), tuple(map(int, entry["shape"]))
      first, last = map(int, entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
      raise UserError(damaged) from error
    if kind not in _SAFETENSORS:
      raise _unread_type(path, name, kind)
    dtype = _SAFETENSORS[kind]
    if last - first != math.prod(shape) * dtype.itemsize or first < 0:
      raise UserError(f"{damaged} ({name})")
    if 8 + length + last > size:
      raise UserError(
        f"{path} is truncated: {name} ends at byte {8 + length + last}, the"
        f" file at {size}; download it again"
      )
    out[name] = Stored(path, 8 + length + first, shape, dtype)
  return out


def _unread_type(path: Path, name: str, kind: str) -> UserError:
  fp8 = " (fp8)" if "8" in kind else ""
  return UserError(
    f"{path}: {name} is {kind}{fp8}, which is not read; give the float32 or"
    " bfloat16 file"
  )


def _read_torch(path: Path) -> Any:
  if not zipfile.is_zipfile(path):
    with path.open("rb") as file:
      head = file.read(4)
    if head == b"PK\x03\x04":
      raise UserError(f"{path} is truncated: download it again")
    what = "an old torch file" if head[:1] == b"\x80" else "not a torch file"
    raise UserError(
      f"{path} is {what}: only the zip format that torch.save writes since"
      " torch 1.6 is read; load it in torch and save it again"
    )
  try:
    with zipfile.ZipFile(path) as archive:
      return _Archive(path, archive).load()
  except (zipfile.BadZipFile, struct.error) as error:
    raise UserError(
      f"{path} is damaged ({error}): download it again"
    ) from error


class _Storage(NamedTuple):
  """A storage of an archive: raw bytes that tensors are views of."""

  offset: int
  count: int
  dtype: np.dtype


class _Archive:
  """A file of torch.save."""

  def __init__(self, path: Path, archive: zipfile.ZipFile):
    self.path, self.archive = path, archive
    pickles = [
      n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl"
    ]
    if len(pickles) != 1:
      raise UserError(f"{path} is a zip archive, but not of torch.save")
    self.root = pickles[0].removesuffix("data.pkl")
    order = self.root + "byteorder"
    if order in archive.namelist():
      with archive.open(order) as file:
        if file.read(6) != b"little":
          raise UserError(f"{path} was written on a big-endian machine")

  def load(self) -> Any:
    """What was saved, tensors as `Stored`."""
    name = self.root + "data.pkl"
    if self.archive.getinfo(name).file_size > _LONGEST:
      raise UserError(f"{self.path} holds a pickle of more than 100 MiB")
    try:
      return _Unpickler(self, self.archive.read(name)).load()
    except (UserError, zipfile.BadZipFile):
      raise
    except Exception as error:  # a pickle can fail in any way
      raise UserError(
        f"{self.path} does not hold a state dict ({error})"
      ) from error

  def storage(self, kind: str, key: str, count: int) -> _Storage:
    """Where a storage lies.

    Raises:
      UserError: it is not in the file, or shorter than it should be.
    """
    dtype, name = _TORCH[kind], f"{self.root}data/{key}"
    try:
      info = self.archive.getinfo(name)
    except KeyError as error:
      raise UserError(f"{self.path} lacks its storage {name}") from error
    size = info.file_size
    if (
      info.compress_type != zipfile.ZIP_STORED or size < count * dtype.itemsize
    ):
      raise UserError(
        f"{self.path} is damaged: storage {name} has {size} bytes, not"
        f" {count * dtype.itemsize}"
      )
    # The directory at the end of a zip file does not say where an entry's
    # bytes begin; the header before them does.
    with self.path.open("rb") as file:
      file.seek(info.header_offset)
      names, extra = struct.unpack("<26xHH", file.read(30))
    return _Storage(info.header_offset + 30 + names + extra, count, dtype)

  def tensor(self, storage: _Storage, first, shape, strides) -> Stored:
    """A view of a storage.

    Raises:
      UserError: it reaches beyond the storage.
    """
    shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
    numbers = (first, *shape, *strides)
    end = first + (0 if 0 in shape else _extent(shape, strides))
    if min(numbers) < 0 or end > storage.count:
      raise UserError(f"{self.path} is damaged: a tensor exceeds its storage")
    start = storage.offset + first * storage.dtype.itemsize
    whole = strides == _row_by_row(shape)
    return Stored(
      self.path, start, shape, storage.dtype, None if whole else strides
    )


class _Unpickler(pickle.Unpickler):
  """Reads tensors, dictionaries and plain values; refuses every other name.

  What it hands to a pickle is a string, a tuple, or a function made for that
  one use: nothing that a pickle could change or call to any effect.
  """

  def __init__(self, archive: _Archive, content: bytes):
    super().__init__(io.BytesIO(content))
    self.archive = archive

  def find_class(self, module: str, name: str) -> Any:
    """What a pickle may name.

    Raises:
      UserError: anything else.
    """
    archive = self.archive
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return lambda *args: archive.tensor(*args[:4])
    if (module, name) == ("torch._utils", "_rebuild_parameter"):
      return lambda data, *_: data
    if module == "torch" and name in _TORCH:
      return name
    if name == "_rebuild_tensor_v3" or "float8" in name.lower():
      raise _unread_type(archive.path, "a tensor", "of an 8-bit type")
    raise UserError(
      f"{archive.path} wants to run {module}.{name}: refused; only state dicts"
      " of plain tensors are read. If you trust the file, load it in torch and"
      " save its state dict alone"
    )

  def persistent_load(self, pid: Any) -> _Storage:
    """A storage, by the tuple that torch.save puts for it."""
    what, kind, key, _, count = pid
    if what != "storage":
      raise ValueError(f"unknown record {what!r}")
    return self.archive.storage(kind, key, int(count))
