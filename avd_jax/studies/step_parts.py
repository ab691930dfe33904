"""Where a training step's time goes, strategy by strategy.

All of them take their turn in one process (`race`), so that a busy machine
slows each alike and ratios stand.
"""

from collections.abc import Callable, Mapping

from jax.sharding import Mesh
from ml_collections import ConfigDict

from avd_jax.studies import race, steps

ROUNDS = 20


def measure(
  configs: Mapping[str, ConfigDict],
  baseline: str,
  mesh: Mesh,
  rounds: int = ROUNDS,
) -> dict[str, dict[str, float]]:
  """Races the steps of some strategies, and the making of their histories.

  Args:
    configs: by label; it is the last stage of each that is raced.
    baseline: label of the step that the others are divided by.
    mesh: what to run on.
    rounds: of every contender in turn.

  Returns:
    By label: step, the time of a step over the baseline's, and history, that
    of making the history alone over the baseline's step; medians of ratios
    within a round. A strategy that mixes two kinds of steps counts both.
  """
  contenders: dict[str, Callable] = {}
  for label, config in configs.items():
    ready, name = steps.prepare(config, mesh), config.stages[-1]
    contenders[label] = steps.step(*ready, name)
    contenders[f"history: {label}"] = steps.history(*ready, name)
    if every := _every(config):
      contenders[f"full: {label}"] = steps.step(*ready, name, every - 1)
  times = race.run(contenders, rounds)
  found = {}
  for label, config in configs.items():
    step = race.ratio(times, label, baseline)
    if every := _every(config):
      full = race.ratio(times, f"full: {label}", baseline)
      step = ((every - 1) * step + full) / every
    found[label] = {
      "step": step,
      "history": race.ratio(times, f"history: {label}", baseline),
    }
  return found


def _every(config: ConfigDict) -> int:
  return config.stage[config.stages[-1]].degradation.full_every
