"""The search for a mesh: what is tried, what is found, and when it ends."""

import functools
import json
import re
import time

import programs
import pytest
from plans import CPU, avd, cuts, figures_of, tiny

from avd_jax import config as base
from avd_jax.aot import plan_compile, plan_report, plan_search
from avd_jax.aot.plan_compile import Job


def test_a_search_compiles_what_may_fit_and_finds_the_only_mesh_that_does():
  config = tiny()
  stage = plan_search.heaviest_stage(config)
  assert stage == "resampling_forcing"
  tried = cuts(stage)
  found = {(*c.mesh.values(), c.config.optimizer.accumulation) for c in tried}
  # One head and 4 tokens; 8 videos, so that 8 devices of them take no more.
  assert {cut[:4] for cut in found} == {
    (data, fsdp, 8 // data // fsdp, 1)
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if 2 <= data * fsdp <= 8
  }
  assert all(
    8 % (data * fsdp * times) == 0 for data, fsdp, _, _, times in found
  )
  needs = {str(c.config): 2 * c.memory for c in tried}
  limit = min(needs.values())
  compiled = []

  def measure(job, until, tick):
    compiled.append(job)
    needed = needs[str(base.from_json(job.config))]
    return figures_of(job, needed, 1.0)

  good = plan_search.search(tried, CPU, stage, limit, 1.0, measure)
  assert {tuple(c.mesh.values()) for c in good} == {(1, 8, 1, 1)}
  assert {c.figures.needed for c in good} == {limit}
  assert 1 < len(compiled) < len(tried)
  for candidate in tried:
    alone = "by arithmetic alone" in (candidate.failure or "")
    assert alone == (candidate.memory > limit)
    assert bool(candidate.figures) != bool(candidate.failure)
  assert sum(candidate.asked for candidate in tried) == len(compiled)
  text = plan_report.ranking(tried, limit)
  assert f"{len(compiled)} compiled, {len(good)} fit" in text
  assert text.splitlines()[1].startswith("   1. 1 x 8 x 1 x 1")


def test_a_search_stops_where_nothing_can_be_faster_or_time_is_up():
  tried = cuts("resampling_forcing")
  measure = lambda job, until, tick: figures_of(job, 1, 1e-30)
  search = functools.partial(
    plan_search.search, target=CPU, name="x", limit=None
  )
  assert len(search(tried, minutes=1.0, measure=measure)) == 1
  assert all("longer than the best" in c.failure for c in tried[1:])
  tried = cuts("resampling_forcing")
  assert not search(tried, minutes=-1.0, measure=measure)
  assert {c.failure for c in tried} == {"no time left"}

  def late(job, until, tick):
    raise TimeoutError("too late")

  assert not search(tried, minutes=1.0, measure=late)
  assert {c.failure for c in tried} == {"too late"}


def test_a_search_says_in_a_line_what_fails_and_goes_on(monkeypatch, capfd):
  tried = cuts("resampling_forcing")[:3]
  job = Job(base.to_json(tiny(data=2, fsdp=4)), CPU, "no such stage")
  apart, asked = plan_compile.apart, []

  def measure(this, *more, **options):
    asked.append(this)
    if len(asked) == 1:  # in a process of its own
      return apart(job, *more, **options)
    if len(asked) == 2:
      raise TypeError("no\nsuch thing")
    return figures_of(this, 1, 1.0)

  monkeypatch.setattr(plan_compile, "apart", measure)
  assert plan_search.search(tried, CPU, "x", None, 1.0) == tried[2:]
  failures = [candidate.failure for candidate in tried]
  assert failures[0].startswith("KeyError: ")
  assert failures[1:] == ["TypeError: no", None]
  said = capfd.readouterr().err
  assert "Traceback" not in said
  for candidate in tried[:2]:
    sizes = "x".join(map(str, candidate.mesh.values()))
    assert re.search(f"{sizes}, remat .*: {candidate.failure}\n", said)


def test_the_winner_is_planned_as_a_whole_and_its_arguments_make_it(
  monkeypatch,
):
  few = [
    c
    for c in cuts("resampling_forcing")
    if c.mesh["fsdp"] in (2, 4) and c.mesh["context"] == 1
    if (c.config.model.remat, c.config.optimizer.accumulation) == ("none", 1)
  ]
  monkeypatch.setattr(plan_search, "candidates", lambda *_: few)

  def measure(job, until, tick):
    wide = job.config["mesh"]["fsdp"] == 4
    needed = 99 if job.what == "rollout" and not wide else 5
    return figures_of(job, needed, 1.0 + wide)

  for candidate in few:
    candidate.memory = 1
  done, tried = plan_search.best(tiny(), CPU, None, 10, 1.0, measure)
  assert tried is few
  assert done.fits
  assert done.mesh["fsdp"] == 4  # the fastest steps leave no room to roll out
  arguments = plan_search.overrides(done.config, done.mesh)
  config = base.load(programs.TINY, arguments)
  assert base.to_json(config) == base.to_json(done.config)


def few_cuts(monkeypatch, count=5):
  """Candidates of which the last needs least by arithmetic: 1 byte."""
  few = cuts("resampling_forcing")[:count]
  for size, candidate in enumerate(reversed(few), 1):
    candidate.memory = size
  monkeypatch.setattr(plan_search, "candidates", lambda *_: few)
  return few


def test_the_smallest_counts_where_time_ran_out_before_anything_fit(
  monkeypatch,
):
  few, untils = few_cuts(monkeypatch), []

  def measure(job, until, tick):
    untils.append(until)
    if len(untils) == 1:
      raise TimeoutError("too late")
    if len(untils) <= 5:
      raise RuntimeError("no")
    return figures_of(job, 5, 1.0)

  start = time.monotonic()
  done, tried = plan_search.best(tiny(), CPU, None, 10, 1.0, measure)
  assert done.fits
  assert done.config is few[-1].config
  text = plan_report.ranking(tried, 10).splitlines()
  assert text[0].endswith("1 compiled, 1 fit")
  # Two thirds for the search, all for what comes then.
  assert untils[:5] == [pytest.approx(start + 40, abs=5)] * 5
  assert untils[5:] == [pytest.approx(start + 60, abs=5)] * 3


def test_nothing_compiled_in_time_is_said_so(monkeypatch, capsys, tmp_path):
  few, asked = few_cuts(monkeypatch), []

  def late(job, until, tick, trace=False):
    asked.append(job.what)
    raise TimeoutError("no time left")

  assert plan_search.best(tiny(), CPU, None, 10, -1.0, late) == (None, few)
  assert not asked
  file = tmp_path / "plan.json"
  search = (
    "--target", CPU, "--search", "--minutes", "0.5", "--json", str(file),
  )  # fmt: skip
  assert avd(monkeypatch, *search, apart=late) == 1
  shown = capsys.readouterr().out
  assert "nothing was compiled in 0.5 minutes; give more (--minutes)" in shown
  assert "found" not in shown
  written = json.loads(file.read_text())
  assert written["fits"] is None
  assert written["why"] in shown
  assert len(written["search"]["tried"]) == 5
  # The last is the smallest again, in the last third of the time.
  assert asked == ["resampling_forcing"] * (5 + 1)
  asked.clear()
  few[-1].memory = few[-2].memory = 2**31
  for candidate in few[:-2]:
    candidate.memory = 2**32
  assert avd(monkeypatch, *search, "--hbm", "1", apart=late) == 1
  shown = capsys.readouterr().out
  assert "smallest needs 2.00 GiB of a device, and there are 1.00" in shown
  assert not asked


def test_what_came_nearest_is_shown_where_the_smallest_is_late(monkeypatch):
  few = few_cuts(monkeypatch)

  def measure(job, until, tick):
    if job.config == base.to_json(few[1].config):
      return figures_of(job, 11, 1.0)
    raise TimeoutError("no time left")

  done, _ = plan_search.best(tiny(), CPU, None, 10, 1.0, measure)
  assert done.config is few[1].config
  assert done.tight == [*done.figures]


def test_a_winner_is_named_where_no_time_was_left_for_its_other_programs(
  monkeypatch, capsys, tmp_path
):
  few, file = few_cuts(monkeypatch), tmp_path / "plan.json"

  def measure(job, until, tick, trace=False):
    if job.what != "resampling_forcing":
      raise TimeoutError("no time left")
    return figures_of(job, 5, 1.0 + (job.config != base.to_json(few[2].config)))

  options = ("--target", CPU, "--search", "--json", str(file))
  assert avd(monkeypatch, *options, apart=measure) == 1
  shown, progress = capsys.readouterr()
  others = ("teacher_forcing", "rollout")
  for name in others:
    assert f"\n{name}: not compiled: no time left\n" in shown
  *_, head, arguments, why = shown.splitlines()
  assert head == "the fastest found whose step of resampling_forcing fits:"
  assert arguments.split() == plan_search.overrides(few[2].config, few[2].mesh)
  assert why == "not compiled, no time left: teacher_forcing; rollout"
  values = json.loads(file.read_text())
  assert values["not_compiled"] == list(others)
  assert values["failures"] == {}
  assert values["fits"] is False
  assert values["command"] == shown.splitlines()[0]
  # One line a candidate, where no bar is shown.
  assert len(re.findall(r", accumulation \d+: 0\.00 GiB\n", progress)) == 5


def test_the_fastest_step_is_named_where_no_rollout_fits(monkeypatch):
  few = few_cuts(monkeypatch, 2)
  measure = lambda job, until, tick: figures_of(
    job, 99 if job.what == "rollout" else 5, 1.0
  )
  done, _ = plan_search.best(tiny(), CPU, None, 10, 1.0, measure)
  assert done.config in [candidate.config for candidate in few]
  assert done.tight == [("rollout", 0)]
  head, _, why = plan_report.choice(done, "resampling_forcing")
  assert "whose step of resampling_forcing fits" in head
  assert why == "does not fit: rollout"
  assert plan_report.choice(done, "no such stage") == []


def test_what_was_most_beyond_the_arithmetic_is_expected_of_others():
  tried = cuts("resampling_forcing")[:3]
  for candidate, beyond in zip(tried, (3, 7, None), strict=True):
    candidate.config = tried[0].config  # the same recomputing
    candidate.memory, candidate.tokens = 10, 2.0
    if beyond is not None:
      candidate.figures = figures_of(Job({}, CPU, "x"), 10 + beyond, 1.0)
  assert plan_search._about(tried[2], tried) == 17
  tried[2].tokens = 1.0
  assert plan_search._about(tried[2], tried) == 13.5
