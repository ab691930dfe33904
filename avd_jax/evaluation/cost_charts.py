"""Charts of costs: of a long video, chunk by chunk; of a step, by devices."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

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
    ax.set_facecolor(theme.paper)
    top = 1.05 * max(max(c[field]) for c in curves.values())
    ends = _apart({n: c[field][-1] for n, c in curves.items()}, top / 14)
    for (name, curve), color in zip(curves.items(), theme.lines, strict=False):
      ax.plot(curve["chunk"], curve[field], color=color, lw=1.6)
      ax.annotate(
        name,
        (curve["chunk"][-1], ends[name]),
        (4, 0),
        textcoords="offset points",
        color=color,
        va="center",
        fontsize=8,
      )
    ax.set_ylim(0, max(top, *ends.values()))
    ax.set_xlim(0, 1.45 * max(max(c["chunk"]) for c in curves.values()))
    ax.set_xlabel("chunk of the video", color=theme.ink)
    ax.set_title(label, color=theme.ink, fontsize=10, loc="left")
    ax.grid(color=theme.faint, lw=0.5)
    ax.tick_params(colors=theme.ink, labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
  figure.suptitle(title, color=theme.ink, fontsize=10, x=0.02, ha="left")
  figure.tight_layout()
  figure.savefig(path)


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


def _apart(heights: Mapping[str, float], gap: float) -> dict[str, float]:
  """Heights for names, in order, none nearer to another than `gap`."""
  placed: dict[str, float] = {}
  for name in sorted(heights, key=lambda n: heights[n]):
    least = max(placed.values(), default=-gap) + gap
    placed[name] = max(heights[name], least)
  return placed
