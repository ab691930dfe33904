"""What a compiled program does, read out of its optimized HLO.

XLA's own cost analysis takes a loop's body once, however often it runs, and
has nothing to say about collectives. Here loops count as often as they run:
by `known_trip_count` where the compiler wrote it down, else by the counter
that the condition compares with a constant. A loop that shows neither counts
once and is named in `Reading.unknown_loops`.

All figures are of one device. Work inside kernels (custom calls) is not
visible; `Reading.kernels` says which there are.
"""

import dataclasses
import functools
import math
import re

import numpy as np

from avd_jax.aot.hlo_text import (
  Computation,
  Instruction,
  Module,
  dims_of,
  integers,
  parse,
  sizes,
  walk,
  within,
)

KINDS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-broadcast",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)
# What moves no bytes of its own.
_FREE = {
  "after-all", "async-start", "bitcast", "call", "conditional", "constant",
  "domain", "get-tuple-element", "iota", "opt-barrier", "parameter",
  "partition-id", "replica-id", "tuple", "while",
}  # fmt: skip
_SLICES = ("dynamic-slice", "gather", "slice")
# Custom calls that mark places and compute nothing.
_MARKS = (
  "AllocateBuffer", "Assume", "Async", "ConcatBitcast", "Sharding", "SPMD",
  "Pin",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Collective:
  """Devices that exchange arrays.

  Attributes:
    kind: one of KINDS.
    times: how often a step runs it.
    bytes: of the array that it is about: what is summed, or what all devices
      hold together.
    sent: bytes that a device sends each time, round a ring.
    group: devices of the first group, as numbers in the mesh; of a permutation,
      every pair's, one pair after another.
  """

  kind: str
  times: int
  bytes: int
  sent: int
  group: tuple[int, ...]


@dataclasses.dataclass
class Reading:
  """What a device does in one run of a program.

  Attributes:
    flops: of matrix products and convolutions, kernels excluded.
    traffic: bytes to and from memory, between fusions.
    collectives: one for each that stands in the program.
    kernels: custom calls by target, and how often they run.
    unknown_loops: loops that were counted once, by their origin.
  """

  flops: int = 0
  traffic: int = 0
  collectives: list[Collective] = dataclasses.field(default_factory=list)
  kernels: dict[str, int] = dataclasses.field(default_factory=dict)
  unknown_loops: list[str] = dataclasses.field(default_factory=list)


def read(text: str, on_chip: bool = False) -> Reading:
  """What a program does.

  Args:
    text: its optimized HLO.
    on_chip: whether memory spaces other than 0 are not the device's main
      memory, as on TPUs.
  """
  module, reading = parse(text), Reading()
  header = text.partition("\n")[0]
  counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
  devices = math.prod(map(int, counts))
  for inside, made, times in walk(
    module, module.entry, 1, reading.unknown_loops
  ):
    reading.traffic += times * _moved(module, inside, made, on_chip)
    for computation, part in within(module, inside, made):
      work = flops(computation, part)
      reading.flops += times * work
      kind = part.op.removesuffix("-start")
      if kind in KINDS and not _continued(part):
        scattered = "all-reduce-scatter" in (made.called("calls") or "")
        reading.collectives.append(
          _collective(computation, part, kind, times, scattered, devices)
        )
      kernel = _kernel(part)
      if kernel and not work:
        reading.kernels[kernel] = reading.kernels.get(kernel, 0) + times
  return reading


def _kernel(made: Instruction) -> str | None:
  """The target of a custom call that computes."""
  if made.op != "custom-call":
    return None
  found = re.search(r'custom_call_target="([^"]+)"', made.rest)
  return found[1] if found and not found[1].startswith(_MARKS) else None


def _continued(made: Instruction) -> bool:
  """Whether this stands for a later piece of an asynchronous collective.

  On TPUs a collective may be spread over the fusions that it runs beside; each
  repeats it, and all but the first say where they belong.
  """
  found = re.search(r'"flag_start":"(-?\d+)"', made.rest)
  return found is not None and found[1] != "-1"


def _collective(
  inside: Computation,
  made: Instruction,
  kind: str,
  times: int,
  scattered: bool,
  devices: int,
) -> Collective:
  given = sum(sum(sizes(inside[name].shape)) for name in made.operands)
  group = groups(made.rest, devices)
  n = len(group)
  if kind == "all-reduce" and scattered:
    kind = "reduce-scatter"  # fused with the slice that follows it
  about = given * n if kind == "all-gather" else given
  sent = {
    "all-gather": about * (n - 1) // n,
    "all-reduce": 2 * about * (n - 1) // n,
    "reduce-scatter": about * (n - 1) // n,
    "all-to-all": about * (n - 1) // n,
    "ragged-all-to-all": about * (n - 1) // n,
  }.get(kind, about)
  return Collective(kind, times, about, sent, group)


def groups(attributes: str, devices: int) -> tuple[int, ...]:
  """The first group of devices that a collective joins; all by default.

  `{{0,1},{2,3}}`, `[2,2]<=[4]`, `[2,2]<=[2,2]T(1,0)` and
  `mesh['a'=2,'b'=2] {'b'}` all occur. Of a permutation: every pair's devices.
  """
  pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
  if pairs:
    return tuple(int(n) for n in re.findall(r"\d+", pairs[1]))
  found = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
  if found:
    return tuple(integers(found[1]))
  found = re.search(
    rf"replica_groups=\[([\d,]+)\]<=({_IOTA.pattern})", attributes
  )
  if found:
    return tuple(_numbers(found[2]).reshape(integers(found[1]))[0].tolist())
  found = re.search(
    r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", attributes
  )
  if found:
    return _along(*found.groups())
  return tuple(range(devices))


_IOTA = re.compile(r"\[[\d,]+\](?:T\([\d,]+\))?")


def _numbers(iota: str) -> np.ndarray:
  """`[2,4]T(1,0)`: 0, 1, ... in this shape, then transposed."""
  dims, *order = (integers(part) for part in re.findall(r"[\d,]+", iota))
  numbers = np.arange(math.prod(dims)).reshape(dims)
  return numbers.transpose(*order) if order else numbers


def _along(mesh: str, ids: str, axes: str) -> tuple[int, ...]:
  """Devices of a mesh that differ along some axes alone.

  An axis may be cut: `'a':(2)4` is the part of size 4 that 2 stand before.
  """
  shape = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh)}
  order = _IOTA.search(ids)
  numbers = (
    _numbers(order[0]) if order else np.arange(math.prod(shape.values()))
  ).reshape(list(shape.values()))
  steps = {name: [] for name in shape}
  for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
    size = int(size or shape[name])
    stride = shape[name] // (int(before or 1) * size)
    steps[name].append(np.arange(size) * stride)
  places = [
    functools.reduce(np.add.outer, parts, np.zeros((), int)).ravel()
    for parts in steps.values()
  ]
  return tuple(numbers[np.ix_(*places)].ravel().tolist())


def _moved(
  module: Module, inside: Computation, made: Instruction, on_chip: bool
) -> int:
  """Bytes that an instruction reads from memory and writes to it."""
  if made.op in _FREE or made.op.endswith(("-done", "-update")):
    return 0
  size = lambda shape: sum(sizes(shape, on_chip))
  given = [inside[name].shape for name in made.operands]
  if made.op == "custom-call":
    kernel = _kernel(made)
    if kernel is None:
      return 0
    written = size(made.shape)
    if kernel.startswith("__cu"):  # their scratch, bytes in a line, is last
      scratch = re.findall(r"[su]8\[\d+\]", made.shape)
      written -= sum(sum(sizes(each)) for each in scratch)
    return written + sum(map(size, given))
  if made.op in _SLICES:
    return size(made.shape) + min(size(given[0]), sum(sizes(made.shape)))
  if made.op == "slice-start":  # (operand, result, context)
    written = sizes(made.shape, on_chip)[1]
    return written + min(size(given[0]), sizes(made.shape)[1])
  if made.op == "dynamic-update-slice":
    return 2 * size(given[1])
  if made.op != "fusion":
    if made.op.endswith("-start"):  # its own operands are part of its shape
      return size(made.shape)
    return size(made.shape) + sum(map(size, given))
  return _fused(module, made, given, size)


def _fused(module: Module, made: Instruction, given: list[str], size) -> int:
  """The same, of a fusion: of an array that is sliced, the slices alone."""
  calls = module.computations[made.called("calls")]
  total = size(made.shape)
  for part in calls.values():
    if part.op != "parameter":
      continue
    whole = size(given[int(re.match(r"\((\d+)\)", part.rest)[1])])
    touched = _touched(module, calls, part)
    if touched is None or not whole:
      total += whole
      continue
    read, written = touched
    if written:  # in place: what does not change is not written either
      total = max(0, total - whole)
    total += min(whole, read + written)
  return total


def _touched(
  module: Module, calls: Computation, value: Instruction
) -> tuple[int, int] | None:
  """Bytes that are (read, written) of a value; None is all of it."""
  read = written = 0
  bytes_of = lambda name: sum(sizes(calls[name].shape))
  for user in calls.values():
    if value.name not in user.operands:
      continue
    if user.op in _SLICES:
      read += bytes_of(user.name)
    elif _updates(user, value.name):
      written += bytes_of(user.operands[1])
    else:
      inner = _through(module, calls, value, user)
      if inner is None:
        return None
      read, written = read + inner[0], written + inner[1]
  return read, written


def _through(module, calls, value, user) -> tuple[int, int] | None:
  """The same, of a user that only hands the value on."""
  if user.op == "bitcast":
    return _touched(module, calls, user)
  if user.op != "fusion":
    return None
  inner = module.computations[user.called("calls")]
  index = f"({user.operands.index(value.name)})"
  return next(
    _touched(module, inner, part)
    for part in inner.values()
    if part.op == "parameter" and part.rest.startswith(index)
  )


def _updates(user: Instruction, name: str) -> bool:
  return user.op == "dynamic-update-slice" and user.operands[0] == name


def flops(inside: Computation, made: Instruction) -> int:
  """Multiply-adds, times two, of a matrix product or a convolution."""
  if made.op == "dot":
    left = dims_of(inside[made.operands[0]].shape)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", made.rest)
    depth = math.prod(
      left[d] for d in integers(contracted[1] if contracted else "")
    )
    return 2 * math.prod(dims_of(made.shape)) * depth
  if made.op == "convolution":
    return _convolution(inside, made)
  gemm = re.search(r'lhs_contracting_dimensions":\[([\d,"]*)\]', made.rest)
  if made.op == "custom-call" and gemm:  # cuBLAS
    left = dims_of(inside[made.operands[0]].shape)
    depth = math.prod(left[d] for d in integers(gemm[1].replace('"', "")))
    return 2 * math.prod(dims_of(made.shape)) * depth
  return 0


def _convolution(inside: Computation, made: Instruction) -> int:
  """TPUs write products as convolutions: only pairs that meet count."""
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", made.rest)
  left, right = (dims_of(inside[n].shape) for n in made.operands[:2])
  out = dims_of(made.shape)
  window = re.search(r"window=\{([^}]*)\}", made.rest)
  option = {}
  for name, values in re.findall(
    r"(\w+)=([\w\-]+)", window[1] if window else ""
  ):
    option[name] = values.split("x")
  total = right[labels[2].index("i")] * out[labels[3].index("f")]
  total *= out[labels[3].index("b")]
  for axis in sorted(filter(str.isdigit, labels[1])):
    at = int(axis)
    number = lambda name, default, at=at: int(
      option[name][at] if name in option else default
    )
    low = int(option["pad"][at].split("_")[0]) if "pad" in option else 0
    total *= _meetings(
      left[labels[1].index(axis)],
      right[labels[2].index(axis)],
      out[labels[3].index(axis)],
      number("stride", 1),
      low,
      number("lhs_dilate", 1),
      number("rhs_dilate", 1),
    )
  return 2 * total


@functools.lru_cache(4096)
def _meetings(size, window, out, stride, low, spread, gaps) -> int:
  """Pairs of a window's and an output's place that meet an input."""
  place = np.arange(out)[:, None] * stride + np.arange(window) * gaps - low
  hit = (place % spread == 0) & (place >= 0) & (place < (size - 1) * spread + 1)
  return int(hit.sum())
