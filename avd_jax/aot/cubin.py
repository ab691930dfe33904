"""What compiled GPU kernels need: registers, stack and shared memory.

XLA writes every kernel that it compiles to a file, where asked (`OPTION`): a
protobuf message with an entry for each, which holds its name, its dynamic
shared memory and its binary. The binary is an ELF file, in which NVIDIA's
compiler notes the rest. Both formats are read here, as far as it takes.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

# The compiler option that names the file.
OPTION = "xla_gpu_kernel_cache_file"
# Fields of XLA's CompilationCacheProto and of its entries.
_ENTRY, _NAME, _VALUE, _DYNAMIC_SHARED, _BINARY = 1, 1, 2, 4, 5
# Attributes in the section .nv.info, and how a 32-bit pair of a symbol and a
# value is marked there.
_REGISTERS, _FRAME = 0x2F, 0x11
_SIZED, _OTHERS = 0x04, 4


class Kernel(NamedTuple):
  """A compiled kernel.

  Attributes:
    name: its entry function.
    registers: of a thread.
    stack: bytes of local memory of a thread. A kernel whose arrays are all in
      registers has none, so that these are spilled registers.
    shared: bytes of shared memory of a block, static and dynamic.
  """

  name: str
  registers: int
  stack: int
  shared: int


def read(data: bytes) -> list[Kernel]:
  """The kernels in the file that `OPTION` names, by name.

  Raises:
    ValueError: bytes that are no such file.
  """
  kernels = []
  for number, entry in _fields(data):
    if number != _ENTRY:
      continue
    parts = dict(_fields(entry))
    value = dict(_fields(parts[_VALUE]))
    dynamic = value.get(_DYNAMIC_SHARED, 0)
    kernels += [
      kernel._replace(shared=kernel.shared + dynamic)
      for kernel in inspect(value[_BINARY])
    ]
  return sorted(kernels)


def _varint(data: bytes, at: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = data[at]
    at += 1
    value |= (byte & 0x7F) << shift
    shift += 7
    if byte < 0x80:
      return value, at


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
  """(number, value) of the fields of a protobuf message."""
  at = 0
  while at < len(data):
    key, at = _varint(data, at)
    kind = key & 7
    if kind == 0:
      value, at = _varint(data, at)
    elif kind in (1, 2, 5):
      size = {1: 8, 5: 4}.get(kind)
      if size is None:
        size, at = _varint(data, at)
      value, at = data[at : at + size], at + size
    else:
      raise ValueError(f"field of kind {kind} at byte {at}: no message")
    yield key >> 3, value


def inspect(binary: bytes) -> list[Kernel]:
  """The kernels of a cubin, with their static shared memory alone.

  Raises:
    ValueError: bytes that are no 64-bit ELF file.
  """
  if binary[:5] != b"\x7fELF\x02":
    raise ValueError("no 64-bit ELF file")
  (table,) = struct.unpack_from("<Q", binary, 0x28)
  size, count, names_at = struct.unpack_from("<3H", binary, 0x3A)
  rows = [
    struct.unpack_from("<IIQQQQII", binary, table + i * size)
    for i in range(count)
  ]
  names_start = rows[names_at][4]
  sections = {_text(binary, names_start + row[0]): row for row in rows}
  body = lambda row: binary[row[4] : row[4] + row[5]]
  symbols, strings = body(sections[".symtab"]), sections[".strtab"][4]
  kernels = []
  for symbol, facts in _info(body(sections[".nv.info"])).items():
    (start,) = struct.unpack_from("<I", symbols, symbol * 24)
    name = _text(binary, strings + start)
    if _REGISTERS in facts and f".nv.info.{name}" in sections:
      shared = sections.get(f".nv.shared.{name}")
      kernels.append(
        Kernel(
          name,
          facts[_REGISTERS],
          facts.get(_FRAME, 0),
          shared[5] if shared else 0,
        )
      )
  return kernels


def _text(binary: bytes, start: int) -> str:
  return binary[start : binary.index(b"\0", start)].decode()


def _info(section: bytes) -> dict[int, dict[int, int]]:
  """{symbol: {attribute: value}} of a section .nv.info."""
  facts: dict[int, dict[int, int]] = {}
  at = 0
  while at + 4 <= len(section):
    form, attribute, size = struct.unpack_from("<BBH", section, at)
    at += _OTHERS
    if form == _SIZED:
      if size == 8:
        symbol, value = struct.unpack_from("<II", section, at)
        facts.setdefault(symbol, {})[attribute] = value
      at += size
  return facts
