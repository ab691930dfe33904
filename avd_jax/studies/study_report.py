"""A study's report: NAME.md, NAME.json and charts, from the rows on disk.

Nothing else goes in, so that whoever writes it last writes it right.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from avd_jax.evaluation import drift, study_chart
from avd_jax.studies import analyses, study_cost, study_files
from avd_jax.studies import study as study_lib
from avd_jax.studies.study import Row, Study
from avd_jax.studies.study_files import Files

Rows = dict[int, dict[str, Any]]  # what was measured, by seed


class Column(NamedTuple):
  """A column: where a summary has it, words, how to print and to compare it."""

  key: str
  label: str
  digits: int = 2
  percent: bool = False
  ratio: bool = False  # to the baseline; else the difference


# Of a list of thirds, the last. What a kind of world lacks is not shown.
DRIFT = (
  Column("delta_db", "drift Δ (dB) ↓"),
  Column("failed.2", "failed (%) ↓", 1, percent=True, ratio=True),
  Column("violation.2", "violation (%) ↓", 1, percent=True, ratio=True),
  Column("object_share.2", "objects (%) ↑", 1, percent=True),
  Column("background_error.2", "background error ↓", 4, ratio=True),
  Column("hue_error.2", "hue error ↓", 3, ratio=True),
  Column("state_error.2", "state error ↓", 3, ratio=True),
  Column("delta.sharpness", "drift of sharpness ↓", 3),
  Column("delta.saturation", "drift of saturation ↓", 3),
  Column("delta.contrast", "drift of contrast ↓", 3),
)
CONTENT = (
  *(
    Column(f"psnr_at.{n}", f"PSNR, frame {n} (dB) ↑", 1) for n in drift.HORIZONS
  ),
  Column("flicker.2", "flicker", 5, ratio=True),
)
PERCENT = ("failed", "violation")
THIRDS = ((0, "first"), (1, "second"), (2, "last"))


def value(summary: Mapping[str, Any], key: str) -> Any:
  """A number of a summary by its dotted path, or None."""
  found: Any = summary
  for part in key.split("."):
    if isinstance(found, list):
      found = found[int(part)]
    elif isinstance(found, dict):
      found = found.get(part)
    else:
      return None
  return found


def write(study: Study, files: Files, out: str | Path = "") -> Path:
  """Writes the report on what was measured so far; gives the path of NAME.md.

  Args:
    study: checked.
    files: where its rows lie.
    out: another directory to write it to as well.
  """
  with study_files.alone(files.place, "writes the report"):
    study = study_cost.settle(study, files)
    found = {row.label: files.measured(study, row) for row in study.rows}
    found = {label: rows for label, rows in found.items() if rows}
    name = files.name
    report: dict[str, str | bytes] = {}
    charts: dict[str, bytes | None] = {}
    if found and "frontier" in study.plots:
      charts[f"{name}.png"] = _frontier(study, found)
    if found and "curves" in study.plots:
      charts[f"{name}_curves.png"] = _curves(study, found)
    analysed, section = files.analysed(study), ""
    if analysed:
      failed = {
        label: share
        for label, rows in found.items()
        if (share := value(aggregate(rows), "failed.2")) is not None
      }
      section, charts[f"{name}_{study.analysis}.png"] = analyses.ANALYSES[
        study.analysis
      ].write([one["values"] for one in analysed.values()], failed)
      seeds = ", ".join(map(str, sorted(analysed)))
      section = f"What follows was measured on seeds {seeds}.\n\n{section}"
    drawn = {file: png for file, png in charts.items() if png}
    report |= drawn
    report[f"{name}.json"] = _json(study, found, analysed)
    report[f"{name}.md"] = _markdown(study, found, section, list(drawn))
    for place in (files.place, *([Path(out)] if out else [])):
      for file, content in report.items():
        study_files.write(place / file, content)
  return files.place / f"{name}.md"


def aggregate(rows: Rows) -> drift.Summary:
  """A row's summary: means and ranges over its seeds."""
  return drift.aggregate([row["summary"] for row in rows.values()])


def against(rows: Rows, baseline: Rows, column: Column) -> list[float] | None:
  """A row compared with the baseline, over the seeds that both have.

  Returns:
    Mean, lowest and highest over seeds of the ratio (or difference) of the two,
    seed by seed; None where there is none. The mean of a ratio is that of the
    means.
  """
  pairs = [
    (value(rows[s]["summary"], column.key), value(b["summary"], column.key))
    for s, b in baseline.items()
    if s in rows
  ]
  if not pairs or any(None in pair for pair in pairs):
    return None
  if not column.ratio:
    differences = [a - b for a, b in pairs]
    return _spread(differences, statistics.fmean(differences))
  if any(b == 0 for _, b in pairs):
    return None
  ours, theirs = zip(*pairs, strict=True)
  return _spread([a / b for a, b in pairs], sum(ours) / sum(theirs))


def _spread(values: Sequence[float], mean: float) -> list[float]:
  return [mean, min(values), max(values)]


def _json(
  study: Study, found: Mapping[str, Rows], analysed: Mapping[int, Any]
) -> str:
  rows = []
  for row in study.rows:
    measured = found.get(row.label)
    if not measured:
      continue
    other = found.get(study.reference(row), {})
    first = next(iter(measured.values()))
    same = ("label", "branch", "digest", "round", "changes", "steps")
    each = ("device", "date")
    rows.append(
      {name: first[name] for name in same}
      | {"seeds": list(measured)}
      | {name: [m[name] for m in measured.values()] for name in each}
      | {"summary": aggregate(measured)}
      | {
        "against": study.reference(row),
        "compared": {
          c.key: against(measured, other, c) for c in DRIFT + CONTENT
        },
        "summary_by_seed": {s: m["summary"] for s, m in measured.items()},
        "curves": {
          name: np.mean([m["curves"][name] for m in measured.values()], 0)
          .round(6)
          .tolist()
          for name in study.shown
          if name in first["curves"]
        },
      }
    )
  return (
    json.dumps(
      {
        "title": study.title,
        "question": study.question,
        "commands": _all(found, "command"),
        "baseline": study.baseline,
        "rows": rows,
        "analysis": {s: one["values"] for s, one in analysed.items()},
        "claims": study.claims,
        "found": study.found,
      },
      indent=1,
    )
    + "\n"
  )


def _all(found: Mapping[str, Rows], name: str) -> list[str]:
  """The different values of a field, sorted."""
  return sorted({m[name] for rows in found.values() for m in rows.values()})


def _markdown(
  study: Study,
  found: Mapping[str, Rows],
  section: str,
  charts: Sequence[str],
) -> str:
  missing = [row.label for row in study.rows if row.label not in found]
  seeds = sorted({seed for rows in found.values() for seed in rows})
  lines = [f"# {study.title}", "", study.question, ""]
  if not found:
    return "\n".join([*lines, "Nothing was measured yet.", ""])
  lines += [f"    {command}" for command in _all(found, "command")]
  dates = _all(found, "date")
  lines += [
    "",
    f"Seeds {', '.join(map(str, seeds))}; {'; '.join(_all(found, 'device'))};"
    f" {dates[0][:10]} to {dates[-1][:10]}.",
    "",
    *_tables(study, found),
  ]
  if missing:
    lines += [f"Not measured yet: {'; '.join(missing)}.", ""]
  lines += [section, ""] if section else []
  lines += [f"![{name}]({name})" for name in charts]
  for heading, text in (
    ("What the papers report", study.claims),
    ("What was found here", study.found),
  ):
    if text:
      lines += ["", f"## {heading}", "", text]
  return "\n".join([*lines, ""])


def _tables(study: Study, found: Mapping[str, Rows]) -> list[str]:
  summaries = {label: aggregate(rows) for label, rows in found.items()}
  shown = [
    [
      c
      for c in columns
      if any(value(m, c.key) is not None for m in summaries.values())
    ]
    for columns in (DRIFT, CONTENT)
  ]
  lines = [
    "Means (lowest to highest seed): the range is that of trainings, all of"
    " them measured on the same videos with the same noise. Drift is the last"
    " third's. A model that forgets its video has few failed frames: read them"
    " with PSNR and background error. Steps are those of the row's own stage.",
    "",
  ]
  for columns, last in zip(shown, (False, True), strict=True):
    heads = [c.label for c in columns] + ["seeds", "steps"] * last
    body = [
      [label, *(_cell(m, c) for c in columns)] + _size(found[label]) * last
      for label, m in summaries.items()
    ]
    lines += _table(["row", *heads], body)
  for name in study.thirds:
    columns = [
      Column(f"{name}.{i}", label, 1, name in PERCENT) for i, label in THIRDS
    ]
    body = [
      [label, *(_cell(m, c) for c in columns)] for label, m in summaries.items()
    ]
    lines += [f"By thirds of the rollout: {study_lib.SHOWN[name]}.", ""]
    lines += _table(["row", *(c.label for c in columns)], body)
  return lines + _compared(study, found, shown[0] + shown[1])


def _compared(
  study: Study, found: Mapping[str, Rows], columns: Sequence[Column]
) -> list[str]:
  """A table for every row that others are compared with."""
  groups: dict[str, list[Row]] = {}
  for row in study.rows:
    reference = study.reference(row)
    if row.label in found and reference in found and row.label != reference:
      groups.setdefault(reference, []).append(row)
  references, lines = set(groups), []
  for reference, rows in groups.items():
    body = [
      [
        row.label,
        *(
          _against_cell(against(found[row.label], found[reference], c), c)
          for c in columns
        ),
      ]
      for row in rows
      # A baseline of a world of its own is not compared with another's.
      if row.label not in references
    ]
    if not body:
      continue
    lines += [
      f"Against {reference}: the ratio of the means (×), or the mean"
      " difference (lowest to highest, seed by seed).",
      "",
      *_table(["row", *(c.label for c in columns)], body),
    ]
  return lines


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
  rows = [heads, ["---"] + ["---:"] * (len(heads) - 1), *body]
  return [f"| {' | '.join(row)} |" for row in rows] + [""]


def _print(x: float, column: Column, sign: str = "") -> str:
  shown = round(100 * x if column.percent else x, column.digits)
  return f"{shown + 0.0:{sign}.{column.digits}f}"  # no -0.0


def _cell(summary: drift.Summary, column: Column) -> str:
  mean = value(summary, column.key)
  if mean is None:
    return "–"
  text = _print(mean, column)
  if summary["seeds"] == 1:
    return text
  low, high = value(summary["range"], column.key)
  return f"{text} ({_print(low, column)} to {_print(high, column)})"


def _against_cell(spread: list[float] | None, column: Column) -> str:
  if spread is None:
    return "–"
  if column.ratio:
    mean, low, high = (f"{x:.2f}" for x in spread)
    mean = f"×{mean}"
  else:
    mean, low, high = (_print(x, column, "+") for x in spread)
  return mean if low == high else f"{mean} ({low} to {high})"


def _size(rows: Rows) -> list[str]:
  return [str(len(rows)), str(next(iter(rows.values()))["steps"])]


def _shown(study: Study, every: Sequence[Mapping[str, Any]]) -> dict[str, str]:
  """What all of these have of what is to be shown, and its words."""
  names = [n for n in study.shown if all(n in one for one in every)]
  return {name: study_lib.SHOWN[name] for name in names}


def _references(study: Study) -> dict[str, str]:
  """The row that each row is compared with."""
  return {row.label: study.reference(row) for row in study.rows}


def _frontier(study: Study, found: Mapping[str, Rows]) -> bytes | None:
  """Drift against content; None in a world that lacks one of them."""
  summaries = {
    label: [m["summary"] for m in rows.values()]
    for label, rows in found.items()
  }
  every = [s for group in summaries.values() for s in group]
  axes = _shown(study, every)
  if not axes or not all("psnr_at" in s for s in every):
    return None
  points = {
    label: {
      **{n: [_scale(n) * s[n][2] for s in group] for n in axes},
      "content": [_content(s) for s in group],
    }
    for label, group in summaries.items()
  }
  return study_chart.frontier(
    points,
    {name: f"{words}, last third" for name, words in axes.items()},
    "PSNR, mean of frames 1, 2, 4, 8 (dB)",
    against=_references(study),
  )


def _scale(name: str) -> float:
  return 100.0 if name in PERCENT else 1.0


def _content(summary: drift.Summary) -> float:
  known = [x for x in summary["psnr_at"].values() if x is not None]
  return statistics.fmean(known)


def _curves(study: Study, found: Mapping[str, Rows]) -> bytes | None:
  """Drift over the frames; None in a world of which nothing is shown."""
  every = [m for rows in found.values() for m in rows.values()]
  titles = _shown(study, [m["curves"] for m in every])
  if not titles:
    return None
  by_row = {
    label: {
      name: _scale(name) * np.array([m["curves"][name] for m in rows.values()])
      for name in titles
    }
    for label, rows in found.items()
  }
  return study_chart.curves(
    by_row,
    titles,
    against=_references(study),
    given=every[0]["given"],
    train_frames=every[0]["train_frames"],
  )
