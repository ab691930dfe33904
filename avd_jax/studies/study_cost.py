"""Equal time: how many steps of one branch cost as much as another's.

Two methods that take equal steps may not take equal time. The costs of a step
are raced (`race`) once, kept in a file, and every seed then takes the same
steps.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from avd_jax.disk import read_json
from avd_jax.studies import race, steps, study_files
from avd_jax.studies import study as study_lib
from avd_jax.studies.study import Study
from avd_jax.studies.study_files import Files

ROUNDS = 20


def settle(
  study: Study,
  files: Files,
  mesh: Mesh | None = None,
  wanted: Collection[str] = (),
) -> Study:
  """The study with the lengths of equal-time branches, where they are known.

  Args:
    study: checked.
    files: where costs are kept.
    mesh: measures there what is not known; None measures nothing.
    wanted: branches whose cost is measured if it is not known.
  """
  settled = study
  for branch in study.branches:
    if not branch.equal_time_to:
      continue
    path = files.cost(study, branch.name)
    if not path.exists() and mesh is not None and branch.name in wanted:
      with study_files.alone(files.place, "measures the cost of a step"):
        if not path.exists():
          study_files.write_json(path, measure(study, branch.name, mesh))
    if path.exists():
      length = read_json(path)["steps"]
      settled = with_steps(settled, branch.name, length)
  return settled


def with_steps(study: Study, name: str, steps: int) -> Study:
  """The study with a branch of another length, its schedule scaled alike."""
  stage = study.branch(name).stage
  scale = steps / stage.steps
  warmup = round(scale * stage.warmup_steps)
  decay = min(steps - warmup, round(scale * stage.decay_steps))
  longer = ConfigDict(
    stage.to_dict()
    | dict(steps=steps, warmup_steps=warmup, decay_steps=max(0, decay))
  )
  branches = tuple(
    dataclasses.replace(b, stage=longer) if b.name == name else b
    for b in study.branches
  )
  return dataclasses.replace(study, branches=branches)


def measure(study: Study, name: str, mesh: Mesh) -> dict[str, Any]:
  """Races a step of a branch against one of `equal_time_to`.

  Returns:
    ratio (the median over rounds of the other's time over this one's),
    milliseconds of both, and the steps that this one gets.
  """
  other = study.branch(name).equal_time_to
  print(f"{name}: racing its step against {other}'s", flush=True)
  contenders = {}
  for branch in (name, other):
    config = study_lib.config_of(study, branch)
    contenders[branch] = steps.step(*steps.prepare(config, mesh), branch)
  times = race.run(contenders, ROUNDS)
  ratio = race.ratio(times, other, name)
  return {
    "ratio": ratio,
    "ms": {branch: 1e3 * race.median(t) for branch, t in times.items()},
    "rounds": ROUNDS,
    "steps": max(1, round(ratio * study.branch(other).stage.steps)),
  }
