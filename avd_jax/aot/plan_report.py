"""A plan as a table, and as plain values for a file."""

import importlib.metadata
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from avd_jax.aot import chips, topologies
from avd_jax.aot.plan_compile import ROLLOUT, Figures
from avd_jax.aot.plan_search import Candidate, fitting, overrides
from avd_jax.aot.planner import Plan, title

DAY = 24 * 3600
ASSUMPTIONS = (
  "Times are bounds from below: the chip's data-sheet peaks, and computing,"
  " memory traffic and exchange all behind the longest of them.",
  "Computing is the larger of what is needed, with the blocks' recomputing, and"
  " what is counted in the compiled program; work inside kernels shows in the"
  " first alone.",
  "Memory traffic is what goes in and out of fusions; exchange is a ring for"
  " each collective, one after another, through links that nobody else uses.",
  "What goes to the host's memory and back (remat offload) takes no time.",
  "On GPUs all products are cuBLAS's; a run may time them against Triton's.",
  "Data, checkpoints, evaluation and restarts take no time.",
)


# What a row says, and a cell of it for each program.
Row = tuple[str, list[str]]
Size = Callable[[float | None], str]


def _unit(plan: Plan) -> tuple[str, Size]:
  """The unit that a plan's bytes are shown in, and how."""
  large = plan.heaviest.needed >= 4 * chips.GIB
  name, unit, digits = ("GiB", chips.GIB, 2) if large else ("MiB", 2**20, 1)

  def size(count: float | None) -> str:
    return "-" if count is None else f"{count / unit:,.{digits}f}"

  return name, size


def _number(value: float | None) -> str:
  return "-" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
  return "-" if value is None else f"{value:.0%}"


def table(plan: Plan) -> str:
  """A plan, a column for each program."""
  titles = [title(key) for key in plan.figures]
  mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
  weights = next(iter(plan.figures.values())).parameters
  lines = [
    f"{plan.target}: mesh {mesh} = {plan.devices}; {weights:,} parameters",
    "",
  ]
  rows = [("", titles), *_memory(plan), *_work(plan), *_times(plan)]
  lines += [*_aligned(rows), *_recipe_rows(plan), "", *_remarks(plan)]
  return "\n".join(lines)


def _aligned(rows: Sequence[Row]) -> Iterator[str]:
  """Rows as lines, each column as wide as the widest cell asks."""
  label = max(len(what) for what, _ in rows)
  width = 2 + max(len(cell) for _, cells in rows for cell in cells)
  for what, cells in rows:
    line = f"{what:<{label}}" + "".join(f"{cell:>{width}}" for cell in cells)
    yield line.rstrip()


def _memory(plan: Plan) -> Iterator[Row]:
  unit, size = _unit(plan)
  programs = list(plan.figures.values())
  yield f"memory of a device, {unit}", []
  for part in dict.fromkeys(part for f in programs for part in f.memory):
    if part != "in all":
      yield f"  {part}", [size(f.memory.get(part)) for f in programs]
  yield "  in all", [size(f.needed) for f in programs]
  if plan.limit is not None:
    fit = ["yes" if f.fits(plan.limit) else "NO" for f in programs]
    yield "  there is", [size(plan.limit)] * len(programs)
    yield "  left", [size(plan.limit - f.needed) for f in programs]
    yield "  fits", fit


def _work(plan: Plan) -> Iterator[Row]:
  unit, size = _unit(plan)
  programs = list(plan.figures.values())
  yield "FLOPs of a step, all devices", []
  yield "  needed", [_number(f.flops) for f in programs]
  yield "  needed, and recomputed", [_number(f.done) for f in programs]
  yield (
    "  compiled, loops as they run",
    [_number(f.compiled_flops) for f in programs],
  )
  yield "  compiled, loops once (XLA)", [_number(f.xla_flops) for f in programs]
  yield f"{unit} in and out of memory", [size(f.traffic) for f in programs]
  yield f"{unit} a device sends (times)", []
  kinds = dict.fromkeys(c[:2] for f in programs for c in f.collectives)
  for kind, axes in kinds:
    sent = [_sent(f, kind, axes) for f in programs]
    where = f", {'+'.join(axes)}" if axes else ""
    yield f"  {kind}{where}", [f"{size(n)} ({times})" for times, n in sent]


def _sent(
  figures: Figures, kind: str, axes: tuple[str, ...]
) -> tuple[int, int]:
  """(times, bytes) of a kind of collective along some axes."""
  for exchange in figures.collectives:
    if exchange[:2] == (kind, axes):
      return exchange.times, exchange.sent
  return 0, 0


def _times(plan: Plan) -> Iterator[Row]:
  programs = list(plan.figures.values())
  if not any(f.seconds for f in programs):
    return
  yield "seconds of a step, at least", []
  for part in ("compute", "memory", "links"):
    yield f"  {part}", [_number(f.seconds.get(part)) for f in programs]
  yield "  the longest", [_number(f.least) for f in programs]
  yield "MFU, at most", [_share(plan.mfu(f)) for f in programs]


def recipe(plan: Plan) -> dict[str, dict[str, float | int | None]]:
  """Steps, seconds of a step, days and device-hours, at least, of each stage
  that was compiled."""
  stages = [name for name in plan.config.stages if (name, 0) in plan.figures]
  found = {}
  for name in stages:
    steps, seconds = plan.config.stage[name].steps, plan.seconds(name)
    whole = None if seconds is None else steps * seconds
    found[name] = {
      "steps": steps,
      "step_seconds": seconds,
      "days": None if whole is None else whole / DAY,
      "device_hours": None if whole is None else whole * plan.devices / 3600,
    }
  return found


def _total(rows: dict[str, dict[str, Any]], what: str) -> float | None:
  values = [row[what] for row in rows.values()]
  return None if None in values or not values else sum(values)


def _recipe_rows(plan: Plan) -> Iterator[str]:
  rows = recipe(plan)
  if _total(rows, "days") is None:
    return
  lines = [("the recipe, at least", ["steps", "days", "device-hours"])]
  for name, row in rows.items():
    days, hours = row["days"], row["device_hours"]
    cells = [f"{row['steps']:,}", _number(days), f"{hours:,.4g}"]
    lines.append((f"  {name}", cells))
  days, hours = (_total(rows, what) for what in ("days", "device_hours"))
  whole = set(rows) == set(plan.config.stages)
  name = "in all" if whole else "these, without the others"
  lines.append((f"  {name}", ["", _number(days), f"{hours:,.4g}"]))
  yield ""
  yield from _aligned(lines)


def _remarks(plan: Plan) -> Iterator[str]:
  lines = [f"{title(key)} {why}" for key, why in plan.failures.items()]
  lines += [f"{title(key)}: not compiled: no time left" for key in plan.late]
  for key, figures in plan.figures.items():
    lines += [f"{title(key)}: {line}" for line in _said(figures)]
  rollout = plan.figures.get((ROLLOUT, 0))
  if rollout:
    lines.append(
      f"{ROLLOUT}: a step is a segment of {rollout.frames} latent frames, of"
      f" {rollout.videos} videos at once, one for each share of the batch"
    )
  if rollout and plan.mesh["data"] * plan.mesh["fsdp"] > 1:
    lines.append(
      f"{ROLLOUT}: this is the training mesh, with videos cut over data x fsdp;"
      " no command runs it so: avd sample cuts over context and tensor only"
    )
  if any(f.seconds for f in plan.figures.values()):
    lines += ASSUMPTIONS
  for line in lines:
    yield textwrap.fill(line, 80, subsequent_indent="  ")


def _said(figures: Figures) -> Iterator[str]:
  if figures.refused:
    yield figures.refused
  if figures.unknown_loops:
    loops = ", ".join(sorted(set(figures.unknown_loops)))
    yield (
      f"{len(figures.unknown_loops)} loops without a known number of trips are"
      f" counted once: {loops}"
    )
  if figures.kernels:
    calls = ", ".join(f"{n} ({t})" for n, t in figures.kernels.items())
    yield f"kernels, whose work is not counted as compiled: {calls}"
  yield from figures.notes


def record(
  plan: Plan,
  tried: Sequence[Candidate] = (),
  advice: Sequence[str] = (),
  command: str = "",
) -> dict[str, Any]:
  """A plan as plain values, and the command line that made it.

  `flops_per_step`, `step_seconds` and `mfu` are of the program that computes
  most (`program`, of `stage`); `hbm_bytes_per_device` of the program that needs
  most memory.
  """
  key = plan.main
  figures, rows = plan.figures[key], recipe(plan)
  chip = chips.find(topologies.named(plan.target)[0])
  return {
    "command": command,
    "target": plan.target,
    "devices": plan.devices,
    "mesh": plan.mesh,
    "fits": plan.fits,
    "hbm_bytes_per_device": plan.heaviest.needed,
    "hbm_limit_bytes": plan.limit,
    "parameters": figures.parameters,
    "stage": key[0],
    "program": title(key),
    "flops_per_step": figures.flops,
    "step_seconds": figures.least,
    "mfu": plan.mfu(figures),
    "programs": {title(k): _values(plan, f) for k, f in plan.figures.items()},
    "failures": {title(k): why for k, why in plan.failures.items()},
    "not_compiled": [title(key) for key in plan.late],
    "recipe": {
      "stages": rows,
      "whole": set(rows) == set(plan.config.stages),
      "days": _total(rows, "days"),
      "device_hours": _total(rows, "device_hours"),
    },
    "advice": list(advice),
    "search": _search(tried),
    "assumptions": list(ASSUMPTIONS),
    "sources": list(chip.sources) if chip else [],
    "versions": versions(),
  }


def _search(tried: Sequence[Candidate]) -> dict[str, Any]:
  return {
    "ways": len(tried),
    "tried": [_tried(candidate) for candidate in tried if candidate.asked],
  }


def _values(plan: Plan, figures: Figures) -> dict[str, Any]:
  return {
    "parameters": figures.parameters,
    "fits": figures.fits(plan.limit),
    "hbm_bytes": figures.memory,
    "flops": figures.flops,
    "flops_with_recomputing": figures.done,
    "flops_compiled": figures.compiled_flops,
    "flops_by_xla": figures.xla_flops,
    "memory_traffic_bytes": figures.traffic,
    "collectives": [exchange._asdict() for exchange in figures.collectives],
    "kernels": figures.kernels,
    "unknown_loops": figures.unknown_loops,
    "seconds": figures.seconds,
    "step_seconds": figures.least,
    "mfu": plan.mfu(figures),
    "videos": figures.videos,
    "frames": figures.frames,
    "compile_seconds": figures.compile_seconds,
    "notes": figures.notes,
    "refused": figures.refused,
  }


def _tried(candidate: Candidate) -> dict[str, Any]:
  figures = candidate.figures
  return {
    "mesh": candidate.mesh,
    "remat": candidate.config.model.remat,
    "accumulation": candidate.config.optimizer.accumulation,
    "least_bytes": candidate.memory,
    "guessed_seconds": candidate.guess,
    "failure": candidate.failure,
    "hbm_bytes_per_device": figures and figures.needed,
    "step_seconds": figures and figures.least,
  }


def ranking(tried: Sequence[Candidate], limit: int | None) -> str:
  """What a search has found that fits, best first."""
  good = fitting(tried, limit)
  compiled = sum(candidate.figures is not None for candidate in tried)
  late = sum(candidate.failure == "no time left" for candidate in tried)
  head = (
    f"search: {len(tried)} ways to cut it, {compiled} compiled, {len(good)} fit"
  )
  lines = [head + (f"; {late} left when time ran out" if late else "")]
  for place, candidate in enumerate(good, 1):
    config, figures = candidate.config, candidate.figures
    sizes = " x ".join(map(str, candidate.mesh.values()))
    lines.append(
      f"{place:>4}. {sizes:<18} remat {config.model.remat:<6} accumulation"
      f" {config.optimizer.accumulation:<3} {_number(figures.least):>9} s"
      f" {figures.needed / chips.GIB:>8.2f} GiB"
    )
  return "\n".join(lines)


def choice(plan: Plan, stage: str) -> list[str]:
  """The arguments that a search found, and which programs may not fit so.

  Args:
    plan: of what was found.
    stage: whose step was searched for; nothing where that does not fit.
  """
  step = plan.figures.get((stage, 0))
  if step is None or not step.fits(plan.limit):
    return []
  timed = any(figures.seconds for figures in plan.figures.values())
  best = "fastest" if timed else "smallest"
  what = "that fits" if plan.fits else f"whose step of {stage} fits"
  left_out = {
    "not compiled, no time left": plan.late,
    "does not compile": plan.failures,
    "does not fit": plan.tight,
  }
  lines = [
    f"{why}: {'; '.join(map(title, keys))}"
    for why, keys in left_out.items()
    if keys
  ]
  arguments = " ".join(overrides(plan.config, plan.mesh))
  return [f"the {best} found {what}:", arguments, *lines]


def nothing(
  tried: Sequence[Candidate], limit: int | None, minutes: float
) -> str:
  """Why a search has no plan to show."""
  least = min(candidate.memory for candidate in tried)
  if limit is not None and least > limit:
    return (
      f"none of them fits: by arithmetic alone the smallest needs"
      f" {least / chips.GIB:.2f} GiB of a device, and there are"
      f" {limit / chips.GIB:.2f}; name more devices, or a smaller run"
    )
  return f"nothing was compiled in {minutes:g} minutes; give more (--minutes)"


def nothing_record(
  tried: Sequence[Candidate], target: str, why: str, command: str
) -> dict[str, Any]:
  """That of a search without a plan, as plain values; see `record`."""
  return {
    "command": command,
    "target": target,
    "fits": None,
    "why": why,
    "search": _search(tried),
    "versions": versions(),
  }


def versions() -> dict[str, str | None]:
  """Of what made a plan."""
  found = {}
  for package in ("jax", "jaxlib", "libtpu", "jax_cuda13_plugin"):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = None
  return found
