"""The report as one HTML file: no script, no network, light and dark."""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import Any, NamedTuple

from avd_jax.evaluation import charts


class Finding(NamedTuple):
  """A number a method: title, what it says, and the printed values."""

  title: str
  reading: str
  values: Mapping[str, str]


class Table(NamedTuple):
  """Rows are (label, better, method -> texts, best method or None).

  A text's second line is its note. A row has a text a column or a single one.
  """

  columns: Sequence[str]
  rows: Sequence[tuple[str, str, Mapping[str, Sequence[str]], str | None]]


# How a method learns, for a reader who has not seen its name before.
_LEARNS = {
  "teacher_forcing": "learns from perfect history",
  "resampling_forcing": "learns from history with mistakes of its own",
  "parallel_resampling": "learns from history with mistakes that do not add up",
  "noise_augmentation": "learns from history with noise on it",
  "diffusion_forcing": "learns with every frame noisy at once",
  "bagger": "learns from its own rollouts, reversed",
}

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Does the video drift?</title>
<style>
:root { color-scheme: light dark; --paper: #f4f5f7; --card: #ffffff;
  --ink: #1f2328; --soft: #57606a; --line: #d8dce1; $light }
@media (prefers-color-scheme: dark) { :root { --paper: #0e1014;
  --card: #16191f; --ink: #e6e9ee; --soft: #9aa4b0; --line: #2c323b; $dark } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 17px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.1rem 4rem }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .6rem }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .5rem }
h3 { font-size: 1.02rem; margin: 0 0 .3rem }
p { margin: .4rem 0 .9rem; max-width: 46rem }
.soft, figcaption, .reading { color: var(--soft); font-size: .92rem }
.card { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 1rem 1.1rem; margin: 0 }
.row { display: grid; gap: .9rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)) }
.value { display: flex; justify-content: space-between; gap: 1rem;
  align-items: baseline; font-weight: 600 }
.value b { font-size: 1.45rem; font-variant-numeric: tabular-nums;
  white-space: nowrap }
.film { display: grid; justify-items: center; gap: .7rem }
video { display: block; width: ${width}px; max-width: 100%; height: auto;
  border-radius: 6px }
img { display: block; width: 100%; height: auto }
.scroll { overflow-x: auto; padding: .3rem 1.1rem }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .42rem .55rem; white-space: nowrap;
  border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left; white-space: normal;
  min-width: 9.5rem }
tr:last-child td { border-bottom: 0 }
td.whole { text-align: center }
td.best { font-weight: 700 }
td.first, th.first { padding-left: 1.6rem }
.note { color: var(--soft); font-size: .84em; font-weight: 400 }
details { margin-top: .9rem }
summary { cursor: pointer; font-weight: 600 }
pre { overflow-x: auto; font: .84rem/1.5 ui-monospace, Menlo, Consolas,
  monospace; margin: .8rem 0 0 }
$classes
</style>
</head>
<body><main>
<h1>Does the video drift?</h1>
<p>$lead</p>
<div class="row">$findings</div>

<h2>See for yourself</h2>
<figure class="card film">
<video controls autoplay muted loop playsinline aria-label="$columns"
 src="data:video/mp4;base64,$film"></video>
<figcaption>Columns: $columns. Each row is another video, from the same given
frames; an orange edge marks them. Watch whether balls live and keep their
colour, and whether the background stays what it was.</figcaption>
</figure>

<h2>Frame by frame</h2>
<p class="soft">$legend</p>
<div class="row">$charts</div>

<h2>All numbers</h2>
<p class="soft">$table_note</p>
<div class="card scroll"><table>$table</table></div>

<h2>How it was made</h2>
$made
</main></body></html>
""")


def render(
  *,
  runs: Mapping[str, Mapping[str, Any]],
  curves: charts.Curves,
  findings: Sequence[Finding],
  table: Table,
  film: bytes,
  film_size: tuple[int, int],
  columns: Sequence[str],
  given: int,
  train_frames: int,
  config: Mapping[str, Any],
  timings: Mapping[str, float],
  command: str,
) -> str:
  """Fills in the page; everything it shows is inside it.

  Args:
    runs: summaries by method.
    curves: method -> metric -> curve.
    findings: the few numbers on top.
    table: all numbers.
    film: an mp4.
    film_size: its height and width in pixels.
    columns: names of the film's columns.
    given, train_frames: frames that were given, frames in training.
    config, timings, command: how it was made.
  """
  names = list(runs)
  any_curve = next(iter(curves[names[0]].values()))
  frames = len(any_curve.mean)
  drawn = "".join(
    _chart(panel, curves, given, train_frames) for panel in charts.PANELS
  )
  return _PAGE.substitute(
    light=_variables(charts.LIGHT, names),
    dark=_variables(charts.DARK, names),
    classes="\n".join(
      f".m{i} {{ color: var(--m{i}) }}" for i in range(len(names))
    ),
    lead=_lead(names, given, frames, train_frames),
    findings="".join(_finding(f, names) for f in findings),
    film=base64.b64encode(film).decode(),
    width=film_size[1],
    columns=escape(", ".join(columns)),
    legend=_legend(any_curve.spread, given, train_frames, frames),
    charts=drawn,
    table_note=_table_note(runs, frames - given),
    table=_table(table, names),
    made=_made(config, timings, command),
  )


def _words(name: str) -> str:
  return escape(name.replace("_", " "))


def _variables(theme: charts.Theme, names: Sequence[str]) -> str:
  lines = theme.lines
  return " ".join(
    f"--m{i}: {lines[i % len(lines)]};" for i in range(len(names))
  )


def _coloured(names: Sequence[str], name: str) -> str:
  return f'<strong class="m{names.index(name)}">{_words(name)}</strong>'


def _lead(names, given, frames, train_frames) -> str:
  methods = [
    _coloured(names, n) + (f", which {_LEARNS[n]}" if n in _LEARNS else "")
    for n in names
  ]
  longer = frames / train_frames
  times = f", {longer:.1f} times as long as in training" if longer > 1 else ""
  many = ", against ".join(methods)
  comma = "," if names[-1] in _LEARNS else ""
  start = f"is given {given} frames and " if given else ""
  return (
    "A video model that goes on from its own frames must live with its own "
    f"mistakes. Here it {start}makes {frames - given} by itself, up to frame "
    f"{frames}{times}: {many}{comma} in a world whose truth is known in every "
    "frame."
  )


def _finding(finding: Finding, names: Sequence[str]) -> str:
  values = "".join(
    f'<div class="value">{_coloured(names, name)}<b>{escape(value)}</b></div>'
    for name, value in finding.values.items()
  )
  return (
    f'<section class="card"><h3>{escape(finding.title)}</h3>{values}'
    f'<div class="reading">{escape(finding.reading)}</div></section>'
  )


def _legend(spread, given, train_frames, frames) -> str:
  parts = [
    f"Lines are means over all videos; light bands the {escape(spread)}."
  ]
  if given:
    parts.append(f"Grey: the {given} given frames.")
  if given < train_frames < frames:
    parts.append(
      f"Dotted: the length of {train_frames} frames seen in training."
    )
  return " ".join(parts)


def _chart(panel: charts.Panel, curves, given, train_frames) -> str:
  pictures = (
    base64.b64encode(
      charts.draw(
        curves,
        [panel],
        given=given,
        train_frames=train_frames,
        theme=theme,
        titles=False,
      )
    ).decode()
    for theme in (charts.DARK, charts.LIGHT)
  )
  dark, light = (f"data:image/png;base64,{p}" for p in pictures)
  return (
    f'<figure class="card"><h3>{escape(panel.title)}</h3><picture>'
    f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">'
    f'<img src="{light}" alt="{escape(panel.title)} over the frames">'
    f"</picture><figcaption>{escape(panel.reading)}</figcaption></figure>"
  )


def _table_note(runs, made: int) -> str:
  seeds = sorted({m["seeds"] for m in runs.values()})
  count = " and ".join(str(n) for n in seeds)
  what = "one training" if seeds == [1] else f"means over {count} trainings"
  return (
    f"Early, middle and late thirds of the {made} generated frames; {what} a "
    "method. Bold: the better one late, or of the single number."
  )


def _table(table: Table, names: Sequence[str]) -> str:
  span = len(table.columns)
  head = "".join(
    f'<th colspan="{span}" class="first">{_coloured(names, n)}</th>'
    for n in names
  )
  below = "".join(
    f"<th{' class=first' * (i == 0)}>{escape(c)}</th>"
    for _ in names
    for i, c in enumerate(table.columns)
  )
  body = []
  for label, better, cells, best in table.rows:
    note = f' <span class="note">{escape(better)} is better</span>' * bool(
      better
    )
    row = [f"<td>{escape(label)}{note}</td>"]
    for name in names:
      texts = cells[name]
      mark = " best" if name == best else ""
      if len(texts) == 1:
        row.append(
          f'<td colspan="{span}" class="whole{mark}">{_cell(texts[0])}</td>'
        )
        continue
      for i, text in enumerate(texts):
        kind = "first" * (i == 0) + mark * (i == len(texts) - 1)
        row.append(f'<td class="{kind.strip()}">{_cell(text)}</td>')
    body.append(f"<tr>{''.join(row)}</tr>")
  return (
    f"<thead><tr><th></th>{head}</tr><tr><th></th>{below}</tr></thead>"
    f"<tbody>{''.join(body)}</tbody>"
  )


def _cell(text: str) -> str:
  value, _, note = text.partition("\n")
  small = f'<br><span class="note">{escape(note)}</span>' * bool(note)
  return escape(value) + small


def _made(config, timings, command) -> str:
  parts = []
  if command:
    parts.append(
      '<div class="card"><h3>Make it again</h3>'
      f"<pre>{escape(command)}</pre></div>"
    )
  if timings:
    rows = "".join(
      f"<tr><td>{_words(name)}</td><td>{_duration(seconds)}</td></tr>"
      for name, seconds in timings.items()
    )
    parts.append(
      '<details class="card" open><summary>Time spent</summary>'
      f'<div class="scroll"><table>{rows}</table></div></details>'
    )
  if config:
    text = json.dumps(config, indent=2, default=str)
    parts.append(
      '<details class="card"><summary>Settings</summary>'
      f"<pre>{escape(text)}</pre></details>"
    )
  return "".join(parts) or "<p>Nothing was noted.</p>"


def _duration(seconds: float) -> str:
  if seconds < 120:
    return f"{seconds:.1f} s"
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest:02d} s"
