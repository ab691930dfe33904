"""What a comparison of methods leaves behind: numbers, charts, film, a page."""

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from avd_jax.data import video as video_io
from avd_jax.errors import UserError
from avd_jax.evaluation import charts, page
from avd_jax.evaluation.drift import HORIZONS, Summary

# Panels of the film are enlarged to about this many pixels.
_PANEL = 156


class Row(NamedTuple):
  """A line of the table: key of a summary, words, and how to print it."""

  key: str
  label: str
  better: str
  percent: bool = False
  digits: int = 3


ROWS = (
  Row("failed", "failed frames", "lower", percent=True),
  Row("violation", "laws broken", "lower", percent=True),
  Row("object_share", "objects intact", "higher", percent=True),
  Row("broken", "broken frames", "lower", percent=True),
  Row("off_manifold", "off-manifold MSE", "lower"),
  Row("background_error", "background error", "lower"),
  Row("hue_error", "hue error", "lower"),
  Row("state_error", "state error (px)", "lower"),
  Row("flicker", "flicker", "", digits=4),
)


def _rows(runs: Mapping[str, Summary]) -> list[Row]:
  """What was measured of all of them: worlds differ in what they have."""
  return [row for row in ROWS if all(row.key in m for m in runs.values())]


def format_table(runs: Mapping[str, Summary]) -> str:
  """Gives the summaries as a table for a terminal; thirds side by side."""
  names = [name.replace("_", " ") for name in runs]
  width = max(24, *(len(n) + 2 for n in names))
  header = f"{'':<20}" + "".join(f"{n:>{width}}" for n in names)
  lines = [header]

  def add(label: str, values: Sequence[str], better: str):
    note = f"  {better} is better" if better else ""
    cells = "".join(f"{v:>{width}}" for v in values)
    lines.append(f"{label:<20}{cells}{note}")

  drift = [f"{m['delta_db']:+.2f}" for m in runs.values()]
  add("drift (dB)", drift, "lower")
  for row in _rows(runs):
    unit = " (%)" if row.percent else ""
    values = [
      " ".join(f"{format_value(v, row):>7}" for v in m[row.key])
      for m in runs.values()
    ]
    add(row.label + unit, values, row.better)
  for n in HORIZONS:
    values = [_decibel(m["psnr_at"][str(n)]) for m in runs.values()]
    add(f"PSNR, frame {n} (dB)", values, "higher")
  seeds = {m["seeds"] for m in runs.values()}
  lines.append(
    "three numbers: first, middle and last third of the generated frames; "
    f"{'/'.join(str(s) for s in sorted(seeds))} seed(s)"
  )
  return "\n".join(lines)


def format_value(value: float, row: Row) -> str:
  """A cell, in the row's unit and digits."""
  return f"{100 * value:.1f}" if row.percent else f"{value:.{row.digits}f}"


def _decibel(value: float | None) -> str:
  return "-" if value is None else f"{value:.1f}"


def write_report(
  out_dir: str | os.PathLike,
  runs: Mapping[str, Summary],
  curves: charts.Curves,
  videos: Mapping[str, np.ndarray],
  *,
  given: int,
  train_frames: int,
  config: Mapping[str, Any] | None = None,
  timings: Mapping[str, float] | None = None,
  command: str = "",
  fps: float = 8,
  rows: int = 4,
) -> Path:
  """Writes drift.json, drift.png, comparison.mp4 and .gif, and report.html.

  Args:
    out_dir: made where it is missing.
    runs: summaries by method ("teacher_forcing"), in the order to show them;
      drift.json holds exactly these.
    curves: of the same methods, from `drift.curves`.
    videos: columns of the film by name, [b f h w 3] in [-1, 1], the truth
      first.
    given: frames at the start that were given, not generated.
    train_frames: length of the videos in training.
    config: what was run; anything JSON or str can print.
    timings: seconds by what they were spent on.
    command: that made the report, so that it can be made again.
    fps: of the film.
    rows: videos of the film.

  Returns:
    The path of report.html, which needs no other file.

  Raises:
    UserError: no method, or curves and videos of different methods.
  """
  methods = set(runs)
  if not methods or methods != set(curves) or not methods <= set(videos):
    raise UserError(
      f"a report on {sorted(methods)} got curves of {sorted(curves)} and "
      f"videos of {sorted(videos)}; give all three for every method"
    )
  out = Path(out_dir)
  out.mkdir(parents=True, exist_ok=True)
  text = json.dumps(dict(runs), indent=2, allow_nan=False)
  (out / "drift.json").write_text(text + "\n", encoding="utf-8")

  curves = {name: curves[name] for name in runs}
  png = charts.draw(
    curves, charts.PANELS, given=given, train_frames=train_frames
  )
  (out / "drift.png").write_bytes(png)

  film = comparison(videos, given=given, rows=rows)
  mp4 = out / "comparison.mp4"
  video_io.write_video(mp4, film, fps)
  video_io.write_video(out / "comparison.gif", film, fps)

  html = page.render(
    runs=runs,
    curves=curves,
    findings=_findings(runs),
    table=_table(runs),
    film=mp4.read_bytes(),
    film_size=film.shape[1:3],
    columns=[name.replace("_", " ") for name in videos],
    config=config or {},
    timings=timings or {},
    command=command,
    given=given,
    train_frames=train_frames,
  )
  path = out / "report.html"
  path.write_text(html, encoding="utf-8")
  return path


def _findings(runs: Mapping[str, Summary]) -> list[page.Finding]:
  """What a reader should see first: what is gained, and what it costs."""

  def values(value):
    return {name: value(m) for name, m in runs.items()}

  return [
    page.Finding(
      "Failed frames at the end",
      "Last third of the video: broken, or its objects are lost or doubled.",
      values(lambda m: f"{100 * m['failed'][2]:.0f} %"),
    ),
    page.Finding(
      "Quality lost on the way",
      "Drift: quality of the first fifth less that of the whole. 0 is none.",
      values(lambda m: f"{m['delta_db']:.1f} dB"),
    ),
    page.Finding(
      "Background error at the end",
      "Last third: RGB distance from the true colour.",
      values(lambda m: f"{m['background_error'][2]:.3f}"),
    ),
    page.Finding(
      "Agreement at the start",
      "PSNR of the first frame made; more is better. What resists drift may "
      "cost something here.",
      values(lambda m: f"{m['psnr_at']['1']:.1f} dB"),
    ),
  ]


def _table(runs: Mapping[str, Summary]) -> page.Table:
  def best(values: Mapping[str, float], better: str) -> str | None:
    if not better or len(values) < 2 or len(set(values.values())) == 1:
      return None
    pick = min if better == "lower" else max
    return pick(values, key=lambda name: values[name])

  def texts(m: Summary, key: str, show: Callable[[float], str]) -> list[str]:
    """Prints a number or thirds, the range over seeds below where known."""
    as_list = lambda x: x if isinstance(x, list) else [x]
    printed = [show(v) for v in as_list(m[key])]
    if m["seeds"] == 1 or "range" not in m:
      return printed
    spans = m["range"][key] if isinstance(m[key], list) else [m["range"][key]]
    notes = (f"{show(low)} to {show(high)}" for low, high in spans)
    return [f"{p}\n{note}" for p, note in zip(printed, notes, strict=True)]

  signed = lambda v: f"{v:+.2f}"
  drift = {name: m["delta_db"] for name, m in runs.items()}
  cells = {name: texts(m, "delta_db", signed) for name, m in runs.items()}
  rows = [("drift (dB)", "lower", cells, best(drift, "lower"))]
  for row in _rows(runs):
    show = functools.partial(format_value, row=row)
    cells = {name: texts(m, row.key, show) for name, m in runs.items()}
    late = {name: m[row.key][2] for name, m in runs.items()}
    label = row.label + " (%)" * row.percent
    rows.append((label, row.better, cells, best(late, row.better)))
  for n in HORIZONS:
    at = {name: m["psnr_at"][str(n)] for name, m in runs.items()}
    cells = {name: [_decibel(v)] for name, v in at.items()}
    known = {name: v for name, v in at.items() if v is not None}
    label = f"PSNR, frame {n} (dB)"
    rows.append((label, "higher", cells, best(known, "higher")))
  return page.Table(("early", "middle", "late"), rows)


def comparison(
  videos: Mapping[str, np.ndarray], *, given: int, rows: int = 4
) -> np.ndarray:
  """Lays out videos, a column each: uint8 [f height width 3]."""
  first = next(iter(videos.values()))
  scale = max(1, round(_PANEL / max(first.shape[2:4])))
  # What is not a number has no colour; black is not mistaken for content.
  columns = [
    np.nan_to_num(v[:rows], nan=-1.0, posinf=1.0, neginf=-1.0)
    for v in videos.values()
  ]
  labels = [name.replace("_", " ") for name in videos]
  return video_io.side_by_side(columns, labels, scale=scale, given=given)
