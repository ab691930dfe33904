"""Charts of costs: of a long video, chunk by chunk; of a chunk, by history and
by part; of a step, by devices."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from avd_jax.evaluation import charts
from avd_jax.evaluation.charts import LIGHT, Theme


def long_rollout(
  path: str | Path,
  curves: Mapping[str, Mapping[str, Sequence[float]]],
  title: str,
  theme: Theme = LIGHT,
) -> None:
  """Time of a chunk and memory held, over the chunks of a long video.

  Args:
    path: PNG to write.
    curves: name -> "chunk", "ms" and "memory_mb", equally long.
    title: what ran where.
    theme: colours.
  """
  figure = Figure(figsize=(9, 3.6), dpi=150, facecolor=theme.paper)
  axes = figure.subplots(1, 2)
  panels = (("ms", "Time of a chunk (ms)"), ("memory_mb", "Memory held (MB)"))
  for ax, (field, label) in zip(axes, panels, strict=True):
    lines = {name: (c["chunk"], c[field]) for name, c in curves.items()}
    _lines(ax, lines, "chunk of the video", label, theme)
  figure.suptitle(title, color=theme.ink, fontsize=10, x=0.02, ha="left")
  figure.tight_layout()
  figure.savefig(path)


def sampling(
  path: str | Path,
  rows: Sequence[Mapping[str, Any]],
  title: str,
  theme: Theme = LIGHT,
) -> None:
  """Time of a chunk and time to the first, over history; and whose it is.

  Args:
    path: PNG to write.
    rows: "attention", "history", "chunk_ms", "first_ms"; where the text encoder
      and the VAE take part "chunk_shares" and "first_shares", of which those of
      the longest history are drawn. See studies.sample_cost.
    title: what ran where.
    theme: colours.
  """
  longest = max(row["history"] for row in rows)
  shared = [
    row for row in rows if row["history"] == longest and "chunk_shares" in row
  ]
  figure = Figure(
    figsize=(13.5 if shared else 9, 3.6), dpi=150, facecolor=theme.paper
  )
  axes = figure.subplots(1, 3 if shared else 2)
  panels = (
    ("chunk_ms", "Time of a chunk (ms)"),
    ("first_ms", "Time from given chunks to the first made (ms)"),
  )
  for ax, (field, label) in zip(axes, panels, strict=False):
    lines: dict[str, tuple[list, list]] = {}
    for row in rows:
      x, y = lines.setdefault(row["attention"], ([], []))
      x.append(row["history"])
      y.append(row[field])
    _lines(ax, lines, "chunks of history", label, theme, marker="o", ms=4)
  if shared:
    _shares(axes[2], shared, longest, theme)
  figure.suptitle(title, color=theme.ink, fontsize=10, x=0.02, ha="left")
  figure.tight_layout()
  figure.savefig(path)


def _shares(
  ax: Axes, rows: Sequence[Mapping[str, Any]], history: int, theme: Theme
) -> None:
  """A bar a row for the first chunk, and one for a chunk of a long video."""
  bars = {
    f"{row['attention']}, {name}": row[f"{what}_shares"]
    for what, name in (("first", "first"), ("chunk", "later"))
    for row in rows
  }
  parts = (
    ("text", "text encoder", theme.lines[3]),
    ("vae", "VAE", theme.lines[4]),
    ("dit", "transformer", theme.faint),
  )
  left = [0.0] * len(bars)
  for part, name, color in parts:
    wide = [100 * bar[part] for bar in bars.values()]
    ax.barh(list(bars), wide, 0.7, left, color=color, label=name)
    left = [a + b for a, b in zip(left, wide, strict=True)]
  ax.invert_yaxis()
  ax.set_xlim(0, 100)
  charts.plain(ax, f"First and later chunk, {history} of history (%)", theme)
  charts.legend_below(ax, 0.1, 3, theme)


def weak_scaling(
  path: str | Path,
  curves: Mapping[str, Sequence[Any]],
  theme: Theme = LIGHT,
) -> None:
  """The share of a step that is computing, over devices, as bands.

  Args:
    path: PNG to write.
    curves: name -> points with `devices`, `hidden`, `in_line` and `fits`; see
      aot.scaling.
    theme: colours.
  """
  figure = Figure(
    figsize=(8, 4.2), dpi=150, facecolor=theme.paper, layout="constrained"
  )
  ax = figure.subplots()
  ax.set_facecolor(theme.paper)
  for (name, points), color in zip(curves.items(), theme.lines, strict=False):
    x = [p.devices for p in points]
    high, low = (
      [100 * getattr(p, w) for p in points] for w in ("hidden", "in_line")
    )
    ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    ax.plot(x, high, color=color, lw=1.6, label=name)
    ax.plot(x, low, color=color, lw=1.2, ls="--")
    tight = [i for i, p in enumerate(points) if not p.fits]
    ax.plot(
      [x[i] for i in tight], [high[i] for i in tight], "x", color=color, ms=7
    )
  ax.set_xscale("log", base=2)
  ticks = sorted({p.devices for points in curves.values() for p in points})
  ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
  ax.set_ylim(0, 105)
  ax.set_xlabel("devices; each keeps its share of the batch", color=theme.ink)
  ax.set_title(
    "Share of a step that is computing (%); solid: exchange hidden, dashed:"
    " in line, x: does not fit",
    color=theme.ink,
    fontsize=9,
    loc="left",
  )
  ax.grid(color=theme.faint, lw=0.5)
  ax.tick_params(colors=theme.ink, labelsize=8)
  ax.spines[["top", "right"]].set_visible(False)
  ax.legend(loc="lower left", fontsize=8, frameon=False, labelcolor=theme.ink)
  figure.savefig(path)


def _lines(
  ax: Axes,
  lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
  across: str,
  label: str,
  theme: Theme,
  **style: Any,
) -> None:
  """Lines (x, y) from 0 on that end in their names."""
  top = 1.05 * max(max(y) for _, y in lines.values())
  ends = _apart({name: y[-1] for name, (_, y) in lines.items()}, top / 14)
  for (name, (x, y)), color in zip(lines.items(), theme.lines, strict=False):
    ax.plot(x, y, color=color, lw=1.6, **style)
    ax.annotate(
      name,
      (x[-1], ends[name]),
      (6, 0),
      textcoords="offset points",
      color=color,
      va="center",
      fontsize=8,
    )
  ax.set_ylim(0, max(top, 1.04 * max(ends.values())))
  ax.set_xlim(0, 1.45 * max(max(x) for x, _ in lines.values()))
  ax.set_xlabel(across, color=theme.ink)
  charts.plain(ax, label, theme)


def _apart(heights: Mapping[str, float], gap: float) -> dict[str, float]:
  """Heights for names, in order, none nearer to another than `gap`."""
  placed: dict[str, float] = {}
  for name in sorted(heights, key=lambda n: heights[n]):
    least = max(placed.values(), default=-gap) + gap
    placed[name] = max(heights[name], least)
  return placed
