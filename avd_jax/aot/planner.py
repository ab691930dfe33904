"""What a run would take on devices that are not there, before they are paid.

Each different program of a config is compiled for a target; what a step takes
there, times the steps of each stage, is what the recipe takes.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable

from ml_collections import ConfigDict
from tqdm import tqdm

from avd_jax import config as config_lib
from avd_jax.aot import chips, plan_compile, topologies
from avd_jax.aot.plan_compile import ROLLOUT, Figures, Job
from avd_jax.errors import UserError
from avd_jax.training.program import Program

# (job, until, tick) -> its figures; see `plan_compile.apart`.
Measure = Callable[..., Figures]


@dataclasses.dataclass
class Plan:
  """A run on a target.

  Attributes:
    config: the run's.
    target: what it would run on.
    mesh: sizes by axis.
    limit: bytes that a program may use on a device; None where none is known.
    figures: of each program, by (stage, local step); stages that share a
      program share its figures.
    failures: why a program does not compile.
    late: programs that there was no time left to compile.
  """

  config: ConfigDict
  target: str
  mesh: dict[str, int]
  limit: int | None
  figures: dict[tuple[str, int], Figures]
  failures: dict[tuple[str, int], str] = dataclasses.field(default_factory=dict)
  late: list[tuple[str, int]] = dataclasses.field(default_factory=list)

  @property
  def devices(self) -> int:
    """How many."""
    return math.prod(self.mesh.values())

  @property
  def fits(self) -> bool:
    """Whether every program was compiled and fits a device."""
    return not self.refuted and not self.late

  @property
  def refuted(self) -> bool:
    """Whether a program is known not to compile or not to fit."""
    return bool(self.failures or self.tight)

  @property
  def tight(self) -> list[tuple[str, int]]:
    """The programs that do not fit a device."""
    return [k for k, f in self.figures.items() if not f.fits(self.limit)]

  @property
  def heaviest(self) -> Figures:
    """The program that needs most memory."""
    return max(self.figures.values(), key=lambda f: f.needed)

  @property
  def main(self) -> tuple[str, int]:
    """The training program that computes most; the rollout, if it is alone."""
    trained = [key for key in self.figures if key[0] != ROLLOUT]
    done = lambda key: self.figures[key].done
    return max(trained or self.figures, key=done)

  def seconds(self, stage: str) -> float | None:
    """Of a step of a stage, at least, over all of its programs."""
    every = self.config.stage[stage].degradation.full_every
    usual = self.figures[stage, 0].least
    full = self.figures.get((stage, every - 1))
    if full is None or usual is None:
      return usual
    if full.least is None:
      return None
    return usual + (full.least - usual) / every

  def mfu(self, figures: Figures) -> float | None:
    """Useful FLOP/s over the devices' peak, at most."""
    chip = chips.find(topologies.named(self.target)[0])
    if chip is None or figures.least is None:
      return None
    peak = chip.peak[self.config.model.dtype] * self.devices
    return figures.flops / (figures.least * peak)


def title(key: tuple[str, int]) -> str:
  """A program's name."""
  name, local = key
  return f"{name}, full" if local else name


def kinds(
  config: ConfigDict, stage: str | None = None
) -> list[tuple[str, int]]:
  """(stage, local step) of each program of a run, and (ROLLOUT, 0).

  Args:
    config: a run's.
    stage: only this one, or ROLLOUT.

  Raises:
    UserError: a stage that does not run, or a VAE's run.
  """
  if "vae" in config:
    raise UserError(
      "plans are of a model's run; this config trains a VAE, whose run is not"
      " planned"
    )
  if stage not in (None, ROLLOUT, *config.stages):
    raise UserError(
      f"--stage {stage}: the config runs {', '.join(config.stages)};"
      f" {ROLLOUT} is the sampler's segment"
    )
  found = []
  for name in config.stages if stage is None else [stage]:
    every = 0 if name == ROLLOUT else config.stage[name].degradation.full_every
    found += [(name, 0)] + [(name, every - 1)] * (every > 1)
  return found + [(ROLLOUT, 0)] * (stage is None)


def limit_of(target: str, gib: float | None = None) -> int | None:
  """Bytes that a program may use on a device of a target.

  Args:
    target: what devices.
    gib: another limit.

  Raises:
    UserError: no such target, or as `chips.find`.
  """
  chip = chips.find(topologies.named(target)[0])
  if gib is not None:
    return int(gib * chips.GIB)
  return chip.memory if chip else None


def plan(
  config: ConfigDict,
  target: str,
  stage: str | None = None,
  limit: int | None = None,
  measure: Measure | None = None,
  known: dict[tuple[str, int], Figures] | None = None,
  until: float | None = None,
) -> Plan:
  """Compiles a run's programs for a target.

  Args:
    config: of the run.
    target: "v5p:4x4x4" and the like.
    stage: only this one's, or ROLLOUT.
    limit: see `limit_of`.
    measure: compiles a job; `plan_compile.apart` if None.
    known: figures of this very config that need not be found again.
    until: when to give up, by `time.monotonic()`.

  Raises:
    UserError: a target, a mesh or a stage that cannot be, or no program
      compiles.
    TimeoutError: time was up before any program was compiled.
  """
  measure = measure or plan_compile.apart
  which, known = kinds(config, stage), dict(known or {})
  mesh = plan_compile.mesh_of(config, target)
  program = Program(config, mesh)
  program.check()
  same = lambda name, local: (
    name if name == ROLLOUT else id(program.step(name, local))
  )
  found = {same(*key): figures for key, figures in known.items()}
  plain, failures, late = config_lib.to_json(config), {}, []
  with tqdm(which, disable=None, unit="program") as bar:
    for name, local in bar:
      key = same(name, local)
      if key in found:
        continue
      job, what = Job(plain, target, name, local), title((name, local))
      try:
        found[key] = _compiled(job, what, measure, until, bar)
      except TimeoutError:
        late.append((name, local))
        _say(bar, f"{what}: not compiled: no time left")
      except RuntimeError as error:  # the others took minutes: go on
        first = str(error).strip().partition("\n")[0][:300]
        failures[name, local] = f"does not compile for {target}: {first}"
        _say(bar, f"{what} does not compile")
  figures = {key: found[same(*key)] for key in which if same(*key) in found}
  if not figures and failures:
    (name, _), why = next(iter(failures.items()))
    raise UserError(f"{name} {why}")
  if not figures:
    raise TimeoutError("no time left")
  return Plan(config, target, dict(mesh.shape), limit, figures, failures, late)


def _compiled(
  job: Job, what: str, measure: Measure, until: float | None, bar: tqdm
) -> Figures:
  if until is not None and time.monotonic() > until:
    raise TimeoutError("no time left")
  bar.set_description(f"compiling {what}")
  _say(bar, f"compiling {what} for {job.target}")
  figures = measure(job, until, bar.refresh)
  took, gib = figures.compile_seconds, figures.needed / chips.GIB
  _say(bar, f"compiled {what}: {took:.0f} s, {gib:.2f} GiB of a device")
  return figures


def _say(bar: tqdm, line: str) -> None:
  """A line to stderr where that is no terminal, and so shows no bar."""
  if bar.disable:
    print(line, file=sys.stderr, flush=True)
