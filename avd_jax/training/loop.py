"""The host's side of training: stages, batches, checkpoints, progress.

Nothing here waits for the step just launched. A checkpoint holds everything
that the next step depends on (weights, EMA, optimizer, step; the step is also
the data's position and the key of the randomness), so that a run which was
killed anywhere ends bit-equal to one that was not.
"""

import collections
import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from avd_jax import checkpoint, disk, parallel
from avd_jax import config as config_lib
from avd_jax.data import pipeline
from avd_jax.errors import UserError
from avd_jax.training.metrics import Writer
from avd_jax.training.program import Program
from avd_jax.training.state import TrainState
from avd_jax.training.vae import VAEProgram
from avd_jax.typing import Params
from avd_jax.wan import importing, readers, sources

AHEAD = 2  # steps that the host may be ahead of the device


class Interrupted(Exception):
  """Ctrl-C or a preemption signal: everything is saved, go on later."""


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
  """Turns SIGINT and SIGTERM into an entry of the yielded list.

  A second signal acts as it always did. Outside the main thread, where
  handlers cannot be set, nothing changes.
  """
  caught: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield caught
    return
  old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

  def handle(number, frame):
    del frame
    caught.append(number)
    signal.signal(number, old[number])

  for number in old:
    signal.signal(number, handle)
  try:
    yield caught
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


@dataclasses.dataclass(frozen=True)
class Stretch:
  """A stage's place in the run: steps [first, last)."""

  name: str
  first: int
  last: int


def stretches(config: ConfigDict) -> list[Stretch]:
  """The stages of a run, in order."""
  out, first = [], 0
  for name in config.stages:
    out.append(Stretch(name, first, first + config.stage[name].steps))
    first = out[-1].last
  return out


def train(
  config: ConfigDict, workdir: str | Path, mesh: Mesh, progress: bool = True
) -> TrainState:
  """Runs a config to its end in `workdir`, resuming what is there.

  Args:
    config: the run.
    workdir: checkpoints, metrics and config.json go here.
    mesh: what to run on.
    progress: show a bar (on process 0).

  Returns:
    The final state.

  Raises:
    UserError: a workdir made with another config, a batch that the mesh does
      not divide, data that cannot be read, a torn checkpoint.
    Interrupted: after a signal, once everything is saved.
  """
  workdir = Path(workdir)
  config_lib.check(config)
  program = (VAEProgram if "vae" in config else Program)(config, mesh)
  program.check()
  data = config_lib.typed(pipeline.DataConfig, config.data)
  checkpoints = checkpoint.Checkpoints(workdir, config.log.keep)
  try:
    step = checkpoints.latest()
    record = None if step is None else checkpoints.record(step)
    _claim(workdir, config, record)
    plan = stretches(config)
    # Wrong data: before any compute. Of a run that is done, it may be gone.
    left = step != plan[-1].last
    source = pipeline.make_source(data) if left else None
    if source is not None:
      program = program.for_source(source)
    if step is None:
      step, given = 0, initial_weights(config, program)
      state = program.begin_stage(program.init(), plan[0].name, given)
    else:
      target = program.abstract_state()._asdict()
      state = TrainState(**checkpoints.restore(step, target))
    if left:
      run = _Run(program, workdir, checkpoints, progress)
      state = run.run(state, step, plan, data, source)
    return state
  finally:
    checkpoints.close()


def _claim(
  workdir: Path, config: ConfigDict, record: dict[str, Any] | None
) -> None:
  """Writes config.json, or refuses a workdir that another config trained.

  What was trained is read from the checkpoint's own record: config.json is for
  people, and may have been edited or removed.
  """
  path = workdir / "config.json"
  values = config_lib.to_json(config)
  if record and "imported" in record:
    raise UserError(
      f"{workdir} holds imported weights, not a run: train into another"
      f" --workdir, from them: --config.init_from={workdir}"
    )
  if record:
    old = config_lib.complete(record["config"])
    changed = config_lib.differences(old, values)
    if changed:
      raise UserError(
        f"{workdir} was made with another config ({'; '.join(changed[:5])});"
        " use another --workdir, or the same values"
      )
  if jax.process_index() == 0:
    disk.write_json(path, values)


def initial_weights(
  config: ConfigDict, program: Program | VAEProgram
) -> Params | None:
  """The weights that `init_from` names, or None: the EMA of a run, or a
  transformer in Wan's own files, read straight onto the mesh.

  Raises:
    UserError: nothing there to start from, or a model of another shape.
  """
  origin = config.init_from
  if not origin:
    return None
  run = (Path(origin) / "checkpoints").is_dir()
  if not run and "vae" not in config and sources.among(origin):
    with _of_origin():
      theirs = importing.config_of(origin)
    _check_same(config, config_lib.to_json(theirs))
    return importing.load_dit(origin, program.mesh)[1]
  hint = (
    f", or give Wan's own files ({', '.join(readers.SUFFIXES)}), or what avd"
    " import-wan made of them"
  )
  with _of_origin("" if "vae" in config else hint):
    checkpoints, step = checkpoint.open_existing(origin)
  with contextlib.closing(checkpoints):
    _check_same(config, checkpoints.record(step)["config"])
    target = program.abstract_state().ema
    return checkpoints.restore(step, {"ema": target})["ema"]


@contextlib.contextmanager
def _of_origin(hint: str = "") -> Iterator[None]:
  """Says which setting led to an error, and what else could be given."""
  try:
    yield
  except UserError as error:
    raise UserError(f"init_from: {error}{hint}") from None


def _check_same(config: ConfigDict, origin: dict[str, Any]) -> None:
  """Refuses weights of another model; `origin` is the config they have."""
  what = "vae" if "vae" in config else "model"
  ours = config_lib.to_json(config)[what]
  theirs = config_lib.complete(origin)[what] if what in origin else {}
  changed = config_lib.differences(
    theirs, ours, f"{what}.", config_lib.WEIGHTLESS
  )
  if changed:
    raise UserError(
      f"init_from {config.init_from} holds another model"
      f" ({'; '.join(changed[:5])})"
    )


@dataclasses.dataclass
class _Run:
  """One call of `train`, from some step on."""

  program: Program | VAEProgram
  workdir: Path
  checkpoints: checkpoint.Checkpoints
  progress: bool

  def run(self, state, step, plan, data, source) -> TrainState:
    mesh, log = self.program.mesh, self.program.config.log
    batches = pipeline.batches(data, source, step, *parallel.batch_share(mesh))
    lead = jax.process_index() == 0
    begun = self.checkpoints.record(step)["metrics"] if step else []
    writer = Writer(self.workdir, log.every, step, begun) if lead else None
    # Steps not waited for: their metrics, and whether a process was told to
    # stop. Read late, but at the same step by all, so that all save the same.
    flight: collections.deque[Any] = collections.deque()
    stop = False
    try:
      with interruptible() as caught:
        for stretch in plan:
          if step >= stretch.last:
            continue
          if step == stretch.first and step:
            state = self.program.begin_stage(state, stretch.name)
          with self._bar(stretch, step) as bar:
            while step < stretch.last:
              batch = parallel.put_batch(next(batches), mesh)
              local = step - stretch.first
              launch = self.program.step(stretch.name, local)
              schedule = self.program.schedule(stretch.name, local)
              state, metrics = launch(state, batch, schedule)
              step += 1
              flight.append((metrics, parallel.any_process(bool(caught), mesh)))
              if len(flight) > AHEAD:
                done, told = flight.popleft()
                jax.block_until_ready(done)
                stop = bool(told)
              if writer:
                writer.push(step, stretch.name, metrics)
                if writer.latest:
                  bar.set_postfix(
                    loss=f"{writer.latest['loss']:.4f}", refresh=False
                  )
              bar.update()
              if stop or step % log.checkpoint_every == 0:
                self._save(step, state, writer)
              if stop:
                self._leave(step, plan)
        told = parallel.any_process(bool(caught), mesh)
      self._save(step, state, writer)
      if told:
        self._leave(step, plan)
      self.checkpoints.wait()
    finally:
      batches.close()
      if writer:
        writer.close()
    return state

  def _bar(self, stretch: Stretch, step: int) -> tqdm:
    run, name = self.workdir.name, stretch.name
    return tqdm(
      desc=name if run == name else f"{run}: {name}",
      total=stretch.last - stretch.first,
      initial=step - stretch.first,
      unit="step",
      mininterval=0.5,
      disable=not self.progress or jax.process_index() != 0,
    )

  def _leave(self, step: int, plan: list[Stretch]) -> None:
    self.checkpoints.wait()
    raise Interrupted(
      f"stopped at step {step} of {plan[-1].last}, everything is saved in"
      f" {self.workdir}; the same command goes on"
    )

  def _save(self, step: int, state: TrainState, writer: Writer | None) -> None:
    record = {
      "step": step,
      "config": config_lib.to_json(self.program.config),
      "metrics": writer.flush() if writer else [],
    }
    self.checkpoints.save(step, state._asdict(), record)
