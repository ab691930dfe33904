"""Runs a study: trains branches, rolls rows out, measures. All of it resumes.

What is finished lies in files (`study_files`) and is not done again. Processes
may share a workdir: on different seeds they run side by side, on the same
branch and seed the second waits.
"""

import dataclasses
import datetime
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from avd_jax import config as config_lib
from avd_jax import parallel, sampling
from avd_jax.bagger import rounds
from avd_jax.bagger.rollouts import Rollouts
from avd_jax.disk import read_json
from avd_jax.errors import UserError
from avd_jax.evaluation.drift import FrameMetrics
from avd_jax.studies import (
  analyses,
  rollouts,
  study_cost,
  study_files,
  study_keys,
  study_report,
)
from avd_jax.studies import study as study_lib
from avd_jax.studies.study import Row, Study
from avd_jax.studies.study_files import Files
from avd_jax.training import loop


@dataclasses.dataclass(frozen=True)
class Runner:
  """A study on a mesh.

  Attributes:
    study: checked, with the lengths of equal-time branches settled.
    files: where everything lies.
    mesh: what to run on.
    about: written into every row: command, device.
  """

  study: Study
  files: Files
  mesh: Mesh
  about: Mapping[str, str]

  def train(self, name: str, seed: int) -> list[Path]:
    """The workdirs of a trained branch (one; of BAgger, one a round).

    Trains it, and its parents before it, where that was not done yet.

    Raises:
      loop.Interrupted: after a signal, once everything is saved.
    """
    branch, study = self.study.branch(name), self.study
    run = self.files.run(study, name, seed)
    config = _seeded(study, name, seed)
    if done := _finished(run, max(1, branch.rounds)):
      _check_same(run, config)
      return done
    if branch.parent:
      parent = self.train(branch.parent, seed)[-1]
      config.init_from = str(parent.resolve())
    with study_files.alone(run, f"trains {name}, seed {seed}"):
      if done := _finished(run, max(1, branch.rounds)):
        return done
      if branch.rounds:
        done = rounds.run(config, run, self.mesh)
      else:
        loop.train(config, run, self.mesh)
        done = [run]
      _finish(run, done)
    return done

  @functools.cached_property
  def _prompts(self) -> dict[str, rollouts.Prompts]:
    return {}

  def prompts(self, config: ConfigDict) -> rollouts.Prompts:
    """Held-out videos; rows in one world share them."""
    key = f"{config.data}{config.evaluation}"
    if key not in self._prompts:
      self._prompts[key] = rollouts.held_out(config)
    return self._prompts[key]

  def measure(self, row: Row, seed: int) -> dict[str, Any]:
    """Rolls a trained row out; what is written of it."""
    study, branch = self.study, self.study.branch(row.branch)
    trained = self.train(row.branch, seed)
    last = trained[row.round - 1]  # round 0 has but one
    config = study_lib.row_config(study, row)
    prompts = self.prompts(config)
    sampler = dataclasses.replace(sampling.load(last), config=config)
    video = rollouts.roll_out(sampler, prompts, row.label)
    metrics = rollouts.measure(video, prompts)
    return {
      "label": row.label,
      "seed": seed,
      "key": study_keys.row_key(study, row),
      "branch": row.branch,
      "digest": study_keys.digest(study, row.branch),
      "round": row.round,
      "changes": {name: str(value) for name, value in row.changes.items()},
      "steps": branch.stage.steps,
      "given": prompts.given,
      "train_frames": config.data.frames,
      "summary": rollouts.summarize(metrics, prompts),
      "curves": _by_frame(metrics),
      **self.about,
      "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }

  def analyse(self, seed: int) -> dict[str, Any]:
    """Looks at all rows together; what is written of it."""
    study = self.study
    subject = analyses.Subject(
      {r.label: self.train(r.branch, seed)[r.round - 1] for r in study.rows},
      {r.label: study_lib.config_of(study, r.branch) for r in study.rows},
      study.baseline,
      self.prompts(study.config),
      self.mesh,
      seed,
    )
    return {
      "seed": seed,
      "key": study_keys.analysis_key(study),
      "values": analyses.ANALYSES[study.analysis].measure(subject),
      **self.about,
    }


def run(
  study: Study,
  files: Files,
  mesh: Mesh,
  *,
  seeds: Sequence[int],
  labels: Sequence[str] = (),
  about: Mapping[str, str],
) -> None:
  """Trains and measures what is missing, and reports after every seed.

  The analysis is part of it where no rows were picked.

  Args:
    study: checked.
    files: where everything lies.
    mesh: what to run on.
    seeds: which repetitions.
    labels: which rows; none for all of them.
    about: written into every row: command, device.

  Raises:
    UserError: an unknown row, a batch that the mesh does not divide.
    loop.Interrupted: after a signal, once everything is saved.
  """
  rows = _pick(study, labels)
  for branch in study.branches:
    config = study_lib.config_of(study, branch.name)
    parallel.check_batch(
      config.data.batch_size, config.optimizer.accumulation, mesh
    )
    for seed in seeds if branch.rounds else ():
      store = files.run(study, branch.name, seed) / "store"
      Rollouts(_seeded(study, branch.name, seed), store).check()
  wanted = {row.branch for row in rows}
  settled = study_cost.settle(study, files, mesh, wanted)
  runner = Runner(settled, files, mesh, about)
  for row in rows:  # what they cannot be measured with, before any compute
    runner.prompts(study_lib.row_config(settled, row))
  total = len(seeds) * len(rows)
  for i, seed in enumerate(seeds):
    for j, row in enumerate(rows):
      if seed in files.measured(settled, row):
        continue
      at = f"row {i * len(rows) + j + 1} of {total}"
      print(f"{at}: {row.label}, seed {seed}", flush=True)
      values = runner.measure(row, seed)
      study_files.write_json(files.row(row, seed), values)
    if study.analysis and not labels and seed not in files.analysed(settled):
      print(f"analysis: {study.analysis}, seed {seed}", flush=True)
      study_files.write_json(files.analysis(seed), runner.analyse(seed))
    study_report.write(study, files)


def _pick(study: Study, labels: Sequence[str]) -> tuple[Row, ...]:
  by_name = {row.label: row for row in study.rows}
  by_name |= {study_lib.slug(row.label): row for row in study.rows}
  unknown = [label for label in labels if label not in by_name]
  if unknown:
    raise UserError(
      f"no row {unknown[0]!r}; there are"
      f" {', '.join(repr(row.label) for row in study.rows)}"
    )
  return tuple(by_name[label] for label in labels) or study.rows


def _finished(run: Path, count: int) -> list[Path]:
  """The workdirs that a finished run has left, or none if there are fewer."""
  path = run / "study.json"
  names = read_json(path).get("trained", []) if path.exists() else []
  return [run / name for name in names[:count] if len(names) >= count]


def _finish(run: Path, trained: Sequence[Path]) -> None:
  names = [str(path.resolve().relative_to(run.resolve())) for path in trained]
  study_files.write_json(run / "study.json", {"trained": names})


def _seeded(study: Study, name: str, seed: int) -> ConfigDict:
  """What a branch trains with in repetition `seed`, but for `init_from`."""
  config = study_lib.config_of(study, name)
  config.seed = config.data.seed = study_keys.own_seed(study, name, seed)
  return config


def _check_same(run: Path, config: ConfigDict) -> None:
  """Refuses a finished run that other values made, by its own record.

  Its digest does not tell: a default that has changed since is in neither.
  """
  old = read_json(run / "config.json")
  new = config_lib.to_json(config)
  shared = _shared(new, old)
  free = (*config_lib.FREE, "init_from", "bagger.rounds")
  changed = config_lib.differences(_shared(old, shared), shared, free=free)
  if changed:
    raise UserError(
      f"{run} was trained with other values ({'; '.join(changed[:5])}); move"
      " it away to train it anew"
    )


def _shared(values: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
  """The part of a tree of values whose names another tree has too."""
  return {
    name: _shared(value, other[name])
    if isinstance(value, dict) and isinstance(other[name], dict)
    else value
    for name, value in values.items()
    if name in other
  }


def _by_frame(metrics: FrameMetrics) -> dict[str, list[float]]:
  """Means over videos, for charts."""
  return {
    name: np.round(values.mean(0), 6).tolist()
    for name, values in metrics.items()
    if not np.isnan(values).any()
  }
