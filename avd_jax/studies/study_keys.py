"""Names for what a study has trained and measured, made of what went in.

A model's directory and a row's file carry a digest of every setting that they
depend on. What was made with others has another name, and is not taken for it.
"""

import hashlib
import json
from typing import Any

from ml_collections import ConfigDict

from avd_jax import config as config_lib
from avd_jax.studies.study import (
  Row,
  Study,
  ancestors,
  config_of,
  remembered,
  row_config,
)

# The same model may be trained with many seeds, from anywhere; a round of
# BAgger does not know how many come after it.
_SEEDS = ("seed", "data.seed")
_NOT_IN_DIGEST = (
  *config_lib.FREE,
  *_SEEDS,
  "init_from",
  "bagger.rounds",
)


def _fields(config: ConfigDict) -> dict[str, Any]:
  """Every field of a config by its dotted name."""
  flat: dict[str, Any] = {}

  def visit(values, prefix):
    for name, value in values.items():
      if isinstance(value, dict):
        visit(value, f"{prefix}{name}.")
      else:
        flat[prefix + name] = value

  visit(config_lib.to_json(config), "")
  return flat


def _changed(config: ConfigDict) -> dict[str, Any]:
  """Fields that differ from the defaults.

  Only those, so that a field which configs learn to have later, and which
  leaves things as they are, does not make another model of a trained one.
  """
  plain = config_lib.default()
  stages = {name: config_lib.stage("", 0) for name in config.stage}
  plain.stage = ConfigDict(stages)
  defaults = _fields(plain)
  return {
    field: value
    for field, value in _fields(config).items()
    if field not in defaults or defaults[field] != value
  }


def _hash(*values: Any) -> str:
  text = json.dumps(values, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


@remembered
def digest(study: Study, name: str) -> str:
  """Eight hex digits of all that a branch's weights depend on but the seed."""
  branch = study.branch(name)
  origin = study.config.init_from
  if branch.parent:
    origin = digest(study, branch.parent)
  free = (*_NOT_IN_DIGEST, "bagger.")
  if branch.rounds:  # they are trained on rollouts
    free = tuple(name for name in _NOT_IN_DIGEST if name != "sampling.")
  fields = {
    field: value
    for field, value in _changed(config_of(study, name)).items()
    if not field.startswith(free)
  }
  if branch.parent:
    return _hash(fields, origin, own_seed(study, name, 0))
  return _hash(fields, origin)


def own_seed(study: Study, name: str, seed: int) -> int:
  """The seed that a branch trains with in repetition `seed`.

  Not its parent's: a stage counts its steps from 0, and would see the clips,
  levels and noise of its parent's first steps again.
  """
  return seed + 1000 * (len(ancestors(study, study.branch(name))) - 1)


def row_key(study: Study, row: Row) -> str:
  """Eight hex digits of all that a row's numbers depend on but the seed."""
  measured = {
    field: value
    for field, value in _changed(row_config(study, row)).items()
    if field.startswith(("sampling.", "evaluation.", "model."))
  }
  return _hash(digest(study, row.branch), row.round, measured)


def analysis_key(study: Study) -> str:
  """The same of a study's analysis: it may look at every row."""
  return _hash(study.analysis, [row_key(study, row) for row in study.rows])
