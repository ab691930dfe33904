"""Charts of a study: drift against content, and drift over the frames.

A study may have a dozen rows and more: points carry numbers that a list beside
them explains, and curves get a small panel each, with the baseline in grey.
"""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from avd_jax.evaluation.charts import LIGHT, Theme

# Numbers beside points: how far apart, how far from their own, in pixels.
_APART, _OFF = 22.0, 20.0


def frontier(
  points: Mapping[str, Mapping[str, Sequence[float]]],
  axes: Mapping[str, str],
  content: str,
  *,
  against: Mapping[str, str],
  theme: Theme = LIGHT,
) -> bytes:
  """Drift to the right, content upward, a point a row; gives a PNG.

  Args:
    points: row -> "content" and every name in `axes` -> a value a seed.
    axes: what is drawn to the right, a panel each, and its words.
    content: words of the upward axis.
    against: the row that each row is compared with; these are marked.
    theme: colours.
  """
  marked = set(against.values())
  figure = Figure(
    figsize=(4.4 * len(axes) + 3.2, 4.4), facecolor=theme.paper, dpi=150
  )
  grid = figure.subplots(1, max(1, len(axes)), squeeze=False, sharey=True)[0]
  figure.subplots_adjust(
    left=0.7 / figure.get_figwidth(),
    right=1 - 3.1 / figure.get_figwidth(),
    bottom=0.14,
    top=0.9,
    wspace=0.08,
  )
  for ax, (name, label) in zip(grid, axes.items(), strict=False):
    _plain(ax, theme)
    ax.set_xlabel(label, color=theme.ink, fontsize=9)
    for i, (row, values) in enumerate(points.items()):
      _point(ax, values[name], values["content"], row in marked, i, theme)
    ax.set_xlim(left=min(0, ax.get_xlim()[0]))
  grid[0].set_ylabel(content, color=theme.ink, fontsize=9)
  grid[0].set_title(
    "better: up and to the left", color=theme.ink, fontsize=9, loc="left"
  )
  figure.canvas.draw()  # limits are final: pixels mean something
  for ax, name in zip(grid, axes, strict=False):
    means = {
      i + 1: (np.mean(p[name]), np.mean(p["content"]))
      for i, p in enumerate(points.values())
    }
    colours = {i + 1: _colour(i, theme) for i in range(len(points))}
    number(ax, means, colours, theme.faint)
  words = [
    f"{i + 1}  {row}{'  (baseline)' * (row in marked)}"
    for i, row in enumerate(points)
  ]
  # Bold letters are about .62 of their size wide.
  longest = max((len(line) for line in words), default=1)
  size = min(
    9.0, 4.0 * 72 / 1.5 / max(1, len(words)), 2.9 * 72 / (0.62 * longest)
  )
  for i, line in enumerate(words):
    figure.text(
      1 - 2.95 / figure.get_figwidth(),
      0.88 - i * 1.5 * size / 72 / figure.get_figheight(),
      line,
      color=_colour(i, theme),
      fontsize=size,
      weight="bold",
      va="center",
    )
  return _png(figure, theme)


def curves(
  rows: Mapping[str, Mapping[str, np.ndarray]],
  titles: Mapping[str, str],
  *,
  against: Mapping[str, str],
  given: int,
  train_frames: int,
  theme: Theme = LIGHT,
) -> bytes:
  """Metrics over the frames, a small panel a row and metric; gives a PNG.

  Args:
    rows: row -> metric -> [seeds f]; the band is the range over seeds.
    titles: metrics to draw, and their words.
    against: the row that each row is compared with: grey, behind it.
    given: frames at the start that were not generated.
    train_frames: length of the videos in training.
    theme: colours.
  """
  columns = min(4, len(rows))
  deep = math.ceil(len(rows) / columns)
  height = max(1, len(titles)) * (0.45 + 1.5 * deep)
  figure = Figure(
    figsize=(max(4.0, 2.5 * columns), height),
    facecolor=theme.paper,
    dpi=150,
    layout="constrained",
  )
  behind = sorted({against[row] for row in rows} & set(rows))
  note = ""
  if behind:
    grey = behind[0] if len(behind) == 1 else "the row each is compared with"
    note = f" over the frames; grey: {grey}"
  if given < train_frames:
    note += "; dotted: length in training"
  blocks = np.ravel(figure.subfigures(max(1, len(titles)), 1, squeeze=False))
  for block, (metric, title) in zip(blocks, titles.items(), strict=False):
    block.suptitle(
      f"{title[:1].upper()}{title[1:]}{note}",
      color=theme.ink,
      fontsize=10,
      x=0.01,
      ha="left",
    )
    grid = block.subplots(
      deep, columns, squeeze=False, sharex=True, sharey=True
    )
    for ax in grid.ravel()[len(rows) :]:
      ax.set_axis_off()
    for ax in grid.ravel()[len(rows) - columns : len(rows)]:
      ax.tick_params(labelbottom=True)  # nothing is drawn below
    for i, (row, values) in enumerate(rows.items()):
      ax = grid.ravel()[i]
      _plain(ax, theme)
      ax.set_title(
        f"{i + 1}  {row}", color=_colour(i, theme), fontsize=8, loc="left"
      )
      if against[row] in rows and row not in behind:
        _line(ax, rows[against[row]][metric], given, "#8a9099", 0.15)
      _line(ax, values[metric], given, _colour(i, theme), 0.25)
      if given < train_frames:
        ax.axvline(train_frames + 0.5, color=theme.ink, lw=0.7, ls=(0, (2, 3)))
    grid[0, 0].set_ylim(bottom=0)  # shared by all, with all lines drawn
  return _png(figure, theme)


def _colour(index: int, theme: Theme) -> str:
  return theme.lines[index % len(theme.lines)]


def _plain(ax: Axes, theme: Theme) -> None:
  ax.set_facecolor(theme.paper)
  ax.grid(color=theme.faint, lw=0.5)
  ax.set_axisbelow(True)
  ax.tick_params(colors=theme.ink, labelsize=7, length=0)
  ax.spines[["top", "right"]].set_visible(False)
  ax.spines[["bottom", "left"]].set_color(theme.faint)


def _line(
  ax: Axes, seeds: np.ndarray, given: int, colour: str, alpha: float
) -> None:
  seeds = seeds[:, given:]
  x = np.arange(given, given + seeds.shape[1]) + 1
  low, high = seeds.min(0), seeds.max(0)
  ax.fill_between(x, low, high, color=colour, alpha=alpha, linewidth=0)
  ax.plot(x, seeds.mean(0), color=colour, lw=1.3)


def _point(
  ax: Axes,
  x: Sequence[float],
  y: Sequence[float],
  is_baseline: bool,
  index: int,
  theme: Theme,
) -> None:
  """The mean over seeds, with bars from the lowest to the highest."""
  mean_x, mean_y, colour = np.mean(x), np.mean(y), _colour(index, theme)
  ax.plot([min(x), max(x)], [mean_y] * 2, color=colour, lw=1, alpha=0.6)
  ax.plot([mean_x] * 2, [min(y), max(y)], color=colour, lw=1, alpha=0.6)
  marker, size = ("D", 8) if is_baseline else ("o", 6)
  edge = theme.ink if is_baseline else theme.paper
  ax.plot(mean_x, mean_y, marker, ms=size, color=colour, mec=edge, zorder=3)


def number(
  ax: Axes,
  points: Mapping[int, tuple[float, float]],
  colours: Mapping[int, str],
  faint: str,
) -> None:
  """Writes each point's number beside it, and a line between the two.

  Args:
    ax: drawn, so that its limits are final.
    points: number -> x and y.
    colours: of the numbers.
    faint: colour of the lines.
  """
  if not points:
    return
  at = ax.transData.transform(list(points.values()))
  places = apart(at, ax.bbox.extents.tolist())
  for i, place, point in zip(points, places, at, strict=True):
    ax.annotate(
      str(i),
      points[i],
      place - point,
      textcoords="offset pixels",
      color=colours[i],
      fontsize=8,
      weight="bold",
      ha="center",
      va="center",
      arrowprops={"arrowstyle": "-", "color": faint, "lw": 0.6},
      zorder=4,
    )


def apart(points: np.ndarray, box: Sequence[float]) -> np.ndarray:
  """Places for labels: near their points, off all points and each other.

  Args:
    points: [n 2], in pixels.
    box: left, bottom, right and top that labels stay within.

  Returns:
    [n 2], in pixels.
  """
  turn = 2.4 * np.arange(len(points))  # no two labels start in one place
  places = points + _OFF * np.stack([np.cos(turn), np.sin(turn)], -1)
  low, high = np.array(box[:2]) + 8, np.array(box[2:]) - 8
  for _ in range(300):
    others = np.concatenate([places, points])
    away = places[:, None] - others[None]
    distance = np.maximum(np.linalg.norm(away, axis=-1), 1e-3)
    push = np.maximum(_APART - distance, 0) / distance
    push[np.arange(len(points)), np.arange(len(points))] = 0
    pull = points - places
    far = np.maximum(np.linalg.norm(pull, axis=-1, keepdims=True) - _OFF, 0)
    places = places + 0.3 * (away * push[..., None]).sum(1)
    places = places + 0.02 * pull * (far > 0)
    places = np.clip(places, low, high)
  return places


def _png(figure: Figure, theme: Theme) -> bytes:
  file = io.BytesIO()
  figure.savefig(file, format="png", facecolor=theme.paper)
  return file.getvalue()
