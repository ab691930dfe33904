"""What some studies look at besides the drift of their rows.

An analysis takes the trained models of one seed and gives numbers; from the
numbers of all seeds it writes a section of the report and draws a chart.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from avd_jax.evaluation import analysis_charts
from avd_jax.studies import proxy, step_parts
from avd_jax.studies.rollouts import Prompts

Values = dict[str, Any]


class Subject(NamedTuple):
  """What an analysis looks at: the rows of a study, of one seed.

  Attributes:
    workdirs: trained runs, by the row's label.
    configs: what each was trained with, of one stage.
    baseline: label of the row that the others are compared with.
    prompts: held-out videos.
    mesh: what to run on.
    seed: the repetition.
  """

  workdirs: Mapping[str, Path]
  configs: Mapping[str, ConfigDict]
  baseline: str
  prompts: Prompts
  mesh: Mesh
  seed: int


class Analysis(NamedTuple):
  """Attributes:
  measure: the numbers of one seed.
  write: (numbers of all seeds, last third's failed frames by row) ->
    (markdown, PNG).
  """

  measure: Callable[[Subject], Values]
  write: Callable[[Sequence[Values], Mapping[str, float]], tuple[str, bytes]]


def _mean(values: Sequence[Any]) -> Any:
  """The mean over seeds of numbers in the same places."""
  first = values[0]
  if isinstance(first, dict):
    return {k: _mean([v[k] for v in values]) for k in first}
  if isinstance(first, list):
    return [_mean(v) for v in zip(*values, strict=True)]
  return float(np.mean(values))


def _spread(values: Sequence[float]) -> str:
  low, high = min(values), max(values)
  return f"{np.mean(values):.2f} ({low:.2f} to {high:.2f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
  lines.insert(1, "|" + " --- |" + " ---: |" * (len(head) - 1))
  return "\n".join(lines)


def _measure_proxy(subject: Subject) -> Values:
  return proxy.measure(
    subject.workdirs, subject.configs, subject.prompts, subject.seed
  )


def _write_proxy(
  values: Sequence[Values], failed: Mapping[str, float]
) -> tuple[str, bytes]:
  del failed
  mean = _mean(values)
  parts = []
  for model, kinds in mean["errors"].items():
    third = lambda curve: (curve[0], np.mean(curve), curve[-1])
    rows = []
    for kind, found in kinds.items():
      sizes = third(found["rms"])
      turns = third(found["direction"])
      rows.append(
        (
          kind,
          *(f"{x:.3f}" for x in sizes),
          f"{found['persistence']:.2f}",
          *(f"{x:.2f}" for x in turns),
          f"{np.mean(found['chance']):.2f}",
          *(f"{100 * x:.0f}" for x in found["bands"]),
        )
      )
    head = (
      "history", "rms, chunk 1", "mean", f"chunk {proxy.CHUNKS - 1}",
      "persistence", "cosine, chunk 1", "mean", f"chunk {proxy.CHUNKS - 1}",
      "by chance", *(f"{name} (%)" for name in proxy.BANDS),
    )  # fmt: skip
    parts.append(
      f"Errors of the model of row *{model}*:\n\n{_table(head, rows)}"
    )
  kinds = list(next(iter(mean["loss"].values())))
  rows = [
    (model, *(f"{loss[k]:.4f}" for k in kinds))
    for model, loss in mean["loss"].items()
  ]
  parts.append(
    "Flow loss of every model under its own history of every kind:\n\n"
    + _table(("model", *kinds), rows)
  )
  model, kinds = next(iter(mean["errors"].items()))
  pick = lambda field: {k: v[field] for k, v in kinds.items()}
  picture = analysis_charts.errors(
    pick("rms"),
    pick("direction"),
    kinds[proxy.REAL]["chance"],
    pick("bands"),
    proxy.BANDS,
    mean["loss"],
    real=proxy.REAL,
    title=f"Errors of histories, as the model of row “{model}” makes them",
  )
  return "\n\n".join(parts), picture


def _measure_cost(subject: Subject) -> Values:
  return step_parts.measure(subject.configs, subject.baseline, subject.mesh)


def _write_cost(
  values: Sequence[Values], failed: Mapping[str, float]
) -> tuple[str, bytes]:
  mean = _mean(values)
  spread = lambda label, part: _spread([seed[label][part] for seed in values])
  rows = [
    (
      label,
      spread(label, "step"),
      spread(label, "history"),
      f"{100 * part['history'] / part['step']:.0f}",
    )
    for label, part in mean.items()
  ]
  head = ("strategy", "step", "history", "history's share (%)")
  text = (
    "Time of a step, and of making its history alone, over the baseline's"
    f" step; mean (lowest to highest race):\n\n{_table(head, rows)}"
  )
  quality = {label: 100 * failed[label] for label in mean if label in failed}
  picture = analysis_charts.step_parts(
    mean, quality, "Failed frames in the last third (%)"
  )
  return text, picture


ANALYSES = {
  "proxy": Analysis(_measure_proxy, _write_proxy),
  "cost": Analysis(_measure_cost, _write_cost),
}
