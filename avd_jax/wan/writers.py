"""Weight files, written as safetensors and torch write them."""

import json
import math
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_BF16 = np.dtype(ml_dtypes.bfloat16)
_SAFETENSORS = {
  np.dtype(np.float32): "F32",
  np.dtype(np.float16): "F16",
  _BF16: "BF16",
}
_TORCH = {
  np.dtype(np.float32): "FloatStorage",
  np.dtype(np.float16): "HalfStorage",
  _BF16: "BFloat16Storage",
}


def _bytes(x: np.ndarray) -> memoryview:
  """Its elements, row by row; bfloat16 has no buffer of its own."""
  return np.ascontiguousarray(x).reshape(-1).view(np.uint8).data


class Safetensors:
  """A safetensors file whose tensors come one at a time, in any order.

  Args:
    path: of the file.
    tensors: (name, shape, dtype) of all that will come.
  """

  def __init__(
    self,
    path: Path,
    tensors: Iterable[tuple[str, tuple[int, ...], np.dtype]],
  ):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, dtype in tensors:
      first, end = end, end + math.prod(shape) * dtype.itemsize
      header[name] = {
        "dtype": _SAFETENSORS[dtype],
        "shape": list(shape),
        "data_offsets": [first, end],
      }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    self._entries, self._start = header, 8 + len(text)
    self._file = path.open("wb")
    self._file.write(struct.pack("<Q", len(text)) + text)
    self._file.truncate(self._start + end)

  def put(self, name: str, x: np.ndarray) -> None:
    """Writes a tensor to its place."""
    entry = self._entries[name]
    if (
      list(x.shape) != entry["shape"] or _SAFETENSORS[x.dtype] != entry["dtype"]
    ):
      raise ValueError(f"{name} is {x.dtype} {x.shape}, not {entry}")
    self._file.seek(self._start + entry["data_offsets"][0])
    self._file.write(_bytes(x))

  def __enter__(self) -> "Safetensors":
    return self

  def __exit__(self, *_: Any) -> None:
    self._file.close()


def write_torch(path: Path, tree: Mapping[str, Any]) -> None:
  """Writes a state dict, or dictionaries of them, as torch.save does.

  A zip archive, uncompressed: a pickle that names torch's own functions, which
  torch calls when it reads it, and a file of raw bytes for each tensor.

  Args:
    path: of the file.
    tree: arrays, by name, nested as wanted.
  """
  arrays: list[np.ndarray] = []
  content = pickle.PROTO + b"\x02" + _dictionary(tree, arrays) + pickle.STOP
  with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
    root = path.stem
    archive.writestr(f"{root}/data.pkl", content)
    archive.writestr(f"{root}/byteorder", "little")
    for key, x in enumerate(arrays):
      archive.writestr(f"{root}/data/{key}", _bytes(x))
    archive.writestr(f"{root}/version", "3\n")


def _dictionary(tree: Mapping[str, Any], arrays: list[np.ndarray]) -> bytes:
  out = [pickle.EMPTY_DICT, pickle.MARK]
  for name, value in tree.items():
    inner = _dictionary if isinstance(value, Mapping) else _tensor
    out += [_text(name), inner(value, arrays)]
  return b"".join([*out, pickle.SETITEMS])


def _tensor(x: np.ndarray, arrays: list[np.ndarray]) -> bytes:
  """_rebuild_tensor_v2(storage, offset, shape, strides, grad, hooks)."""
  key, steps = len(arrays), [math.prod(x.shape[i:]) for i in range(x.ndim + 1)]
  arrays.append(x)
  storage = [
    _text("storage"),
    _name("torch", _TORCH[x.dtype]),
    _text(str(key)),
    _text("cpu"),
    _integer(x.size),
  ]
  hooks = _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE
  arguments = [
    _tuple(storage) + pickle.BINPERSID,
    _integer(0),
    _tuple(map(_integer, x.shape)),
    _tuple(map(_integer, steps[1:])),
    pickle.NEWFALSE,
    hooks + pickle.REDUCE,
  ]
  rebuild = _name("torch._utils", "_rebuild_tensor_v2")
  return rebuild + _tuple(arguments) + pickle.REDUCE


def _text(value: str) -> bytes:
  raw = value.encode()
  return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


def _integer(value: int) -> bytes:
  return pickle.BININT + struct.pack("<i", value)


def _name(module: str, name: str) -> bytes:
  return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(parts: Iterable[bytes]) -> bytes:
  return pickle.MARK + b"".join(parts) + pickle.TUPLE
