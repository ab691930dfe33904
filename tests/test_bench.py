"""Benchmarks: that they measure what they say, and refuse to time a mistake."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from avd_jax import config as config_lib
from avd_jax.cli import main as cli
from avd_jax.errors import UserError
from avd_jax.ops import attention, routing
from avd_jax.studies import (
  attention_cost,
  long_rollout,
  mesh_cost,
  race,
  rivals,
  step_cost,
)

TINY = str(Path(__file__).with_name("tiny_config.py"))
SIZE = attention_cost.Size(tokens=8, heads=1, head_dim=16)


@pytest.fixture(scope="module")
def numbers():
  return attention_cost.measure(
    "cpu", SIZE, (3, 6), (1, 4, None), rounds=1, progress=False
  )


def test_every_case_has_a_row(numbers):
  found = {
    (r["mode"], r["chunks"], r["top_k"], r["implementation"])
    for r in numbers["rows"]
  }
  assert found == {
    (mode, n, k, name)
    for mode in attention_cost.MODES
    for n, k in [(3, 1), (3, "all"), (6, 1), (6, 4), (6, "all")]
    for name in ("reference", "xla")
  }
  chosen = [r["chosen"] for r in numbers["rows"]]
  assert sum(chosen) == len(chosen) / 2
  for row in numbers["rows"]:
    assert row["error"] < 1e-5
    assert row["ms"] > 0
    assert row["memory_mb"] >= 0
    assert row["over_ideal"] == pytest.approx(row["over_dense"] / row["ideal"])


def test_the_ideal_is_arithmetic(numbers):
  ideal = {
    (r["mode"], r["chunks"], r["top_k"]): r["ideal"] for r in numbers["rows"]
  }
  assert ideal["decoding", 6, 4] == pytest.approx(5 / 7)
  assert ideal["decoding", 6, 1] == pytest.approx(2 / 7)
  # Chunks 0 to 5 of both streams: min(i, 1) + 1 of i + 1 chunks.
  assert ideal["training", 6, 1] == pytest.approx((1 + 5 * 2) / 21)
  assert ideal["training", 3, "all"] == 1
  case = attention_cost.Case("training", 6, 1, SIZE)
  assert case.flops() == 3.5 * 4 * 22 * 8 * 8 * 16


def test_slopes_are_lines_through_the_medians(numbers):
  (x, y), (x2, y2) = numbers["curve_dense"]
  assert (x, x2) == (3, 6)
  assert numbers["slope_dense"] == pytest.approx((y2 - y) / (x2 - x))
  # One length alone has more than 4 chunks to choose from: no line.
  assert "slope_routed" not in numbers


def test_queries_that_choose_alike_do():
  case = attention_cost.Case("decoding", 9, 2, SIZE)
  call = attention_cost._decoder(case, "cpu", alike=True)
  q, k, *_ = call.args
  rule = routing.Routing(2, routing.descriptors(k, 8))
  chosen = np.asarray(routing.choose(q, case.sight(), rule))
  assert len(np.unique(np.sort(chosen, -1).reshape(-1, 2), axis=0)) == 1
  assert len(np.unique(chosen)) == 2


def test_a_wrong_contender_is_not_timed(monkeypatch):
  case = attention_cost.Case("decoding", 3, None, SIZE)
  right = attention_cost.ours

  def wrong(case, name, platform):
    call = right(case, name, platform)
    return (lambda *a: 1.01 * call(*a)) if name == "xla" else call

  assert attention_cost.check(case, "xla", "cpu") < 1e-5
  monkeypatch.setattr(attention_cost, "ours", wrong)
  with pytest.raises(UserError, match=r"xla differs from the reference by 1\."):
    attention_cost.check(case, "xla", "cpu")


def test_long_problems_are_checked_on_their_beginning(monkeypatch):
  monkeypatch.setattr(attention_cost, "CHECKED", 5 * 4 * 4)
  case = attention_cost.Case("decoding", 40, 1, SIZE)
  assert "reference" not in attention_cost.contenders(case, "cpu")
  assert attention_cost.check(case, "xla", "cpu") < 1e-5
  small = attention_cost._smaller(case)
  assert (small.chunks, small.size.tokens) == (4, 4)  # 4 to choose 1 from
  # Wan's size, five of 21: the check must have something to choose from.
  monkeypatch.setattr(attention_cost, "CHECKED", 2**24)
  wan = attention_cost.Case("training", 21, 5, attention_cost.SIZES["gpu"])
  small = attention_cost._smaller(wan)
  assert (small.chunks, small.size.tokens) == (8, 195)


def test_what_auto_would_take_is_explained(capsys):
  assert cli.main(["bench", "attention", "--explain", "--platform", "gpu"]) == 0
  text = capsys.readouterr().out
  assert "training, 21 chunks of 1560 tokens, top 5" in text
  assert "chosen: our kernels" in text
  assert "cannot: it cannot route" in text
  for name in attention.IMPLEMENTATIONS:
    assert f"  {name} " in text
  assert cli.main(["bench", "attention", "--platform", "gpu"]) == 2
  assert "--platform needs --explain" in capsys.readouterr().err


def test_the_command_writes_rows_and_a_table(tmp_path, capsys):
  path = tmp_path / "a.json"
  size = ["--tokens", "8", "--heads", "1", "--head-dim", "16", "--rounds", "1"]
  what = ["--chunks", "2", "3", "--top-k", "1", "all", "--mode", "decoding"]
  assert not cli.main(["bench", "attention", *size, *what, "--json", str(path)])
  table = capsys.readouterr().out
  numbers = json.loads(path.read_text())
  slopes = {"slope_dense", "slope_routed", "slope_routed_alike"}
  assert {"device", "rows"} | slopes <= set(numbers)
  assert table.count("decoding  ") == len(numbers["rows"]) == 8
  assert "slope_dense" in table
  assert "reference *" in table


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--top-k", "0"], "--top-k 0: give 1 to 59"),
    (["--top-k", "60"], "--top-k 60: give 1 to 59"),
    (["--chunks", "0"], "at least 1"),
    (["--rounds", "0"], "at least 1"),
    (["--head-dim", "0"], "--head-dim: at least 1"),
    (["--dtype", "int8"], "--dtype int8"),
  ],
)
def test_impossible_benchmarks_are_refused(arguments, message, capsys):
  assert cli.main(["bench", "attention", *arguments]) == 2
  assert message in capsys.readouterr().err


def test_flex_attention_is_a_fair_rival():
  """The same mask and the same padding; without a GPU it has no gradient."""
  pytest.importorskip("torch")
  case = attention_cost.Case("training", 3, None, SIZE)
  # "decoding" leaves gradients out, whatever the mask.
  theirs = rivals.flex_attention(case.sight(), "decoding", 8, device="cpu")
  arrays = case.arrays()
  (found,) = theirs.numpy(theirs.prepare(*arrays)())
  ours = rivals.of_jax(attention_cost.ours(case, "reference", "cpu"))
  wanted, *_ = ours.numpy(ours.prepare(*arrays)())
  np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_a_race_runs_everyone_in_turn():
  order = []
  calls = {name: lambda n=name: order.append(n) for name in "ab"}
  times = race.run(calls, 3, progress=False)
  assert order == list("aabb" + "ab" * 3)
  assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}
  assert race.ratio({"a": [2, 4, 30], "b": [1, 1, 10]}, "a", "b") == 3


# --- a training step ---------------------------------------------------------


def test_the_cost_of_a_step_has_its_parts(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(step_cost, "MATMUL", 64)
  path = tmp_path / "a.json"
  arguments = ["--config", TINY, "--rounds", "2", "--json", str(path)]
  assert cli.main(["bench", "step", *arguments]) == 0
  numbers = json.loads(path.read_text())
  contenders = ("tf", "rf", "rf_detached", "rollout", "matmul")
  assert list(numbers) == [
    "device", "rf_over_tf", "rf_detached_over_tf", "rollout_share",
    "tokens_per_second", "mfu", *(f"{name}_ms" for name in contenders),
    "rounds",
  ]  # fmt: skip
  assert numbers.pop("rounds") == 2
  assert min(v for k, v in numbers.items() if k != "device") > 0
  # A batch of 8 videos of 3 frames of 2 x 2 tokens.
  seconds = numbers["tf_ms"] / 1e3
  assert numbers["tokens_per_second"] == pytest.approx(96 / seconds)
  table = capsys.readouterr().out
  assert all(name in table for name in numbers)
  assert cli.main(["bench", "step", "--config", TINY, "--rounds", "0"]) == 2
  assert "at least 1 round" in capsys.readouterr().err


def test_meshes_race_plain_data_parallelism(monkeypatch, tmp_path, capsys):
  seen = []

  def step(program, batch, name):
    seen.append((dict(program.mesh.shape), batch.x.sharding.num_devices, name))
    return lambda: 0

  # Compiling every mesh takes longer than this test may.
  monkeypatch.setattr(mesh_cost.steps, "step", step)
  path = tmp_path / "mesh.json"
  arguments = ["--config", TINY, "--rounds", "2", "--json", str(path)]
  heads = "--config.model.num_heads=2"
  assert cli.main(["bench", "step", "--meshes", *arguments, heads]) == 0
  numbers = json.loads(path.read_text())
  names = ["data 8", "fsdp 8", "context 4", "tensor 2"]  # 4 tokens a chunk
  assert list(numbers["meshes"]) == list(numbers["ms"]) == names
  assert all(numbers["meshes"]["data 8"][s] == 1.0 for s in mesh_cost.STAGES)
  assert seen[4:6] == [
    ({"data": 2, "fsdp": 1, "context": 4, "tensor": 1}, 8, name)
    for name in mesh_cost.STAGES
  ]
  shown = capsys.readouterr().out
  assert all(name in shown for name in names)
  one = jax.devices()[:1]
  with pytest.raises(UserError, match="2 devices and more"):
    mesh_cost.meshes(config_lib.load(TINY, []), one)


# --- long rollouts -----------------------------------------------------------


def test_a_long_rollout_is_measured_and_drawn(tmp_path):
  numbers = long_rollout.measure(
    10, 2, kinds=("window 8, sink 1",), progress=False
  )
  curve = numbers["kinds"]["window 8, sink 1"]
  assert curve["chunk"] == [2, 4, 6, 8, 10]
  assert min(curve["ms"]) > 0
  assert max(curve["memory_mb"]) < 1.05 * min(curve["memory_mb"])
  # The ring, and not a buffer for the video: another length, the same bytes.
  longer = long_rollout.measure(
    16, 2, kinds=("window 8, sink 1",), progress=False
  )["kinds"]["window 8, sink 1"]
  assert longer["memory_mb"][-1] == pytest.approx(curve["memory_mb"][-1], 0.05)
  long_rollout.draw(tmp_path / "x.png", numbers, "here")
  assert (tmp_path / "x.png").stat().st_size > 5000
  with pytest.raises(UserError, match="at least five segments of 20"):
    long_rollout.measure(99)


def test_growth_is_the_end_over_the_beginning():
  curve = long_rollout.Curve(
    list(range(10)), [1.0] * 5 + [9.0] * 3 + [3.0] * 2, [2.0] * 10
  )
  assert long_rollout.growth(curve) == {"time": 3.0, "memory": 1.0}
