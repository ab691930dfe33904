"""How a planned step would scale to other numbers of devices, on paper.

Weak scaling: every device keeps its share of the batch, so that its computing
and its memory traffic stay what they are in the plan, and what changes is the
exchange: rings grow longer. The axes context and tensor keep their size, fsdp
shrinks where there are fewer devices than the plan cuts weights by, and data
takes the rest.

What is known is the plan's; what is assumed stands in `ASSUMPTIONS`.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from avd_jax.aot import chips, topologies
from avd_jax.aot.hlo import Collective
from avd_jax.aot.plan_compile import ROLLOUT
from avd_jax.errors import UserError

HOP = 1e-6  # seconds
_PER_HOST = 8  # GPUs
_READ = {
  "target", "mesh", "stage", "program", "hbm_limit_bytes", "programs",
}  # fmt: skip
ASSUMPTIONS = (
  "A device's share of the batch, its FLOPs and its memory traffic are those of"
  " the plan; peaks, bandwidths and links are the chip's data sheet's.",
  "A collective is a ring over its group: it sends what the plan's sends, by"
  " (n - 1) / n, and waits 1 us for each of its n - 1 hops (an assumption; a"
  " torus or a tree would wait for fewer).",
  "Links are nobody else's. All of a TPU slice is one torus; GPUs have NVLink"
  " among 8 and a 400 Gbit/s network card each beyond.",
  "hidden: the longest of computing, memory and exchange; in line: the longer"
  " of computing and memory, and then the exchange. A real step lies between.",
  "Stragglers, input, checkpoints and failures take no time.",
)


@dataclasses.dataclass(frozen=True)
class Point:
  """A step on so many devices.

  Attributes:
    mesh: sizes by axis.
    links: seconds of exchange.
    hidden: share of a step that is computing, if exchange hides behind it.
    in_line: the same, if nothing hides.
    memory: bytes of a device.
    fits: whether there are that many.
  """

  mesh: dict[str, int]
  links: float
  hidden: float
  in_line: float
  memory: int
  fits: bool

  @property
  def devices(self) -> int:
    """How many."""
    return math.prod(self.mesh.values())


def curve(plan: Any, least: int = 8, most: int = 4096) -> list[Point]:
  """The stage of a plan that computes most, on more and more devices.

  Args:
    plan: what a file holds that `avd plan --json` wrote.
    least: devices to begin with.
    most: devices to end with, each time twice as many.

  Raises:
    UserError: no plan, one of a rollout or of devices without known peaks, one
      that shows nothing of what the data axis sends, or too few devices.
  """
  _check(plan)
  name = topologies.named(plan["target"])[0]
  chip, mesh = chips.find(name), plan["mesh"]
  if chip is None:
    raise UserError(f"{plan['target']} has no known peaks: plan for a chip")
  if mesh["data"] == 1:
    raise UserError(
      "scaling grows the axis data, and this plan has data 1, which sends"
      " nothing along it: plan with --config.mesh.data=2 or more"
    )
  figures = plan["programs"][plan["program"]]
  if not figures["seconds"]:
    raise UserError(
      f"the plan of {plan['program']} for {plan['target']} did not compile:"
      " scale one that fits"
    )
  least = max(least, mesh["context"] * mesh["tensor"])
  if most < least:
    raise UserError(f"--most {most}: give {least} devices or more")
  on_gpus = chip.outward is not None
  found = []
  for shape in _meshes(mesh, least, most):
    size = math.prod(shape.values())
    hosts = [
      device // (_PER_HOST if on_gpus else size) for device in range(size)
    ]
    links = sum(
      _seconds(chip, exchange, mesh, shape, hosts)
      for exchange in figures["collectives"]
    )
    found.append(_point(plan, figures, shape, links))
  return found


def _check(plan: Any) -> None:
  """Refuses what is no plan of a training step."""
  known = isinstance(plan, dict) and plan.keys() >= _READ
  programs = plan["programs"] if known else None
  if not isinstance(programs, dict) or plan["program"] not in programs:
    raise UserError("not what avd plan --json writes")
  if plan["stage"] == ROLLOUT:
    raise UserError(
      f"a plan of the {ROLLOUT}; what is scaled here is a training step"
    )


def _meshes(
  mesh: Mapping[str, int], least: int, most: int
) -> Iterator[dict[str, int]]:
  """Meshes of more and more devices."""
  kept, size = mesh["context"] * mesh["tensor"], least
  while size <= most:
    fsdp = math.gcd(mesh["fsdp"], size // kept)
    yield dict(mesh) | {"data": size // (kept * fsdp), "fsdp": fsdp}
    size *= 2


def _group(shape: Mapping[str, int], axes: list[str]) -> tuple[int, ...]:
  """The first group of devices that lie along some axes of a mesh."""
  devices = np.arange(math.prod(shape.values())).reshape(list(shape.values()))
  taken = tuple(slice(None) if name in axes else 0 for name in shape)
  return tuple(np.ravel(devices[taken]).tolist())


def _seconds(
  chip: chips.Chip,
  exchange: Mapping[str, Any],
  before: Mapping[str, int],
  after: Mapping[str, int],
  hosts: list[int],
) -> float:
  """Of an exchange of the plan, on another mesh."""
  axes, times = exchange["axes"], exchange["times"]
  old, group = len(_group(before, axes)), _group(after, axes)
  new = len(group)
  if new == 1 or old == 1:
    return 0.0
  if exchange["kind"] == "collective-permute":
    sent, hops = exchange["sent"], 1
    group = group[:2]
  else:
    share = ((new - 1) / new) / ((old - 1) / old)
    sent, hops = exchange["sent"] * share, new - 1
  whole = Collective(exchange["kind"], 1, 0, int(sent), group)
  return chips.exchange(chip, [whole], hosts) + times * hops * HOP


def _point(
  plan: Mapping[str, Any],
  figures: Mapping[str, Any],
  shape: dict[str, int],
  links: float,
) -> Point:
  compute, moved = figures["seconds"]["compute"], figures["seconds"]["memory"]
  work = max(compute, moved)
  # Weights that are cut into fewer parts take more room.
  more = plan["mesh"]["fsdp"] / shape["fsdp"] - 1
  state = sum(
    figures["hbm_bytes"].get(part, 0)
    for part in ("parameters", "EMA", "optimizer")
  )
  memory = int(figures["hbm_bytes"]["in all"] + more * state)
  limit = plan["hbm_limit_bytes"]
  return Point(
    shape,
    links,
    compute / max(work, links),
    compute / (work + links),
    memory,
    limit is None or memory <= limit,
  )


def table(name: str, points: list[Point]) -> str:
  """A curve, a line for each number of devices."""
  lines = [
    name,
    f"{'devices':>9}{'data x fsdp x context x tensor':>34}{'links, s':>10}"
    f"{'hidden':>8}{'in line':>9}{'GiB':>8}",
  ]
  for p in points:
    mesh = " x ".join(map(str, p.mesh.values()))
    fits = "" if p.fits else "  does not fit"
    lines.append(
      f"{p.devices:>9,}{mesh:>34}{p.links:>10.3g}{p.hidden:>8.0%}"
      f"{p.in_line:>9.0%}{p.memory / chips.GIB:>8.1f}{fits}"
    )
  return "\n".join(lines)
