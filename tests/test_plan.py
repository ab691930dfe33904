"""Planning a run: memory, work, the search for a mesh, what is refused."""

import dataclasses
import functools
import importlib.util
import json
import re
from unittest import mock

import jax
import programs
import pytest

from avd_jax import config as base
from avd_jax.aot import (
  chips,
  plan_compile,
  plan_report,
  plan_search,
  plan_work,
  planner,
  topologies,
)
from avd_jax.aot.hlo import Collective
from avd_jax.aot.plan_compile import Figures, Job
from avd_jax.cli.main import main
from avd_jax.errors import UserError
from avd_jax.models import denoiser
from avd_jax.training.program import Program

MIB = 2**20
CPU = "cpu:8"


def tiny(**mesh):
  config = base.load(programs.TINY, [])
  config.unlock()
  config.mesh.update(data=-1, fsdp=1) if not mesh else config.mesh.update(mesh)
  return config


memory_of = plan_compile.memory
STATS = {}  # what compiled programs said of their memory, by stage


@functools.cache
def measured(job_text):
  job = Job(*json.loads(job_text))

  def memory(stats, held):
    STATS[job.what] = stats
    return memory_of(stats, held)

  with mock.patch.object(plan_compile, "memory", memory):
    return plan_compile.measure(job)


def here(job, until=None, tick=lambda: None):
  """Compiles in this process, each program once."""
  return measured(json.dumps([job.config, job.target, job.what, job.local]))


@functools.cache
def planned(stage="teacher_forcing"):
  return planner.plan(tiny(data=2, fsdp=4), CPU, stage, 2**40, here)


def test_parts_of_memory_sum_to_what_the_program_takes():
  figures = planned().figures["teacher_forcing", 0]
  parts, stats = dict(figures.memory), STATS["teacher_forcing"]
  assert parts.pop("in all") == sum(parts.values())
  assert parts["activations and temporaries"] == stats.temp_size_in_bytes > 0
  assert figures.needed == (
    stats.argument_size_in_bytes
    + stats.temp_size_in_bytes
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes
    + stats.generated_code_size_in_bytes
  )


def test_memory_of_a_state_is_what_a_real_one_takes():
  config = tiny(data=2, fsdp=4)
  state = Program(config, plan_compile.mesh_of(config, CPU)).init()
  device = jax.devices()[3]

  def on_device(tree):
    return sum(
      shard.data.nbytes
      for leaf in jax.tree.leaves(tree)
      for shard in leaf.addressable_shards
      if shard.device == device
    )

  memory = planned().figures["teacher_forcing", 0].memory
  assert memory["parameters"] == on_device(state.params) > 0
  assert memory["EMA"] == on_device(state.ema)
  assert memory["optimizer"] == on_device(state.optimizer)
  data = config.data
  video = data.frames * data.height * data.width * 3 * 4
  assert memory["batch"] == video + 4 * data.text_length + 4  # one of eight
  few = memory["scalars and padding"]
  assert 0 <= few < 64


def test_a_rollout_is_planned_with_its_cache():
  done = planned("rollout")
  figures = done.figures["rollout", 0]
  # 1 chunk is given and 2 segments of 4 are made of 4 tokens of width 16.
  assert figures.memory["cache"] == 2 * (1 + 2 * 4) * 4 * 16 * 4
  weights = planned().figures["teacher_forcing", 0].memory["parameters"]
  assert figures.memory["parameters"] == weights
  assert (figures.videos, figures.frames) == (8, 4)
  # One solver step, and one to remember what was made.
  config = done.config
  last = sum(plan_work.chunk_flops(config, index) for index in range(3, 7))
  assert figures.flops == 8 * 2 * last
  assert figures.flops <= figures.compiled_flops <= 4 * figures.flops
  assert done.main == ("rollout", 0)


def test_flops_of_a_step_follow_its_objective():
  config = tiny()
  data, size = config.data, config.data.batch_size
  model = Program(config, plan_compile.mesh_of(config, CPU)).model
  forward = lambda frames, streams: denoiser.forward_flops(
    model, frames, data.height, data.width, streams
  )
  one, two = (forward(data.frames, streams) for streams in (1, 2))
  needed = lambda name: plan_work.step_flops(config, name)[0] / size
  assert needed("teacher_forcing") == 3 * two
  # The first of 3 chunks is given, the second made in a step and remembered;
  # the last is nobody's history.
  made = forward(1, 1) + 2 * (forward(2, 1) - forward(1, 1))
  assert needed("resampling_forcing") == 3 * two + made
  options = config.stage.resampling_forcing.degradation
  options.update(detached=True, full_every=4)
  assert needed("resampling_forcing") == 3 * (two - one) + made
  full = plan_work.step_flops(config, "resampling_forcing", 3)[0]
  assert full == size * (3 * two + made)
  stage = config.stage.teacher_forcing
  stage.objective, stage.dmd.steps = "dmd", 2
  # One chunk given, two made in 2 steps; a teacher, a critic and its updates.
  made = forward(1, 1) + 3 * (forward(3, 1) - forward(1, 1))
  learned = 3 * (two - one) + 5 * 3 * two
  assert needed("teacher_forcing") == learned + 2 * two + made
  stage.dmd.guidance = 3.0
  assert needed("teacher_forcing") == learned + 3 * two + made
  stage.objective = "diffusion_forcing"
  assert needed("teacher_forcing") == 3 * one
  config.model.remat = "block"
  done = lambda: plan_work.step_flops(config, "teacher_forcing")[1] / size
  assert done() == 4 * one
  config.model.remat = "dots"  # attention alone is run again
  pairs = 3 * 4 // 2  # of 3 chunks
  attention = 4 * pairs * 4**2 * 16
  assert done() == 3 * one + attention


def test_what_is_compiled_does_what_is_needed_and_not_much_more():
  figures = planned().figures["teacher_forcing", 0]
  assert figures.flops <= figures.compiled_flops <= 3 * figures.flops
  # XLA counts arithmetic besides products, and loops once.
  assert figures.compiled_flops < 2 * figures.xla_flops
  assert {kind for kind, *_ in figures.collectives} >= {"all-reduce"}
  assert not figures.unknown_loops


def test_stages_that_share_a_program_are_compiled_once():
  config = tiny(data=2, fsdp=4)
  config.stage.again = (
    config.stage.teacher_forcing.copy_and_resolve_references()
  )
  config.stage.again.steps = 7
  config.stages = ("teacher_forcing", "again", "resampling_forcing")
  config.stage.resampling_forcing.degradation.update(
    detached=True, full_every=2
  )
  compiled = []

  def measure(job, until, tick):
    compiled.append((job.what, job.local))
    work = 10**15 * (1 + job.local)
    seconds = {"compute": 2.0 + job.local, "links": 1.0}
    return Figures(job.what, 9, work, work, {"in all": 5}, seconds=seconds)

  done = planner.plan(config, CPU, None, None, measure)
  again = ("resampling_forcing", 1)
  assert compiled == [
    ("teacher_forcing", 0), ("resampling_forcing", 0), again, ("rollout", 0),
  ]  # fmt: skip
  assert done.figures["again", 0] is done.figures["teacher_forcing", 0]
  assert done.main == again
  assert done.seconds("again") == 2.0
  assert done.seconds("resampling_forcing") == 2.5  # every second step is full
  rows = plan_report.recipe(done)
  assert rows["again"]["days"] == 7 * 2.0 / 86400
  assert rows["again"]["device_hours"] == 7 * 2.0 * 8 / 3600


def test_a_program_that_does_not_compile_costs_no_other_its_figures():
  def measure(job, until, tick):
    if job.what == "rollout":
      raise RuntimeError("INTERNAL: no such kernel\nand more")
    return Figures(job.what, 9, 1, 1, {"in all": 5})

  done = planner.plan(tiny(data=2, fsdp=4), CPU, None, 2**40, measure)
  assert [name for name, _ in done.figures] == list(done.config.stages)
  assert not done.fits
  assert not done.tight
  table = plan_report.table(done)
  assert "rollout does not compile for cpu:8: INTERNAL: no such kernel" in table
  assert "rollout" in plan_report.record(done)["failures"]
  with pytest.raises(UserError, match="rollout does not compile"):
    planner.plan(tiny(data=2, fsdp=4), CPU, "rollout", None, measure)


@functools.cache
def _cuts(stage):
  return plan_search.candidates(tiny(), CPU, stage)


def cuts(stage):
  return [dataclasses.replace(candidate) for candidate in _cuts(stage)]


def figures_of(job, needed, seconds):
  return Figures(
    job.what, 1, 1, 1, {"in all": needed}, seconds={"compute": seconds}
  )


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


def test_the_smallest_counts_where_time_ran_out_before_anything_fit(
  monkeypatch,
):
  few = cuts("resampling_forcing")[:5]
  for size, candidate in enumerate(reversed(few), 1):
    candidate.memory = size
  monkeypatch.setattr(plan_search, "candidates", lambda *_: few)
  measure = lambda job, until, tick=None: figures_of(job, 5, 1.0)
  done, tried = plan_search.best(tiny(), CPU, None, 10, -1.0, measure)
  assert done.fits
  assert done.config is few[-1].config
  assert [candidate.asked for candidate in tried] == [False] * 4 + [True]
  text = plan_report.ranking(tried, 10).splitlines()
  assert text[0].endswith("1 compiled, 1 fit; 4 left when time ran out")
  record = plan_report.record(done, tried)["search"]
  assert record["ways"] == 5
  assert [one["hbm_bytes_per_device"] for one in record["tried"]] == [5]


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


def test_links_and_hosts_bound_an_exchange():
  chip, hosts = chips.find("h100"), [0] * 8 + [1] * 8
  near = Collective("all-gather", 3, 0, int(450e9), tuple(range(8)))
  assert chips.exchange(chip, [near], hosts) == pytest.approx(3.0)
  # All eight network cards of a host, or one.
  far = Collective("all-gather", 1, 0, int(400e9), tuple(range(16)))
  assert chips.exchange(chip, [far], hosts) == pytest.approx(1.0)
  thin = Collective("all-reduce", 1, 0, int(50e9), (0, 8))
  assert chips.exchange(chip, [thin], hosts) == pytest.approx(1.0)
  move = lambda *pairs: Collective("collective-permute", 1, 0, int(50e9), pairs)
  assert chips.exchange(chip, [move(0, 1, 1, 0)], hosts) == pytest.approx(1 / 9)
  assert chips.exchange(chip, [move(0, 8, 8, 0)], hosts) == pytest.approx(1.0)
  tpu = chips.find("v5p")
  assert chips.exchange(tpu, [thin], hosts) == pytest.approx(0.25)
  assert chips.exchange(tpu, [move(0, 8)], hosts) == pytest.approx(0.5)


def test_every_target_has_peaks_and_memory_below_its_size():
  for name, target in topologies.TARGETS.items():
    chip = chips.find(name)
    assert 0.7 * target.gib < chip.memory / 2**30 < target.gib + 1
    assert chip.sources
  assert chips.find("cpu") is None


def avd(monkeypatch, *arguments, config=programs.TINY):
  """`avd plan` in this process, compiling here; gives its exit code."""
  for name in (
    "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "JAX_ENABLE_COMPILATION_CACHE",
    "JAX_NUM_CPU_DEVICES",
  ):  # fmt: skip
    monkeypatch.setenv(name, "")
  monkeypatch.setattr(plan_compile, "apart", here)
  try:
    return main(["plan", "--config", config, *arguments])
  except SystemExit as end:
    return end.code


def test_a_plan_prints_a_table_and_writes_its_figures(
  monkeypatch, capsys, tmp_path
):
  file = tmp_path / "plan.json"
  mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=4")
  only = ("--stage", "teacher_forcing", "--target", CPU)
  code = avd(monkeypatch, *only, *mesh, "--json", str(file))
  shown = capsys.readouterr().out
  assert code == 0
  assert "mesh data 2 x fsdp 4 x context 1 x tensor 1 = 8; " in shown
  values = json.loads(file.read_text())
  figures = planned().figures["teacher_forcing", 0]
  assert values["fits"] is True
  assert values["hbm_limit_bytes"] is None
  assert values["hbm_bytes_per_device"] == figures.needed
  assert values["flops_per_step"] == figures.flops
  assert values["step_seconds"] is values["mfu"] is None  # a host has no peaks
  assert values["mesh"] == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}
  program = values["programs"]["teacher_forcing"]
  assert program["hbm_bytes"] == figures.memory
  assert f"{figures.needed / MIB:,.1f}" in shown
  for row in program["collectives"]:
    assert f"({row['times']})" in shown


def test_what_does_not_fit_ends_with_1_and_says_what_would(monkeypatch, capsys):
  only = ("--stage", "teacher_forcing", "--target", CPU, "--config.mesh.fsdp=4")
  needed = planned().figures["teacher_forcing", 0].needed
  gib = 0.98 * needed / 2**30
  code = avd(monkeypatch, *only, "--config.mesh.data=2", "--hbm", f"{gib:.9f}")
  shown = capsys.readouterr().out
  assert code == 1
  assert re.search(r"left +-0\.\d\n +fits +NO\n", shown)
  _, _, hints = shown.partition("by estimate these would:\n")
  assert "--config.mesh.fsdp=8" in hints


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["v9:2x2"], "'v9' is not one of h100, h200, v5e, v5p, v6e, cpu"),
    (["v5e:3x3"], "no such slice of v5e; there are 1x1, 2x2, 2x4"),
    (["v5p:4x8x4"], "there are 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4 and 4A x"),
    (["v5p"], "no such slice of v5p"),
    (["h100:x"], "give h100:DEVICES, as h100:8"),
    (["h100:12"], "a host has 8 GPUs; give 1 to 8, or a multiple of 8"),
    (["cpu"], "give cpu:DEVICES"),
    (["cpu:99"], "set JAX_NUM_CPU_DEVICES=99"),
    ([CPU, "--config.mesh.data=3"], "does not fit 8 devices; change mesh.data"),
    ([CPU, "--config.mesh.tensor=2"], "1 attention heads are not divisible by"),
    ([CPU, "--config.mesh.context=8"], "4 tokens of a chunk are not divisible"),
    ([CPU, "--config.data.batch_size=12"], "data.batch_size 12 is not"),
    ([CPU, "--stage", "warmup"], "the config runs teacher_forcing, resampling"),
    ([CPU, "--stage", "rollout", "--search"], "rollout has no step"),
    ([CPU, "--search", "--config.data.batch_size=3", "--config.model.patch=12"],
     "no mesh over cpu:8 divides this"),
  ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_compiles(
  monkeypatch, capsys, arguments, said
):
  assert avd(monkeypatch, "--target", *arguments) == 2
  error = capsys.readouterr().err
  assert said in error
  assert error.startswith("error: ")
  assert error.count("\n") == 1


@pytest.mark.parametrize(
  ("target", "extra"),
  [("v5p:4x4x4", "compile-check-tpu"), ("h100:8", "compile-check-gpu")],
)
def test_a_missing_compiler_is_named_with_its_extra(
  monkeypatch, capsys, target, extra
):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert avd(monkeypatch, "--target", target) == 2
  assert f"pip install 'avd_jax[{extra}]'" in capsys.readouterr().err


def test_what_a_tpu_lacks_is_taken_from_its_compilers_words():
  figures = Figures("x", 1, 1, 1, {"parameters": 2**30})
  plan_compile._too_much(
    figures,
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required"
    " for HLO temporaries (20.50G) exceeds available HBM (15.75G).\nmore",
  )
  assert figures.needed == 20.5 * 2**30
  assert figures.memory["activations and temporaries"] == 19.5 * 2**30
  assert not figures.fits(None)
  plan_compile._too_much(
    figures := Figures("x", 1, 1, 1, {}),
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.25G of"
    " 15.75G hbm. Exceeded hbm capacity by 1.5G.",
  )
  assert figures.needed == 17.25 * 2**30
  with pytest.raises(RuntimeError, match="INTERNAL"):
    plan_compile._too_much(figures, "INTERNAL: no")


def test_a_process_of_its_own_hands_back_what_it_was_told():
  job = Job(base.to_json(tiny()), "cpu:64", "teacher_forcing")
  with pytest.raises(UserError, match="JAX_NUM_CPU_DEVICES=64"):
    plan_compile.apart(job)
  with pytest.raises(TimeoutError):
    plan_compile.apart(job, until=0.0)


def test_a_step_compiles_for_a_tpu_slice_that_is_not_there():
  pytest.importorskip("libtpu")
  config = tiny(data=2, fsdp=2)
  job = Job(base.to_json(config), "v5e:2x2", "teacher_forcing")
  figures = plan_compile.measure(job)
  assert figures.fits(planner.limit_of("v5e:2x2"))
  assert set(figures.seconds) == {"compute", "memory", "links"}
  assert all(seconds > 0 for seconds in figures.seconds.values())
  assert figures.flops <= figures.compiled_flops <= 4 * figures.flops
