import html.parser
import json

import numpy as np
import pytest
from PIL import Image

from avd_jax.data import video as video_io
from avd_jax.data import worlds
from avd_jax.errors import UserError
from avd_jax.evaluation import charts, drift, report

FRAMES, GIVEN, VIDEOS = 24, 4, 4


@pytest.fixture(scope="module")
def comparison():
  """Two methods whose balls fade, one three times as fast as the other."""
  config = worlds.WorldConfig(radius=2.5)
  world = worlds.World(config, 0, VIDEOS, FRAMES, stream=worlds.EVAL)
  truth, state = drift.truth(world, VIDEOS)
  empty = worlds.render(
    config,
    state["position"][:, :, :0],
    state["colour"][:, None, :0],
    state["background"][:, None],
  )
  videos, metrics = {"ground_truth": truth}, {}
  for name, rate in (("teacher_forcing", 0.06), ("resampling_forcing", 0.02)):
    left = 1 - rate * np.clip(np.arange(FRAMES) - GIVEN + 1, 0, None)
    left = np.clip(left, 0, 1)[:, None, None, None]
    videos[name] = empty + left * (truth - empty)
    metrics[name] = drift.frame_metrics(videos[name], truth, state, config)
  return {
    "runs": {n: drift.summarize(m, GIVEN) for n, m in metrics.items()},
    "curves": {n: drift.curves([m]) for n, m in metrics.items()},
    "videos": videos,
    "given": GIVEN,
    "train_frames": 10,
  }


class Page(html.parser.HTMLParser):
  """Collects text and sources; fails on a tag that is not closed in order."""

  VOID = ("meta", "img", "source", "br")

  def __init__(self, text):
    super().__init__()
    self.open, self.sources, self.words = [], [], []
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.sources += [attrs[k] for k in ("src", "srcset", "href") if k in attrs]
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if "style" not in self.open:
      self.words.append(data)

  @property
  def text(self):
    return " ".join(" ".join(self.words).split())


def test_report_writes_everything(comparison, tmp_path):
  out = tmp_path / "new" / "folder"
  path = report.write_report(
    out,
    **comparison,
    config={"steps": 7, "note": "<b>&"},
    timings={"teacher_forcing": 130.0},
    command="avd demo --seed 0",
  )
  assert path == out / "report.html"
  names = {"drift.json", "drift.png", "comparison.mp4", "comparison.gif"}
  assert {p.name for p in out.iterdir()} == names | {"report.html"}
  assert json.loads((out / "drift.json").read_text()) == comparison["runs"]

  info = video_io.probe(out / "comparison.mp4")
  assert info.frames == FRAMES
  with Image.open(out / "comparison.gif") as gif:
    assert gif.n_frames == FRAMES
    assert gif.info["loop"] == 0
    assert abs(gif.width - info.width) <= 1
  with Image.open(out / "drift.png") as picture:
    assert picture.width > 1200

  page = Page(path.read_text(encoding="utf-8"))
  # Nothing is fetched: the page can be mailed.
  assert page.sources
  assert all(s.startswith("data:") for s in page.sources)
  for words in (
    "is given 4 frames and makes 20 by itself",
    "2.4 times as long as in training",
    "teacher forcing",
    "resampling forcing",
    "ground truth",
    "avd demo --seed 0",
    "2 min 10 s",
    "<b>&",
    *(panel.reading for panel in charts.PANELS),
  ):
    assert words in page.text
  assert "prefers-color-scheme: dark" in path.read_text(encoding="utf-8")
  late = comparison["runs"]["teacher_forcing"]["failed"][2]
  assert f"{100 * late:.0f} %" in page.text


def test_report_shows_ranges_over_seeds(comparison, tmp_path):
  runs = {n: drift.aggregate([m, m]) for n, m in comparison["runs"].items()}
  path = report.write_report(
    tmp_path, **{**comparison, "runs": runs, "given": 0, "train_frames": 99}
  )
  assert json.loads((tmp_path / "drift.json").read_text()) == runs
  page = Page(path.read_text(encoding="utf-8"))
  low, high = runs["teacher_forcing"]["range"]["failed"][2]
  assert f"{100 * low:.1f} to {100 * high:.1f}" in page.text
  assert "means over 2 trainings" in page.text
  assert "times as long as in training" not in page.text


def test_film_marks_given_frames_and_survives_not_a_number(comparison):
  videos = {n: v.copy() for n, v in comparison["videos"].items()}
  videos["teacher_forcing"][:, -1] = np.nan
  film = report.comparison(videos, given=GIVEN, rows=2)
  assert film.dtype == np.uint8
  assert len(film) == FRAMES
  # Panels are enlarged: a row is three of them wide and two of them high.
  assert film.shape[2] > 3 * 12 * 10
  assert film.shape[1] > 2 * 12 * 10
  assert (film[GIVEN - 1] != film[GIVEN]).any()


def test_every_method_needs_its_curves_and_videos(comparison, tmp_path):
  videos = {"ground_truth": comparison["videos"]["ground_truth"]}
  with pytest.raises(UserError, match="give all three for every method"):
    report.write_report(tmp_path, **{**comparison, "videos": videos})
  with pytest.raises(UserError, match="give all three for every method"):
    report.write_report(tmp_path, **{**comparison, "runs": {}})


def test_table_for_the_terminal(comparison):
  table = report.format_table(comparison["runs"])
  lines = table.splitlines()
  assert max(len(line) for line in lines) <= 100
  assert "teacher forcing" in lines[0]
  failed = next(line for line in lines if line.startswith("failed"))
  for m in comparison["runs"].values():
    for third in m["failed"]:
      assert f"{100 * third:.1f}" in failed
  assert "lower is better" in failed
  assert table.isascii()


def test_chart_draws_what_it_is_told(comparison):
  marks = {"given": GIVEN, "train_frames": 10}
  curves, panels = comparison["curves"], charts.PANELS
  light = charts.draw(curves, panels[:1], **marks)
  dark = charts.draw(curves, panels[:1], theme=charts.DARK, **marks)
  assert light[:8] == dark[:8] == b"\x89PNG\r\n\x1a\n"
  assert light != dark
