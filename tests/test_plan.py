"""Planning a run: memory, work, what is refused."""

import importlib.util
import json
import re
import shlex

import jax
import programs
import pytest
from plans import CPU, STATS, avd, planned, tiny

from avd_jax import config as base
from avd_jax.aot import (
  chips,
  plan_compile,
  plan_report,
  plan_work,
  planner,
  topologies,
)
from avd_jax.aot.hlo import Collective
from avd_jax.aot.plan_compile import Exchange, Figures, Job
from avd_jax.errors import UserError
from avd_jax.models import denoiser
from avd_jax.training.program import Program

MIB = 2**20


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
  said = " ".join(plan_report.table(done).split())
  assert "videos cut over data x fsdp; no command runs it so" in said


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
  assert not done.late
  with pytest.raises(UserError, match="rollout does not compile"):
    planner.plan(tiny(data=2, fsdp=4), CPU, "rollout", None, measure)


def test_columns_of_a_table_stand_apart():
  figures = Figures("teacher_forcing", 9, 10**17, 10**17, {"in all": 2**40})
  axes = ("data", "fsdp", "context")
  exchange = Exchange("collective-permute", axes, 54623, 0, 10**15)
  figures.collectives, figures.seconds = [exchange], {"compute": 2.0}
  config = tiny(data=2, fsdp=4)
  done = planner.Plan(
    config, CPU, config.mesh.to_dict(), None, {("teacher_forcing", 0): figures}
  )
  rows = plan_report.table(done).splitlines()
  long = next(row for row in rows if "collective-permute" in row)
  assert long.endswith(
    "collective-permute, data+fsdp+context  931,322.57 (54623)"
  )
  needed = next(row for row in rows if row.startswith("  needed"))
  assert len(needed) == len(long)
  steps = f"{config.stage.teacher_forcing.steps:,}"
  recipe = next(row for row in rows if steps in row.split())
  assert recipe.split()[:2] == ["teacher_forcing", steps]


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


def test_a_plan_prints_a_table_and_writes_its_figures(
  monkeypatch, capsys, tmp_path
):
  file = tmp_path / "my plan.json"
  mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=4")
  only = ("--stage", "teacher_forcing", "--target", CPU)
  code = avd(monkeypatch, *only, *mesh, "--json", str(file))
  shown, progress = capsys.readouterr()
  assert code == 0
  assert "mesh data 2 x fsdp 4 x context 1 x tensor 1 = 8; " in shown
  values = json.loads(file.read_text())
  figures = planned().figures["teacher_forcing", 0]
  assert values["command"] == shown.splitlines()[0]
  assert shlex.split(values["command"])[:2] == ["avd", "plan"]
  assert shlex.split(values["command"])[-2:] == ["--json", str(file)]
  begun, done = progress.splitlines()  # no terminal, hence no bar
  assert begun == "compiling teacher_forcing for cpu:8"
  assert re.fullmatch(r"compiled teacher_forcing: \d+ s, 0\.00 GiB .*", done)
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
    ([CPU, "--config.mesh.data=-2", "--config.mesh.fsdp=-4"], "at least 1, or"),
    ([CPU, "--config.mesh.data=-1", "--config.mesh.fsdp=-2"], "at least 1, or"),
    ([CPU, "--json", "no/such/x.json"], "there is no directory no/such"),
    ([CPU, "--json", "/"], "this is a directory"),
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


@pytest.mark.parametrize("how", [(), ("--search",), ("--stage", "vae")])
def test_the_run_of_a_vae_is_not_planned(monkeypatch, capsys, how):
  config = str(programs.ROOT / "configs" / "vae_tiny.py")
  assert avd(monkeypatch, "--target", CPU, *how, config=config) == 2
  error = capsys.readouterr().err
  assert "this config trains a VAE" in error
  assert error.count("\n") == 1


@pytest.mark.parametrize("share", ["abc", "0", "nan", "inf"])
@pytest.mark.parametrize("more", [(), ("--hbm", "80")])
def test_a_share_of_a_gpus_memory_is_a_number(monkeypatch, capsys, share, more):
  monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
  assert avd(monkeypatch, "--target", "h100:8", *more) == 2
  error = capsys.readouterr().err
  assert f"XLA_PYTHON_CLIENT_MEM_FRACTION={share}: give a share" in error
  assert error.count("\n") == 1


@pytest.mark.parametrize("option", ["--hbm", "--minutes"])
@pytest.mark.parametrize("value", ["inf", "nan", "0", "abc"])
def test_amounts_are_finite_numbers_above_0(monkeypatch, capsys, option, value):
  assert avd(monkeypatch, "--target", CPU, option, value) == 2
  said = f"argument {option}: '{value}' is not a number above 0"
  assert said in capsys.readouterr().err


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
