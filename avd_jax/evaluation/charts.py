"""Line charts of drift: a metric over the frames, a line a method.

Colours are Okabe and Ito's, told apart by every kind of colour vision; lines
carry their names, so that none has to be looked up in a legend.
"""

import dataclasses
import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from avd_jax.evaluation.drift import Curve

# Lines end in their names: room for them, as a share of the frames.
_NAME_ROOM = 0.4


@dataclasses.dataclass(frozen=True)
class Panel:
  """One chart.

  Attributes:
    metric: a key of `drift.curves`.
    title: what it shows.
    unit: of the y axis.
    reading: how to read it, a sentence or two.
    floor: True where 0 is the lower end of the axis.
    percent: True for a share, shown in percent.
  """

  metric: str
  title: str
  unit: str
  reading: str
  floor: bool = True
  percent: bool = False


PANELS = (
  Panel(
    "failed",
    "Failed frames",
    "% of videos",
    "Share of videos that have failed: a ball is gone or doubled, or the "
    "picture is nothing this world could show. Lower is better.",
    percent=True,
  ),
  Panel(
    "manifold_psnr",
    "Picture quality",
    "dB",
    "Distance to the nearest picture the world could show, wherever its "
    "balls are. A line that falls is drift. Higher is better.",
    floor=False,
  ),
  Panel(
    "background_error",
    "Background colour error",
    "RGB distance",
    "How far the background has wandered from its colour, which never changes "
    "in the truth. Lower is better.",
  ),
  Panel(
    "psnr",
    "Agreement with the truth",
    "dB",
    "PSNR against what really happened. It counts in the first few frames "
    "only: later a ball may be right and yet elsewhere. Higher is better.",
    floor=False,
  ),
)


@dataclasses.dataclass(frozen=True)
class Theme:
  """Colours of paper, ink, faint ink, and of lines in the methods' order."""

  paper: str
  ink: str
  faint: str
  lines: tuple[str, ...]


LIGHT = Theme(
  "#ffffff",
  "#1f2328",
  "#d0d5db",
  ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#8a6d00"),
)
DARK = Theme(
  "#16191f",
  "#e6e9ee",
  "#3b424d",
  ("#f0a050", "#56b4e9", "#33c49a", "#dd9fc2", "#f0e442"),
)

Curves = Mapping[str, Mapping[str, Curve]]


def draw(
  curves: Curves,
  panels: Sequence[Panel],
  *,
  given: int,
  train_frames: int,
  theme: Theme = LIGHT,
  titles: bool = True,
) -> bytes:
  """Draws panels in two columns (one for a single panel); gives a PNG.

  Args:
    curves: method -> metric -> curve over all frames, the given ones first.
    panels: what to draw.
    given: frames at the start that were not generated.
    train_frames: length of the videos in training.
    theme: colours.
    titles: writes each panel's title above it.
  """
  columns = min(2, len(panels))
  rows = -(-len(panels) // columns)
  style = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": theme.ink,
    "axes.labelcolor": theme.ink,
    "xtick.color": theme.ink,
    "ytick.color": theme.ink,
    "axes.edgecolor": theme.faint,
  }
  with matplotlib.rc_context(style):
    figure = Figure(
      figsize=(4.9 * columns, 3.0 * rows),
      facecolor=theme.paper,
      layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
      _draw_panel(axes, panel, curves, given, train_frames, theme)
      if titles:
        axes.set_title(
          panel.title, loc="left", fontsize=12, weight="bold", pad=18
        )
    for axes in grid[len(panels) :]:
      axes.set_axis_off()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, facecolor=theme.paper)
  return file.getvalue()


def _draw_panel(
  axes: Axes,
  panel: Panel,
  curves: Curves,
  given: int,
  train_frames: int,
  theme: Theme,
):
  axes.set_facecolor(theme.paper)
  scale = 100 if panel.percent else 1
  ends, frames = [], 0
  for i, (name, metrics) in enumerate(curves.items()):
    curve, colour = metrics[panel.metric], theme.lines[i % len(theme.lines)]
    frames = len(curve.mean)
    # Given frames are the truth itself: their PSNR has no bound to draw.
    x = np.arange(given, frames) + 1
    mean, low, high = (
      scale * np.asarray(y)[given:] for y in (curve.mean, curve.low, curve.high)
    )
    if panel.floor:
      low = np.maximum(low, 0)
    if panel.percent:
      high = np.minimum(high, 100)
    axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(x, mean, color=colour, linewidth=2)
    # The last frame alone may be off the line that the eye follows.
    ends.append((float(mean[-3:].mean()), name.replace("_", " "), colour))
  if panel.percent:
    axes.set_ylim(-2, 102)
  elif panel.floor:
    axes.set_ylim(bottom=0)
  axes.set_xlim(0.5, frames * (1 + _NAME_ROOM))
  _name_lines(axes, frames, ends)
  _mark_frames(axes, given, train_frames, frames, theme)
  axes.set_xlabel("frame", x=0.5 / (1 + _NAME_ROOM), ha="center")
  axes.set_ylabel(panel.unit)
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines["bottom"].set_bounds(0.5, frames)
  low, high = axes.get_ylim()
  levels = [y for y in axes.get_yticks() if low <= y <= high]
  axes.set_yticks(levels)
  axes.hlines(levels, 0.5, frames, theme.faint, linewidth=0.6, zorder=0)
  axes.tick_params(length=0)
  axes.set_xticks([t for t in axes.get_xticks() if 0 < t <= frames])


def _name_lines(axes: Axes, frames: int, ends: list[tuple[float, str, str]]):
  """Writes names at the ends of lines, moved apart where they would meet."""
  low, high = axes.get_ylim()
  apart = 0.085 * (high - low)
  ends = sorted(ends)
  heights = np.array([height for height, *_ in ends])
  steps = apart * np.arange(len(ends))
  # Up from the lowest, then down again from the top of the axes.
  heights = np.maximum.accumulate(np.maximum(heights, low) - steps) + steps
  heights = np.minimum(heights, high - steps[::-1])
  for height, (_, name, colour) in zip(heights, ends, strict=True):
    axes.text(
      frames * 1.015,
      height,
      name,
      color=colour,
      va="center",
      fontsize=9.5,
      weight="bold",
    )


def _mark_frames(
  axes: Axes, given: int, train_frames: int, frames: int, theme: Theme
):
  if given:
    axes.axvspan(0.5, given + 0.5, color=theme.faint, alpha=0.35, linewidth=0)
  trained = given < train_frames < frames
  if trained:
    axes.axvline(
      train_frames + 0.5, color=theme.ink, linewidth=1, linestyle=(0, (2, 3))
    )
  # The two words need room beside each other; then the grey speaks for itself.
  short = trained and train_frames < 0.15 * frames
  # Above the plot, so that no line runs through the words.
  for x, text, wanted in (
    (0.5, "given", given > 0 and not short),
    (train_frames + 0.5, "trained up to here", trained),
  ):
    if wanted:
      axes.annotate(
        text,
        (x, 1),
        xycoords=("data", "axes fraction"),
        xytext=(1, 2),
        textcoords="offset points",
        fontsize=9,
        alpha=0.8,
      )


def plain(ax: Axes, title: str, theme: Theme) -> None:
  """Axes with a title and a faint grid, and no frame."""
  ax.set_facecolor(theme.paper)
  ax.set_title(title, color=theme.ink, fontsize=9, loc="left")
  ax.grid(color=theme.faint, lw=0.5)
  ax.set_axisbelow(True)
  ax.tick_params(which="both", colors=theme.ink, labelsize=8)
  ax.spines[["top", "right"]].set_visible(False)


def legend_below(ax: Axes, down: float, columns: int, theme: Theme) -> None:
  """A legend under the axes, `down` of their height: bars may be long
  anywhere."""
  ax.legend(
    loc="upper center",
    bbox_to_anchor=(0.5, -down),
    ncols=columns,
    fontsize=8,
    frameon=False,
    labelcolor=theme.ink,
  )
