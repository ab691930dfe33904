"""Weak scaling on paper: what a plan's exchange becomes on other meshes."""

import json

import pytest

from avd_jax.aot import chips, scaling
from avd_jax.cli.main import main
from avd_jax.errors import UserError

GIB = 2**30


def plan(target="v5p:4x4x4", data=8, exchanges=(), seconds=(1.0, 0.25), hbm=20):
  mesh = {"data": data, "fsdp": 8, "context": 1, "tensor": 1}
  state = {"parameters": GIB, "EMA": GIB, "optimizer": 2 * GIB}
  return {
    "target": target,
    "mesh": mesh,
    "stage": "resampling_forcing",
    "program": "resampling_forcing",
    "hbm_limit_bytes": 30 * GIB,
    "programs": {
      "resampling_forcing": {
        "collectives": list(exchanges),
        "seconds": dict(zip(("compute", "memory"), seconds, strict=True)),
        "hbm_bytes": state | {"in all": hbm * GIB},
      }
    },
  }


def exchange(kind, axes, times, sent):
  return {"kind": kind, "axes": axes, "times": times, "bytes": 0, "sent": sent}


def test_a_ring_sends_what_the_plan_sends_by_its_length():
  ring = chips.find("v5p").ring
  sent = int(ring)  # a second of 8 devices
  points = scaling.curve(
    plan(exchanges=[exchange("all-reduce", ["data"], 100, sent)])
  )
  assert [p.devices for p in points] == [2**n for n in range(3, 13)]
  assert points[0].mesh["fsdp"] == 8
  assert points[0].mesh["data"] == 1
  assert points[0].links == 0
  assert points[0].hidden == 1.0
  eight = points[3]
  assert eight.mesh["data"] == 8
  hops = 100 * 7 * scaling.HOP
  assert eight.links == pytest.approx(1.0 + hops)
  assert eight.hidden == pytest.approx(1 / (1 + hops))
  assert eight.in_line == pytest.approx(1 / (2 + hops))
  most = points[-1]  # 512 along data
  expected = (511 / 512) / (7 / 8) + 100 * 511 * scaling.HOP
  assert most.links == pytest.approx(expected)


def test_weights_that_are_cut_less_take_more_room():
  few = scaling.curve(plan(), least=4, most=64)
  assert [p.mesh["fsdp"] for p in few] == [4, 8, 8, 8, 8]
  assert few[1].memory == 20 * GIB
  assert few[0].memory == (20 + 4) * GIB
  assert few[0].fits
  assert not scaling.curve(plan(hbm=27), least=4, most=4)[0].fits


def test_an_exchange_along_an_axis_that_is_gone_takes_no_time():
  gather = exchange("all-gather", ["fsdp"], 1, 10**9)
  assert scaling.curve(plan(exchanges=[gather]), least=1, most=1)[0].links == 0


def test_gpus_leave_their_host_through_network_cards():
  chip = chips.find("h100")
  near = exchange("all-gather", ["fsdp"], 1, int(chip.ring))
  far = exchange("all-reduce", ["data"], 1, int(chip.outward))
  at = lambda e: scaling.curve(plan("h100:64", exchanges=[e]))[3].links
  assert at(near) == pytest.approx(1.0, rel=1e-4)
  assert at(far) == pytest.approx(1.0, rel=1e-4)  # one card for each ring


def test_a_pair_of_devices_passes_on_as_much_on_any_mesh():
  move = exchange(
    "collective-permute", ["data"], 10, int(chips.find("v5p").link)
  )
  points = scaling.curve(plan(exchanges=[move]))
  assert {round(p.links, 3) for p in points[1:]} == {1.0}


def test_a_plan_without_a_data_axis_or_without_peaks_is_refused():
  with pytest.raises(UserError, match=r"mesh\.data=2"):
    scaling.curve(plan(data=1))
  refused = plan()
  refused["programs"]["resampling_forcing"]["seconds"] = {}
  with pytest.raises(UserError, match="one that fits"):
    scaling.curve(refused)
  with pytest.raises(UserError, match="no known peaks"):
    scaling.curve(plan("cpu:8"))


def test_a_rollout_is_not_scaled():
  rollout = plan() | {"stage": "rollout", "program": "rollout"}
  rollout["programs"] = {"rollout": {}}
  with pytest.raises(UserError, match="what is scaled here is a training step"):
    scaling.curve(rollout)


@pytest.mark.parametrize(("context", "least"), [(1, 8), (4, 8), (16, 16)])
def test_fewer_devices_than_the_fewest_are_refused(context, least):
  wide = plan()
  wide["mesh"]["context"] = context
  with pytest.raises(UserError, match=rf"most 2: give {least} devices or more"):
    scaling.curve(wide, most=2)
  assert len(scaling.curve(wide, most=least)) == 1


def test_the_verb_prints_tables_and_draws(tmp_path, capsys):
  file, out = tmp_path / "small.json", tmp_path / "scaling.png"
  ring = exchange("all-reduce", ["data"], 9, 10**9)
  file.write_text(json.dumps(plan(exchanges=[ring])))
  assert main(["scaling", str(file), "--out", str(out)]) == 0
  shown = capsys.readouterr().out
  assert "small: resampling_forcing on v5p:4x4x4" in shown
  assert "4,096" in shown
  assert "1 us" in shown
  assert out.read_bytes()[:4] == b"\x89PNG"
  other = tmp_path / "other.json"
  for text in ("{}", "3", '{"programs": 1}', '["programs"]'):
    other.write_text(text)
    assert main(["scaling", str(other), "--out", str(out)]) == 2
    said = f"error: {other}: not what avd plan --json writes\n"
    assert capsys.readouterr().err == said
  nowhere = str(tmp_path / "nowhere" / "s.png")
  assert main(["scaling", str(file), "--out", nowhere]) == 2
  assert "there is no directory" in capsys.readouterr().err
