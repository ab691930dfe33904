"""What accelerators can do at most, and the least time that work takes on them.

Every number is its maker's; where it comes from stands beside it. No program
reaches all of them at once, so that times made of them are bounds from below:
a step takes at least the longest of its computing, its memory traffic and its
exchange with other devices, as if the other two hid behind it, each at its
peak.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence

from avd_jax.aot.hlo import Collective
from avd_jax.errors import UserError

GIB = 2**30
_FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"


@dataclasses.dataclass(frozen=True)
class Chip:
  """An accelerator's peaks.

  Attributes:
    peak: FLOP/s of matrix products, by the dtype that the model computes in.
    memory: bytes that a program may use.
    bandwidth: of that memory, bytes a second.
    ring: bytes a second that a device can send in a ring of its neighbours.
    link: the same, straight to one neighbour.
    outward: the same, to another host; None where that makes no difference.
    sources: where the numbers come from.
  """

  peak: Mapping[str, float]
  memory: int
  bandwidth: float
  ring: float
  link: float
  outward: float | None
  sources: tuple[str, ...]


def _tpu(flops: float, gib: float, bandwidth: float, link: float, page: str):
  return Chip(
    # JAX multiplies float32 in one pass of bfloat16, if not told otherwise.
    peak={"bfloat16": flops, "float32": flops},
    memory=int(gib * GIB),
    bandwidth=bandwidth,
    ring=2 * link,  # an axis of the torus has a neighbour on either side
    link=link,
    outward=None,
    sources=(
      f"https://cloud.google.com/tpu/docs/{page} (peak, memory, links)",
      "memory a program may use: what libtpu's compiler says it has",
    ),
  )


def _hopper(gib: int, bandwidth: float, page: str):
  return Chip(
    # Dense, half of what the data sheet gives with sparsity; JAX multiplies
    # float32 in TF32, if not told otherwise.
    peak={"bfloat16": 989.4e12, "float32": 494.7e12},
    memory=int(gib * GIB * _preallocated()),
    bandwidth=bandwidth,
    # NVLink, 900 GB/s both ways, through a switch.
    ring=450e9,
    link=450e9,
    # A ConnectX-7 of 400 Gbit/s for each GPU, as a DGX H100 or H200 has.
    outward=50e9,
    sources=(
      f"https://www.nvidia.com/en-us/data-center/{page} (peak, memory, NVLink)",
      "https://docs.nvidia.com/dgx/dgxh100-user-guide (400 Gbit/s a GPU)",
      f"memory: {_preallocated():.0%} of the device, which JAX takes for itself"
      f" ({_FRACTION})",
    ),
  )


def _preallocated() -> float:
  """The share of a GPU's memory that JAX uses."""
  text = os.environ.get(_FRACTION) or "0.75"
  try:
    share = float(text)
  except ValueError:
    share = 0.0
  if not 0 < share < math.inf:
    raise UserError(f"{_FRACTION}={text}: give a share of memory, such as 0.75")
  return share


def find(name: str) -> Chip | None:
  """The peaks of a target; None of what has none, a host's cores.

  Raises:
    UserError: of a GPU, an environment that names no share of its memory.
  """
  match name:
    case "v5e":
      # 197 TFLOP/s, 819 GB/s; 1600 Gbit/s over 4 links.
      return _tpu(197e12, 15.75, 819e9, 50e9, "v5e")
    case "v5p":
      # 459 TFLOP/s, 2765 GB/s; 1200 GB/s both ways over 6 links.
      return _tpu(459e12, 95.74, 2765e9, 100e9, "v5p")
    case "v6e":
      # 918 TFLOP/s, 1600 GB/s; 800 GB/s both ways over 4 links.
      return _tpu(918e12, 31.25, 1600e9, 100e9, "v6e")
    case "h100":
      return _hopper(79, 3.35e12, "h100")  # SXM
    case "h200":
      return _hopper(139, 4.8e12, "h200")  # SXM
  return None


def exchange(
  chip: Chip, collectives: Sequence[Collective], hosts: Sequence[int]
) -> float:
  """Seconds that a device exchanges data, one collective after another.

  Args:
    chip: what the devices are.
    collectives: of a program.
    hosts: each device's host, in the order of the mesh.
  """
  return sum(
    c.times * c.sent / _rate(chip, c, hosts) for c in collectives if c.sent
  )


def _rate(chip: Chip, collective: Collective, hosts: Sequence[int]) -> float:
  group = collective.group or range(len(hosts))
  places = [hosts[device] for device in group]
  if collective.kind == "collective-permute":
    pairs = zip(places[::2], places[1::2], strict=True)
    apart = chip.outward and any(a != b for a, b in pairs)
    return chip.outward if apart else chip.link
  if chip.outward is None or len(set(places)) == 1:
    return chip.ring
  # Rings run through all of a host's network cards that the group has.
  return min(chip.ring, chip.outward * places.count(places[0]))
