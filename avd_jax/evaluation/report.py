"""What a comparison of methods leaves behind: numbers, charts, film, a page."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from avd_jax.data import video as video_io
from avd_jax.errors import UserError
from avd_jax.evaluation import charts, page
from avd_jax.evaluation.drift import HORIZONS, Summary

# Panels of the film are enlarged to about this many pixels.
_PANEL = 132


class Row(NamedTuple):
  """A line of the table: key of a summary, words, and how to print it."""

  key: str
  label: str
  better: str
  percent: bool = False
  digits: int = 3


ROWS = (
  Row("failed", "failed frames", "lower", percent=True),
  Row("object_share", "objects intact", "higher", percent=True),
  Row("broken", "broken frames", "lower", percent=True),
  Row("off_manifold", "off-manifold MSE", "lower"),
  Row("background_error", "background error", "lower"),
  Row("hue_error", "hue error", "lower"),
  Row("flicker", "flicker", "", digits=4),
)


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
  for row in ROWS:
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
    videos: columns of the film by name, [b f h w 3] in [-1, 1]; the truth first.
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
      f"a report on {sorted(methods)} got curves of {sorted(curves)} and videos "
      f"of {sorted(videos)}; give all three for every method"
    )
  out = Path(out_dir)
  out.mkdir(parents=True, exist_ok=True)
  text = json.dumps(dict(runs), indent=2, allow_nan=False)
  (out / "drift.json").write_text(text + "\n", encoding="utf-8")

  curves = {name: curves[name] for name in runs}
  marks = {"given": given, "train_frames": train_frames}
  png = charts.draw(curves, charts.PANELS, **marks)
  (out / "drift.png").write_bytes(png)

  film = comparison(videos, given=given, rows=rows)
  mp4 = out / "comparison.mp4"
  video_io.write_video(mp4, film, fps)
  video_io.write_video(out / "comparison.gif", film, fps)

  html = page.render(
    runs=runs,
    curves=curves,
    film=mp4.read_bytes(),
    film_size=film.shape[1:3],
    columns=[name.replace("_", " ") for name in videos],
    config=config or {},
    timings=timings or {},
    command=command,
    **marks,
  )
  path = out / "report.html"
  path.write_text(html, encoding="utf-8")
  return path


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
