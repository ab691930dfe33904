"""Charts of what studies look at besides drift: errors of histories, costs."""

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from avd_jax.evaluation import charts, study_chart
from avd_jax.evaluation.charts import LIGHT, Theme


def errors(
  rms: Mapping[str, Sequence[float]],
  direction: Mapping[str, Sequence[float]],
  chance: Sequence[float],
  bands: Mapping[str, Sequence[float]],
  names: Sequence[str],
  loss: Mapping[str, Mapping[str, float]],
  *,
  real: str,
  title: str,
  theme: Theme = LIGHT,
) -> bytes:
  """The errors of each way to degrade a history; gives a PNG.

  Args:
    rms: way -> size of its error, chunk by chunk.
    direction: way -> cosine with the real error, chunk by chunk.
    chance: the same between errors of different videos.
    bands: way -> shares of energy in the bands called `names`.
    names: of the bands.
    loss: model -> history -> flow loss.
    real: way that makes the real error, in ink.
    title: of whose errors.
    theme: colours.
  """
  figure = Figure(
    figsize=(11, 7.6), dpi=150, facecolor=theme.paper, layout="constrained"
  )
  grid = figure.subplots(2, 2).ravel()
  others = [way for way in rms if way != real]
  colours = dict(zip(others, itertools.cycle(theme.lines), strict=False)) | {
    real: theme.ink
  }
  charts.plain(grid[0], "Size of the error (RMS), by chunk made", theme)
  _lines(grid[0], rms, colours)
  grid[0].set_yscale("log")
  charts.plain(grid[1], "Cosine with the rollout's error, by chunk made", theme)
  _lines(grid[1], {way: direction[way] for way in others}, colours)
  _lines(grid[1], {"by chance": chance}, {"by chance": theme.ink}, "--")
  charts.plain(grid[2], "Share of the error's energy, by cycles a frame", theme)
  width = 0.8 / max(1, len(bands))
  for i, (way, shares) in enumerate(bands.items()):
    x = np.arange(len(names)) + (i - len(bands) / 2 + 0.5) * width
    grid[2].bar(x, shares, width, color=colours[way])
  grid[2].set_xticks(range(len(names)), names)
  _heat(grid[3], loss, theme)
  figure.suptitle(title, color=theme.ink, fontsize=11, x=0.01, ha="left")
  lines = [*grid[0].get_lines(), grid[1].get_lines()[-1]]
  figure.legend(
    handles=lines,
    loc="outside lower center",
    ncols=min(7, len(lines)),
    fontsize=8,
    frameon=False,
    labelcolor=theme.ink,
  )
  return _png(figure)


def _lines(
  ax: Axes,
  curves: Mapping[str, Sequence[float]],
  colours: Mapping[str, str],
  style: str = "-",
) -> None:
  for name, curve in curves.items():
    x = np.arange(1, len(curve) + 1)
    ax.plot(x, curve, style, color=colours[name], label=name, lw=1.6)
  ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _heat(ax: Axes, loss: Mapping[str, Mapping[str, float]], theme: Theme):
  """Every model against every history: loss over that on the truth's."""
  models, kinds = list(loss), list(next(iter(loss.values())))
  table = np.array([[loss[m][k] for k in kinds] for m in models])
  charts.plain(ax, "Flow loss of a model (row) under its own history", theme)
  ax.grid(False)
  ax.imshow(np.log(table), cmap="Blues", aspect="auto")
  ax.set_xticks(range(len(kinds)), kinds, rotation=20, ha="right")
  ax.set_yticks(range(len(models)), models)
  middle = (np.log(table).max() + np.log(table).min()) / 2
  for (i, j), value in np.ndenumerate(table):
    dark = np.log(value) > middle
    ax.text(
      j, i, f"{value:.3f}", ha="center", va="center", fontsize=7,
      color="white" if dark else "black",
    )  # fmt: skip


def step_parts(
  parts: Mapping[str, Mapping[str, float]],
  quality: Mapping[str, float],
  words: str,
  theme: Theme = LIGHT,
) -> bytes:
  """What steps are made of, and what they buy; gives a PNG.

  Args:
    parts: strategy -> "step" and "history", over the baseline's step.
    quality: strategy -> what was gained (lower is better).
    words: of that axis.
    theme: colours.
  """
  figure = Figure(
    figsize=(11, 0.9 + max(3.6, 0.36 * len(parts))),
    dpi=150,
    facecolor=theme.paper,
    layout="constrained",
  )
  left, right = figure.subplots(1, 2)
  names = list(parts)
  place = np.arange(len(names))[::-1]
  history = np.array([parts[n]["history"] for n in names])
  rest = np.array([parts[n]["step"] for n in names]) - history
  charts.plain(left, "A step's time, over the baseline's", theme)
  left.barh(
    place,
    rest,
    color=theme.lines[0],
    label="forward, backward and optimizer",
  )
  left.barh(
    place, history, left=rest, color=theme.lines[1], label="making the history"
  )
  left.set_yticks(place, [f"{n}  {i + 1}" for i, n in enumerate(names)])
  left.axvline(1.0, color=theme.ink, lw=0.8, ls=":")
  charts.legend_below(left, 0.06, 2, theme)
  charts.plain(right, words + ", against a step's time", theme)
  points = {
    i + 1: (parts[name]["step"], quality[name])
    for i, name in enumerate(names)
    if name in quality
  }
  colours = dict(zip(points, itertools.cycle(theme.lines), strict=False))
  for i, (x, y) in points.items():
    right.plot(x, y, "o", ms=6, color=colours[i], mec=theme.paper)
  right.margins(0.08)
  right.set_ylim(bottom=0)
  right.set_xlabel(
    "time of a step, over the baseline's", color=theme.ink, fontsize=8
  )
  figure.canvas.draw()  # limits are final: pixels mean something
  study_chart.number(right, points, colours, theme.faint)
  return _png(figure)


def _png(figure: Any) -> bytes:
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png")
  return buffer.getvalue()
