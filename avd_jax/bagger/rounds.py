"""The rounds of BAgger: roll out, reverse, aggregate, train, and again.

  workdir/config.json             the whole run's
  workdir/base                    an ordinary run: stage "base", no rollouts
  workdir/store                   the aggregate, see data.aggregate
  workdir/round_1/plan.json       which weights roll out; written first
  workdir/round_1/train           an ordinary run: stage "round"
  workdir/round_1/manifest.json   what the round was; written last

Killed anywhere, a run goes on at the same place: a round with a manifest is
done, one without finds its shards and its training's checkpoints. A training
names the store and the weights it starts from by their paths: it goes on where
the workdir was when it began.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from avd_jax import checkpoint, disk
from avd_jax import config as config_lib
from avd_jax.algorithms import bagger
from avd_jax.bagger.rollouts import Rollouts
from avd_jax.data import aggregate
from avd_jax.errors import UserError
from avd_jax.training import loop

BASE, ROUND = "base", "round"
# A run may go on with more rounds; how it samples makes its trajectories.
FREE = (
  *(name for name in config_lib.FREE if name != "sampling."),
  "bagger.rounds",
)


def run(
  config: ConfigDict,
  workdir: str | Path,
  mesh: Mesh,
  progress: bool = True,
) -> list[Path]:
  """Trains the base, then every round, resuming what is there.

  Args:
    config: has the stages "base" and "round", and the section `bagger`.
    workdir: see above.
    mesh: what to train on; rollouts take one device of each process.
    progress: show bars (on process 0).

  Returns:
    The workdirs of the rounds' trainings, in order.

  Raises:
    UserError: a workdir or store of another config, a caption that cannot be
      rewritten, weights of a finished part that are gone.
    loop.Interrupted: after a signal, once everything is saved.
  [BAgger Alg. 1]
  """
  config_lib.check(config, config.bagger.frames)
  config_lib.check_bagger(config)
  for name in (BASE, ROUND):
    if name not in config.stage:
      raise UserError(f"the config has no stage {name!r}; BAgger trains it")
    config_lib.check(part(config, name))
  if config.data.aggregate:
    raise UserError("data.aggregate is set by the rounds; leave it empty")
  workdir = Path(workdir).absolute()
  rollouts = Rollouts(config, workdir / "store")
  _claim(workdir, config, write=False)
  rollouts.check()
  _claim(workdir, config, write=jax.process_index() == 0)
  return _Run(config, workdir, mesh, progress, rollouts).run()


def part(config: ConfigDict, stage: str) -> ConfigDict:
  """The config of one training: one stage, and nothing of the rounds."""
  one = config_lib.from_json(config_lib.to_json(config))
  one.stages, one.bagger = (stage,), config_lib.default().bagger
  return one


def round_config(config: ConfigDict, workdir: Path, round: int) -> ConfigDict:
  """The config of a round's training: seed videos and rounds 1 to `round`.

  It starts from the base's weights, as the paper does, or where the round
  before ended.
  """
  warm = config.bagger.restart == "warm"
  start = weights_before(workdir, round) if warm else workdir / BASE
  one = part(config, ROUND)
  one.init_from = str(start)
  chunks = config.data.frames // config.model.chunk_frames
  one.data.update(
    aggregate=str(workdir / "store"),
    aggregate_rounds=round,
    aggregate_prefix=bagger.prefix_chunks(chunks, config.bagger.prefix),
  )
  return one


def place(workdir: Path, round: int) -> Path:
  """A round's directory."""
  return workdir / f"round_{round}"


def weights_before(workdir: Path, round: int) -> Path:
  """The run whose weights roll out in a round."""
  return workdir / BASE if round == 1 else place(workdir, round - 1) / "train"


def _claim(workdir: Path, config: ConfigDict, write: bool) -> None:
  path, values = workdir / "config.json", config_lib.to_json(config)
  if path.exists():
    old = config_lib.complete(disk.read_json(path))
    changed = config_lib.differences(old, values, free=FREE)
    if changed:
      raise UserError(
        f"{workdir} was made with another config ({'; '.join(changed[:5])});"
        " use another --workdir, or the same values"
      )
  if write:
    disk.write_json(path, values)


def _check_weights(workdir: Path, step: int) -> None:
  """Makes sure that what a finished part has trained is still there."""
  try:
    checkpoints, newest = checkpoint.open_existing(workdir)
    checkpoints.close()
  except UserError as error:
    newest, problem = None, str(error)
  else:
    problem = f"the newest checkpoint is of step {newest}"
  if newest != step:
    raise UserError(
      f"the weights of {workdir} at step {step} are gone ({problem}), but"
      " trajectories and later rounds were made with them; put the checkpoint"
      " back, or start in another --workdir"
    )


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclasses.dataclass(frozen=True)
class _Run:
  """One call of `run`."""

  config: ConfigDict
  workdir: Path
  mesh: Mesh
  progress: bool
  rollouts: Rollouts

  def run(self) -> list[Path]:
    rounds = range(1, self.config.bagger.rounds + 1)
    self._check_finished(rounds)
    if not self._plan_file(1).exists():
      base = part(self.config, BASE)
      loop.train(base, self.workdir / BASE, self.mesh, self.progress)
    for number in rounds:
      if not self._manifest(number).exists():
        if self.progress and jax.process_index() == 0:
          tqdm.write(f"round {number} of {rounds[-1]}")
        self._round(number)
    return [place(self.workdir, number) / "train" for number in rounds]

  def _plan_file(self, number: int) -> Path:
    return place(self.workdir, number) / "plan.json"

  def _manifest(self, number: int) -> Path:
    return place(self.workdir, number) / "manifest.json"

  def _check_finished(self, rounds: range) -> None:
    """Finds at once what is missing, not when a later round needs it."""
    for number in rounds:
      plan, manifest = self._plan_file(number), self._manifest(number)
      if plan.exists():
        known = disk.read_json(plan)
        weights = weights_before(self.workdir, number)
        _check_weights(weights, known["source"]["step"])
        count = len(self.rollouts.seeds)
        if known["seed_clips"] != count:
          raise UserError(
            f"the seed set had {known['seed_clips']} clips when round {number}"
            f" began and has {count} now; put back what it was"
          )
      if manifest.exists():
        known = disk.read_json(manifest)
        aggregate.shards(self.rollouts.store, number)
        _check_weights(place(self.workdir, number) / "train", known["step"])

  def _begin(self, number: int) -> dict[str, Any]:
    """The plan of a round: what it was begun with, if it was."""
    path = self._plan_file(number)
    if path.exists():
      return disk.read_json(path)
    weights = weights_before(self.workdir, number)
    checkpoints, step = checkpoint.open_existing(weights)
    checkpoints.close()
    name = str(weights.relative_to(self.workdir))
    plan = {
      "round": number,
      "source": {"workdir": name, "step": step},
      "seed_clips": len(self.rollouts.seeds),
      "trajectories": len(self.rollouts.clips(number)),
      "started": _now(),
      "seconds": {},
    }
    self._write(path, plan)
    return plan

  def _write(self, path: Path, values: dict[str, Any]) -> None:
    if jax.process_index() == 0:
      disk.write_json(path, values)

  @contextlib.contextmanager
  def _timed(self, plan: dict[str, Any], name: str) -> Iterator[None]:
    """Adds the time spent inside; what a kill cut off is not known."""
    start = time.perf_counter()
    try:
      yield
    finally:
      spent = time.perf_counter() - start
      plan["seconds"][name] = plan["seconds"].get(name, 0.0) + spent
      self._write(self._plan_file(plan["round"]), plan)

  def _round(self, number: int) -> None:
    plan = self._begin(number)
    weights = weights_before(self.workdir, number)
    with self._timed(plan, "rollouts"):
      self.rollouts.make(number, weights, plan["source"], self.progress)
    lead = jax.process_index() == 0
    shards = aggregate.shards(self.rollouts.store, number, verify=lead)
    config = round_config(self.config, self.workdir, number)
    train = place(self.workdir, number) / "train"
    with self._timed(plan, "training"):
      state = loop.train(config, train, self.mesh, self.progress)
    if not lead:  # what follows reads the whole round
      return
    values = config_lib.to_json(config)
    base = config_lib.to_json(part(self.config, BASE))
    text = json.dumps(values, sort_keys=True).encode()
    manifest = plan | {
      "finished": _now(),
      "train": str(train.relative_to(self.workdir)),
      "step": int(state.step),
      "config_sha256": hashlib.sha256(text).hexdigest(),
      "config_unlike_base": config_lib.differences(base, values, free=()),
      "shards": shards,
      "error_by_frame": self.rollouts.error_by_frame(number),
    }
    self._write(self._manifest(number), manifest)
