"""Which chunks of history are chosen, drawn and in a table.

Both read the numbers as they are written to routing.json, of the solver's
passes; the clean passes are in the file alone.
"""

import io
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from avd_jax.evaluation.charts import LIGHT, Theme

_SHOWN = "solver"
_PARTS = ("own", "chosen", "dropped")
# More rows than this, and only layers are named beside a heat map.
_NAMED = 16


def _entry(numbers: Mapping, descriptor: str, top_k: int) -> Mapping[str, Any]:
  wanted = (descriptor, top_k, _SHOWN)
  for entry in numbers["choices"]:
    if (entry["descriptor"], entry["top_k"], entry["pass"]) == wanted:
      return entry
  raise KeyError(wanted)


def draw(numbers: Mapping, theme: Theme = LIGHT) -> bytes:
  """A column for each top_k; gives a PNG.

  From the top: how often the last chunk's queries choose each chunk of
  history; the same for each layer and head, and for each chunk that was made,
  a map a descriptor; the frequency over the distance, of all made chunks; the
  shares of dense attention.

  Args:
    numbers: `routing.json`.
    theme: colours.
  """
  top_k, names = numbers["top_k"], numbers["descriptors"]
  style = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": theme.ink,
    "axes.labelcolor": theme.ink,
    "xtick.color": theme.ink,
    "ytick.color": theme.ink,
    "axes.edgecolor": theme.faint,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
  }
  heights = [2.3, *[2.5] * len(names), *[2.2] * len(names), 2.3]
  bars = 0.6 + 0.3 * len(top_k) * len(names)
  with matplotlib.rc_context(style):
    figure = Figure(
      figsize=(0.8 + 3.9 * max(len(top_k), 2), sum(heights) + bars + 1.2),
      facecolor=theme.paper,
      layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.1)
    above, below = figure.subfigures(2, 1, height_ratios=[sum(heights), bars])
    grid = above.subplots(
      len(heights), len(top_k), squeeze=False, height_ratios=heights
    )
    for column, k in enumerate(top_k):
      entries = [_entry(numbers, name, k) for name in names]
      axes = grid[:, column]
      _draw_history(axes[0], entries, theme)
      axes[0].set_title(f"each query chooses {k}", weight="bold")
      maps = [(_draw_heads, entry) for entry in entries]
      maps += [(_draw_chunks, entry) for entry in entries]
      for place, (draw_map, entry) in zip(axes[1:-1], maps, strict=True):
        image = draw_map(place, entry)
        if column == len(top_k) - 1:
          above.colorbar(image, ax=place, fraction=0.05, pad=0.02)
      _draw_distance(axes[-1], entries, theme)
    _draw_mass(below.subplots(), numbers, theme)
    figure.suptitle(_title(numbers), fontsize=11.5, x=0.01, ha="left")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, facecolor=theme.paper)
  return file.getvalue()


def _title(numbers) -> str:
  last = numbers["chunks"] - 1
  return (
    f"{numbers['run']}: chunks of history that queries choose\n"
    f"{numbers['videos']} videos of {last + 1} chunks, the first"
    f" {numbers['given']} given; attended: {numbers['attended']}"
  )


def _plain(axes: Axes, theme: Theme):
  axes.set_facecolor(theme.paper)
  axes.spines[["top", "right"]].set_visible(False)
  axes.grid(axis="y", color=theme.faint, linewidth=0.6)
  axes.set_axisbelow(True)
  axes.tick_params(length=0)


def _frequency_axis(axes: Axes):
  axes.set_ylim(0, 1.04)
  axes.set_ylabel("frequency")


def _draw_history(axes: Axes, entries, theme: Theme):
  """The last chunk's choices, over the chunk that is chosen."""
  _plain(axes, theme)
  seen = entries[0]["candidates"]
  places = np.arange(len(seen), dtype=float)
  # A gap between sinks and a window is no line.
  gaps = np.flatnonzero(np.diff(seen) > 1) + 1
  even = min(entries[0]["top_k"] / len(seen), 1)
  axes.axhline(even, color=theme.ink, linewidth=1, linestyle=(0, (2, 3)))
  for entry, colour in zip(entries, theme.lines, strict=False):
    axes.plot(
      np.insert(places, gaps, np.nan),
      np.insert(np.asarray(entry["frequency"]["mean"])[seen], gaps, np.nan),
      color=colour,
      marker="o",
      markersize=4,
      linewidth=1.6,
      label=entry["descriptor"],
    )
  axes.plot([], [], color=theme.ink, ls=(0, (2, 3)), lw=1, label="even choice")
  _frequency_axis(axes)
  axes.set_xlim(-0.5, len(seen) - 0.5)
  axes.set_xlabel(f"chunk of history of chunk {entries[0]['chunk']}")
  _name_chunks(axes, seen)
  axes.legend(frameon=False, fontsize=8.5, loc="best")


def _name_chunks(axes: Axes, seen):
  """Names of chunks under places 0, 1, ..., as many as there is room for."""
  step = -(-len(seen) // 10)
  axes.set_xticks(range(0, len(seen), step), seen[::step])


def _draw_heads(axes: Axes, entry):
  """One descriptor's choices, a row for each head of each layer."""
  seen = entry["candidates"]
  maps = np.asarray(entry["frequency"]["layer_head"])[..., seen]
  layers, heads, chunks = maps.shape
  image = _map(axes, maps.reshape(layers * heads, chunks))
  _name_chunks(axes, seen)
  for layer in range(1, layers):
    axes.axhline(layer * heads - 0.5, color="white", linewidth=1)
  axes.set_title(f"{entry['descriptor']}, layer by layer, head by head")
  if layers * heads <= _NAMED:
    rows = [f"{i}.{j}" for i in range(layers) for j in range(heads)]
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_ylabel("layer.head")
  else:
    step = -(-layers // _NAMED)
    named = range(0, layers, step)
    axes.set_yticks([(i + 0.5) * heads - 0.5 for i in named], named)
    axes.set_ylabel("layer")
  return image


def _map(axes: Axes, frequency: np.ndarray, **options):
  image = axes.imshow(
    frequency,
    aspect="auto",
    interpolation="nearest",
    cmap="viridis",
    vmin=0,
    vmax=1,
    **options,
  )
  axes.set_xlabel("chunk of history")
  axes.xaxis.get_major_locator().set_params(integer=True)
  axes.tick_params(length=0)
  return image


def _draw_chunks(axes: Axes, entry):
  """Every made chunk's choices: a sink is a column, recency a diagonal.

  Diagonals beside it are echoes: distances at which rotary angles are alike.
  """
  made = np.asarray(entry["by_chunk"], float)[:, :-1]
  first, chunks = entry["chunk"] + 1 - len(made), made.shape[1]
  edges = (-0.5, chunks - 0.5, entry["chunk"] + 0.5, first - 0.5)
  image = _map(axes, made, extent=edges)
  axes.set_title(f"{entry['descriptor']}, chunk by chunk")
  axes.set_ylabel("chosen by chunk")
  axes.yaxis.get_major_locator().set_params(integer=True)
  return image


def _draw_distance(axes: Axes, entries, theme: Theme):
  """Every made chunk's choices over the distance; chunk 0 on its own."""
  _plain(axes, theme)
  far = max([*entries[0]["by_distance"]["distance"], 1])
  sink = far + 2  # where chunk 0 stands, whatever its distance
  for entry, colour in zip(entries, theme.lines, strict=False):
    past = entry["by_distance"]
    if past["distance"]:
      axes.plot(
        past["distance"],
        past["frequency"]["mean"],
        color=colour,
        marker="o",
        markersize=4,
        linewidth=1.6,
      )
    if past["first_chunk"]:
      axes.plot(
        sink,
        past["first_chunk"]["mean"],
        "*",
        color=colour,
        markersize=12,
        clip_on=False,
      )
  past, dotted = entries[0]["by_distance"], (0, (2, 3))
  axes.plot(past["distance"], past["even"], color=theme.ink, lw=1, ls=dotted)
  ticks = [t for t in axes.get_xticks() if 1 <= t <= far and t == int(t)]
  ticks = sorted({1, *(int(t) for t in ticks)})
  labels = [str(t) for t in ticks]
  if past["first_chunk"]:
    even = past["first_chunk"]["even"]
    axes.plot([sink - 0.5, sink + 0.5], [even] * 2, color=theme.ink, lw=1)
    ticks, labels = [*ticks, sink], [*labels, "chunk 0\n(sink)"]
  axes.set_xticks(ticks, labels)
  axes.set_xlim(0.3, sink + 1)
  _frequency_axis(axes)
  first, last = past["chunks"][0], past["chunks"][-1]
  axes.set_xlabel("chunks back (1: just before)", loc="left")
  axes.set_title(f"over the distance, chunks {first} to {last}")


def _draw_mass(axes: Axes, numbers, theme: Theme):
  """Shares of the last chunk's dense attention, a bar a measurement."""
  _plain(axes, theme)
  axes.grid(visible=False)
  colours = (theme.faint, theme.lines[2], "#f3d9c9")
  labels, marks = [], {"recent": "|", "best": "d"}
  for k in numbers["top_k"]:
    for name in numbers["descriptors"]:
      shares = _entry(numbers, name, k)["mass"]
      y, left = len(labels), 0.0
      for part, colour in zip(_PARTS, colours, strict=True):
        share = shares[part]["mean"]
        label = f"{part} chunk{'s' * (part != 'own')}" if not y else None
        axes.barh(y, share, 0.72, left, color=colour, label=label)
        if share > 0.04:
          # At the left, away from the marks near the chosen part's end.
          at = (0.99, "right") if part == "dropped" else (left + 0.01, "left")
          axes.text(at[0], y, f"{share:.0%}", ha=at[1], va="center")
        left += share
      for mark, symbol in marks.items():
        axes.plot(
          shares["own"]["mean"] + shares[mark]["mean"],
          y,
          symbol,
          color=theme.ink,
          markersize=11 if symbol == "|" else 5,
          markeredgewidth=2 if symbol == "|" else 1,
          linestyle="none",
          label=f"own + {mark} k" if not y else None,
        )
      labels.append(f"{name} {k}")
  axes.set_yticks(range(len(labels)), labels)
  axes.invert_yaxis()
  axes.set_xlim(0, 1)
  axes.set_xticks([])
  axes.spines[["bottom", "left"]].set_visible(False)
  axes.set_title(
    "Share of dense attention of the last chunk's queries, had they seen all:"
    " what a choice of k keeps"
  )
  axes.legend(
    frameon=False, ncols=5, fontsize=9, loc="upper center",
    bbox_to_anchor=(0.5, 0.0),
  )  # fmt: skip


def format_table(numbers: Mapping) -> str:
  """The last chunk's choices and shares, a line a measurement.

  `sink` is how much more often the first chunk is chosen than other chunks at
  the same distances, over all made chunks.
  """
  heads = (
    "even", "first", "before", "sink", "own", "chosen", "dropped", "recent",
    "best",
  )  # fmt: skip
  lines = [
    f"{'':<14} {'chosen, % of queries':>20} {'':>7} dense attention, %",
    f"{'':<14} " + " ".join(f"{head:>7}" for head in heads),
  ]
  for k in numbers["top_k"]:
    for name in numbers["descriptors"]:
      entry = _entry(numbers, name, k)
      seen, mean = entry["candidates"], entry["frequency"]["mean"]
      chosen = (min(k / len(seen), 1), mean[seen[0]], mean[seen[-1]])
      shares = [entry["mass"][part]["mean"] for part in heads[4:]]
      first = entry["by_distance"]["first_chunk"] or {}
      ratio = first.get("against_peers")
      sink = "-" if ratio is None else f"x{ratio:.2f}"
      cells = [f"{100 * value:7.1f}" for value in (*chosen, *shares)]
      cells.insert(3, f"{sink:>7}")
      lines.append(f"{name} top-{k}".ljust(15) + " ".join(cells))
  return "\n".join(lines)
