"""The mesh, recomputing and accumulation under which a run takes least.

What cannot fit is left out by arithmetic; the rest is compiled in the order in
which it is likely to be fast, until time runs out.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from avd_jax import config as config_lib
from avd_jax import parallel
from avd_jax.aot import chips, plan_compile, plan_work, topologies
from avd_jax.aot.plan_compile import ROLLOUT, Figures, Job
from avd_jax.aot.planner import Measure, Plan, kinds, plan
from avd_jax.errors import UserError
from avd_jax.training.program import Program

# "offload" is never faster than "block": advice alone names it.
REMAT = ("none", "dots", "block")
_SEARCHING = 2 / 3  # of the time


@dataclasses.dataclass
class Candidate:
  """A way to cut a run up.

  Attributes:
    config: the run's, cut up so.
    mesh: sizes by axis.
    memory: bytes that a device cannot do without.
    guess: seconds of a step by rules of thumb.
    least: seconds that its computing alone takes.
    tokens: of a microbatch on a device, with gradients.
    figures: of the step, once it is compiled.
    failure: why it is not.
    asked: whether a compiler was asked at all.
  """

  config: ConfigDict
  mesh: dict[str, int]
  memory: int
  guess: float
  least: float
  tokens: float
  figures: Figures | None = None
  failure: str | None = None
  asked: bool = False


def overrides(config: ConfigDict, mesh: dict[str, int]) -> list[str]:
  """Arguments that cut a run up as this config is."""
  return [
    *(f"--config.mesh.{name}={size}" for name, size in mesh.items()),
    f"--config.model.remat={config.model.remat}",
    f"--config.optimizer.accumulation={config.optimizer.accumulation}",
  ]


def _meshes(devices: int, axes: int) -> Iterator[tuple[int, ...]]:
  """Every way to write a number as a product of so many."""
  if axes == 1:
    yield (devices,)
    return
  for size in range(1, devices + 1):
    if devices % size == 0:
      for rest in _meshes(devices // size, axes - 1):
        yield (size, *rest)


def _changed(
  config: ConfigDict, mesh: Sequence[int], remat: str, accumulation: int
) -> ConfigDict:
  changed = config_lib.from_json(config_lib.to_json(config))
  changed.mesh.update(dict(zip(parallel.AXES, mesh, strict=True)))
  changed.model.remat = remat
  changed.optimizer.accumulation = accumulation
  return changed


def _accumulations(config: ConfigDict) -> list[int]:
  """The config's own, and the powers of 2 that divide its batch."""
  if not _accumulates(config):
    return [config.optimizer.accumulation]
  batch = config.data.batch_size
  powers = {2**n for n in range(batch.bit_length()) if batch % 2**n == 0}
  return sorted(powers | {config.optimizer.accumulation})


def _accumulates(config: ConfigDict) -> bool:
  """Whether a run stays what it is where its batch comes in parts."""
  return all(config.stage[name].objective != "dmd" for name in config.stages)


def _divides(config: ConfigDict, mesh: Mesh) -> None:
  data, model = config.data, Program(config, mesh).model
  parallel.check_batch(data.batch_size, config.optimizer.accumulation, mesh)
  rows, columns = model.grid(data.height, data.width)
  tokens = model.chunk_frames * rows * columns
  parallel.check_divides(mesh, tokens=tokens, heads=model.num_heads)


def _state(config: ConfigDict, device: Any) -> Any:
  """The training state's shapes, boxed with logical axes."""
  one = parallel.make_mesh([device], (1,) * len(parallel.AXES))
  return Program(config, one).boxed


def candidates(config: ConfigDict, target: str, name: str) -> list[Candidate]:
  """Every way to cut a run up that divides evenly, likely good ones first.

  Args:
    config: the run's.
    target: what it would run on.
    name: the stage whose step is to be fast.

  Raises:
    UserError: none divides evenly; says what does not in the last.
  """
  devices = topologies.devices(*topologies.named(target))
  # Of chips without known peaks, the order is that of another's.
  chip = chips.find(topologies.named(target)[0]) or chips.find("v5p")
  state, weights = _state(config, devices[0]), None
  found, refusal = [], None
  for shape in _meshes(len(devices), len(parallel.AXES)):
    mesh = parallel.make_mesh(devices, shape)
    try:
      parts = plan_work.cut(state, mesh)
    except UserError as error:
      refusal = error
      continue
    weights = weights or plan_work.count(state.params)
    for remat in REMAT:
      for times in _accumulations(config):
        cut = _changed(config, shape, remat, times)
        try:
          _divides(cut, mesh)
        except UserError as error:
          refusal = error
          continue
        memory = plan_work.least_memory(cut, name, parts, mesh)
        seconds = plan_work.guess_seconds(cut, name, weights, mesh, chip)
        found.append(
          Candidate(
            cut,
            dict(mesh.shape),
            memory,
            sum(seconds),
            seconds[0],
            plan_work.tokens(cut, name, mesh),
          )
        )
  if not found:
    raise UserError(f"--search: no mesh over {target} divides this: {refusal}")
  return sorted(found, key=lambda c: (c.guess, c.memory))


def heaviest_stage(config: ConfigDict, stage: str | None = None) -> str:
  """The stage whose step computes most, unless one is named.

  Raises:
    UserError: a stage that is not trained.
  """
  if stage == ROLLOUT:
    raise UserError(f"--search: {ROLLOUT} has no step; name a stage, or none")
  names = [name for name, _ in kinds(config, stage) if name != ROLLOUT]
  return max(names, key=lambda name: plan_work.step_flops(config, name))


def search(
  tried: Sequence[Candidate],
  target: str,
  name: str,
  limit: int | None,
  minutes: float,
  measure: Measure | None = None,
) -> list[Candidate]:
  """Compiles candidates; those that fit come back, best first.

  Ends early where nothing that is left could be faster than what was found.

  Args:
    tried: see `candidates`; each keeps what was found of it.
    target: what to compile for.
    name: the stage.
    limit: bytes of a device; None is none.
    minutes: to give up after.
    measure: compiles a job; `plan_compile.apart`, without traces, if None.
  """
  measure = measure or _quietly
  until = time.monotonic() + 60 * minutes
  left = list(tried)
  with tqdm(total=len(left), disable=None, unit="mesh") as bar:
    while left:
      # Those that seem too large come last: it is a guess.
      seems = (c for c in left if limit is None or _about(c, tried) <= limit)
      candidate = next(seems, left[0])
      left.remove(candidate)
      bar.update()
      candidate.failure = _needless(candidate, tried, limit, until)
      if candidate.failure:
        continue
      candidate.asked = True
      sizes = "x".join(map(str, candidate.mesh.values()))
      config = candidate.config
      title = f"{sizes}, remat {config.model.remat}"
      title += f", accumulation {config.optimizer.accumulation}"
      bar.set_description(title)
      job = Job(config_lib.to_json(config), target, name)
      try:
        candidate.figures = measure(job, until, bar.refresh)
        said = f"{candidate.figures.needed / chips.GIB:.2f} GiB"
      except (UserError, TimeoutError) as error:
        candidate.failure = said = str(error)
      except Exception as error:  # whatever a compiler fails with: go on
        candidate.failure = said = _in_a_line(error)
      bar.write(f"{title}: {said}", file=sys.stderr)
      sys.stderr.flush()
  return fitting(tried, limit)


def _quietly(*arguments: Any) -> Figures:
  """One of many: where its error comes from, planning it alone tells."""
  return plan_compile.apart(*arguments, trace=False)


def _in_a_line(error: Exception) -> str:
  """The kind of an error, and its first line."""
  first = str(error).strip().partition("\n")[0][:200]
  # `apart` has put the kind into the text.
  known = type(error) is RuntimeError
  return first if known else f"{type(error).__name__}: {first}"


def _needless(
  candidate: Candidate,
  tried: Sequence[Candidate],
  limit: int | None,
  until: float,
) -> str | None:
  """Why a candidate need not be compiled."""
  if limit is not None and candidate.memory > limit:
    return f"needs {candidate.memory / chips.GIB:.2f} GiB by arithmetic alone"
  good = fitting(tried, limit)
  best = good[0].figures.least if good else None
  if best is not None and best <= candidate.least:
    return "computing alone takes longer than the best"
  return "no time left" if time.monotonic() > until else None


def _about(candidate: Candidate, tried: Sequence[Candidate]) -> float:
  """Bytes that a candidate will need, by what was compiled with its remat.

  What these needed beyond the arithmetic shrinks with their tokens; the most of
  it counts, since a large mesh that does not fit takes minutes to say so.
  """
  beyond = [
    (other.figures.needed - other.memory) / other.tokens
    for other in tried
    if other.figures
    and other.config.model.remat == candidate.config.model.remat
  ]
  return candidate.memory + candidate.tokens * max(beyond, default=0.0)


def fitting(tried: Sequence[Candidate], limit: int | None) -> list[Candidate]:
  """Those that were compiled and fit, best first."""
  good = [c for c in tried if c.figures and c.figures.fits(limit)]
  return sorted(good, key=lambda c: (c.figures.least or 0.0, c.figures.needed))


def best(
  config: ConfigDict,
  target: str,
  stage: str | None,
  limit: int | None,
  minutes: float,
  measure: Measure | None = None,
) -> tuple[Plan | None, list[Candidate]]:
  """The fastest plan that fits as a whole, and all that was tried.

  The step alone is searched for, in two thirds of the time; the rest is for a
  winner's other programs. Where they cannot all be compiled in it, the plan
  says which. Where no plan fits: the one whose step is the fastest that does;
  else the one that needs least by arithmetic, or else what came nearest. None
  where nothing was compiled in time, or nothing can fit by arithmetic alone.

  Raises:
    UserError: as `candidates`; and a target, a stage that cannot be.
  """
  start, measure = time.monotonic(), measure or _quietly
  until = start + 60 * minutes
  name = heaviest_stage(config, stage)
  tried = candidates(config, target, name)

  def whole(candidate, known=None, which=stage):
    step = {(name, 0): candidate.figures} if candidate.figures else {}
    known = step | (known or {})
    return plan(candidate.config, target, which, limit, measure, known, until)

  left = _SEARCHING * minutes - (time.monotonic() - start) / 60
  good = search(tried, target, name, limit, left, measure)
  fastest, rollouts = None, {}  # recomputing changes no rollout
  for candidate in good:
    mesh = tuple(candidate.mesh.values())
    done = whole(candidate, rollouts.get(mesh))
    if not done.refuted:
      return done, tried
    fastest = fastest or done
    if (ROLLOUT, 0) in done.figures:
      rollouts[mesh] = {(ROLLOUT, 0): done.figures[ROLLOUT, 0]}
  smallest = min(tried, key=lambda candidate: candidate.memory)
  too_large = limit is not None and smallest.memory > limit
  if too_large or (fastest and smallest.figures):
    return fastest, tried
  try:
    done = _smallest(smallest, name, whole)
  except (TimeoutError, UserError) as error:
    compiled = [c for c in tried if c.figures]
    if not compiled and isinstance(error, UserError):
      raise
    nearest = min(compiled, key=lambda c: c.figures.needed, default=None)
    return fastest or (nearest and whole(nearest)), tried
  return fastest if fastest and done.refuted else done, tried


def _smallest(
  candidate: Candidate, name: str, whole: Callable[..., Plan]
) -> Plan:
  """A plan of a candidate, its step before all else."""
  step = whole(candidate, which=name)
  if (name, 0) in step.figures:
    candidate.figures, candidate.failure = step.figures[name, 0], None
    candidate.asked = True
  return whole(candidate, step.figures)


def advice(done: Plan) -> list[str]:
  """What would make a plan fit, a line each; estimates, nothing is compiled.

  What a step needs beyond the arithmetic is taken to shrink with its tokens.

  Args:
    done: a plan that does not fit.
  """
  tight = [key for key in done.tight if key[0] != ROLLOUT]
  if not tight:
    return [
      f"the {ROLLOUT}'s cache, cut by mesh.context or mesh.tensor, or kept"
      " short by model.attention.window"
    ]
  key = max(tight, key=lambda key: done.figures[key].needed)
  return _ways(done, key)


def _ways(done: Plan, key: tuple[str, int]) -> list[str]:
  config, own, name = done.config, tuple(done.mesh.values()), key[0]
  device = topologies.devices(*topologies.named(done.target))[0]
  state = _state(config, device)
  _, fsdp, context, tensor = own
  now = (config.model.remat, config.optimizer.accumulation)
  whole = (1, own[0] * fsdp, context, tensor)
  tries = [
    ("a larger fsdp", done.target, whole, *now),
    ("remat", done.target, own, "block", now[1]),
    ("inputs in the host's memory", done.target, own, "offload", now[1]),
    ("accumulation", done.target, own, now[0], 2 * now[1]),
    ("fsdp, remat and accumulation", done.target, whole, "block", 2 * now[1]),
  ]
  tries += [
    ("more chips", larger, (1, -1, context, tensor), "block", now[1])
    for larger in topologies.larger(done.target)
  ]
  memory, tokens = _needs(config, done.target, name, state, own, *now)
  beyond, lines = done.figures[key].needed - memory, []
  for what, target, mesh, remat, times in tries:
    if (target, mesh, remat, times) == (done.target, own, *now):
      continue
    if times != now[1] and not _accumulates(config):
      continue
    try:
      most, share = _needs(config, target, name, state, mesh, remat, times)
    except UserError:
      continue
    about = most + beyond * share / tokens
    if about <= done.limit:
      changed = _changed(config, mesh, remat, times)
      sizes = dict(zip(parallel.AXES, mesh, strict=True))
      words = " ".join(overrides(changed, sizes))
      where = f"--target {target} " if target != done.target else ""
      lines.append(f"{what}, about {about / chips.GIB:.1f} GiB: {where}{words}")
      if what == "more chips":
        break
  return lines


def _needs(config, target, name, state, mesh, remat, times):
  """(bytes that a device cannot do without, its tokens)."""
  devices = topologies.devices(*topologies.named(target))
  cut, grid = (
    _changed(config, mesh, remat, times),
    parallel.make_mesh(devices, mesh),
  )
  _divides(cut, grid)
  parts = plan_work.cut(state, grid)
  least = plan_work.least_memory(cut, name, parts, grid)
  return least, plan_work.tokens(cut, name, grid)
