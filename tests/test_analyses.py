"""What studies look at besides drift: errors of histories, parts of a step."""

import types

import jax
import numpy as np
import pytest

from avd_jax import config as config_lib
from avd_jax import parallel
from avd_jax.evaluation import analysis_charts
from avd_jax.evaluation.charts import LIGHT
from avd_jax.studies import (
  analyses,
  proxy,
  race,
  rollouts,
  step_parts,
  steps,
)
from avd_jax.training import loop

RNG = np.random.default_rng(0)
KINDS = (*proxy.KINDS, proxy.REAL)


def mesh():
  return parallel.make_mesh(jax.devices()[:1], [1, 1, 1, 1])


def tiny(*overrides):
  """A config of one layer and of one stage, of one step."""
  config = config_lib.load("tests/tiny_config.py", [])
  config.stages = ("only",)
  config.stage = {"only": config_lib.stage("self_resampled", 1)}
  config_lib.override(config, [f"--config.{o}" for o in overrides])
  return config


# --- is one step a fair proxy? -----------------------------------------------


def test_a_constant_error_is_all_in_the_mean_colour():
  shares = proxy.band_shares(np.full((2, 3, 16, 16, 3), -0.3))
  np.testing.assert_allclose(shares, [1, 0, 0, 0, 0], atol=1e-9)


def test_a_checkerboard_is_all_in_the_finest_band():
  board = np.indices((16, 16)).sum(0) % 2 * 2.0 - 1
  error = np.broadcast_to(board[:, :, None], (2, 3, 16, 16, 3))
  assert proxy.band_shares(error)[-1] > 0.95


def test_waves_lie_in_their_bands():
  """A cosine of k half turns across the frame has k/2 cycles."""
  x = (np.arange(16) + 0.5) / 16
  for half_turns, band in ((1, 1), (2, 2), (3, 2), (4, 3), (7, 3), (8, 4)):
    wave = np.cos(np.pi * half_turns * x)[None, None, None, :, None]
    error = np.broadcast_to(wave, (1, 1, 16, 16, 3))
    shares = proxy.band_shares(error)
    assert shares[band] == pytest.approx(1), half_turns


def test_shares_of_bands_make_a_whole():
  shares = proxy.band_shares(RNG.normal(size=(2, 3, 16, 12, 3)))
  assert shares.shape == (len(proxy.BANDS),)
  assert shares.sum() == pytest.approx(1)
  assert (shares > 0).all()
  # Nothing is shared out where there is no error.
  assert proxy.band_shares(np.zeros((1, 1, 4, 4, 3))).sum() == 0


def test_the_cosine_is_of_the_angle():
  a = RNG.normal(size=(2, 4, 3, 3, 1))
  np.testing.assert_allclose(proxy.cosine(a, 5 * a), np.ones(4))
  np.testing.assert_allclose(proxy.cosine(a, -a), -np.ones(4))
  across = np.zeros((1, 1, 2)), np.zeros((1, 1, 2))
  across[0][..., 0] = across[1][..., 1] = 1.0
  assert proxy.cosine(*across) == [0]
  # The mean over videos: one agrees, one does not.
  mixed = np.stack([a[0], -a[1]])
  np.testing.assert_allclose(proxy.cosine(a, mixed), np.zeros(4), atol=1e-12)


def test_statistics_by_hand():
  real = np.zeros((2, 3, 4, 4, 1))
  real[0, :, :2], real[1, :, 2:] = 1.0, 1.0  # two videos, nothing in common
  error = real * np.array([0.2, -0.2, -0.4])[:, None, None, None]
  found = proxy.statistics(error, real)
  size = np.sqrt(0.5)  # half of the frame is wrong
  np.testing.assert_allclose(found["rms"], [0.2 * size, 0.2 * size, 0.4 * size])
  assert found["persistence"] == pytest.approx(0)  # it turns, then stays
  np.testing.assert_allclose(found["direction"], [1, -1, -1])
  np.testing.assert_allclose(found["chance"], [0, 0, 0])
  assert sum(found["bands"]) == pytest.approx(1)


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
  """One model, sampled in two ways, and what was measured of it."""
  workdir = tmp_path_factory.mktemp("analyses") / "run"
  config = tiny()
  loop.train(config, workdir, mesh(), progress=False)
  found = proxy.measure(
    {"one step": workdir, "two steps": workdir},
    {"one step": config, "two steps": tiny("sampling.steps=2")},
    rollouts.held_out(config),
    seed=0,
  )
  return found, config


def test_every_model_makes_every_kind_of_error(errors):
  found, config = errors
  assert list(found["errors"]) == list(found["loss"])
  # The last chunk is nobody's history.
  chunks = config.evaluation.frames - config.evaluation.given - 1
  for label in ("one step", "two steps"):
    kinds = found["errors"][label]
    assert tuple(kinds) == KINDS
    for kind, one in kinds.items():
      for name in ("rms", "direction", "chance"):
        assert len(one[name]) == chunks
      assert min(one["rms"]) > 0, kind
      assert sum(one["bands"]) == pytest.approx(1)
    assert tuple(found["loss"][label]) == ("truth", *KINDS)
    assert np.isfinite(list(found["loss"][label].values())).all()


def test_a_rollout_errs_in_its_own_direction(errors):
  found, _ = errors
  for kinds in found["errors"].values():
    np.testing.assert_allclose(kinds[proxy.REAL]["direction"], 1, rtol=1e-5)
    assert np.abs(kinds["noise, s=.1"]["direction"]).max() < 0.99


def test_rollouts_are_sampled_as_the_study_says(errors):
  one, two = errors[0]["errors"].values()
  assert one[proxy.REAL]["rms"] != two[proxy.REAL]["rms"]
  assert one["one step, s=.1"] != one["one step, s=.6"]
  # No solver has a part in these.
  assert one["noise, s=.1"]["rms"] == two["noise, s=.1"]["rms"]


def test_frames_of_a_chunk_are_one_error():
  frames = RNG.normal(size=(2, 6, 4, 4, 3))
  chunks = proxy.by_chunk(frames, 2)
  assert chunks.shape == (2, 3, 4, 4, 6)
  rms = proxy.statistics(chunks, chunks)["rms"]
  first = np.sqrt((frames[:, :2] ** 2).mean())
  assert rms[0] == pytest.approx(first)
  np.testing.assert_array_equal(proxy.by_chunk(frames, 1), frames)


# --- what a step is made of --------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
  """Contenders take exactly as long as `clock(config, full)` says."""
  now = [0.0]

  def taking(seconds):
    def call():
      now[0] += seconds

    return call

  def step(config, batch, name, local=0):
    every = config.stage[name].degradation.full_every
    full = every and local % every == every - 1
    return taking(config.full if full else config.step)

  history = lambda config, *_: taking(config.history)
  fake = types.SimpleNamespace(perf_counter=lambda: now[0])
  monkeypatch.setattr(race, "time", fake)
  monkeypatch.setattr(steps, "prepare", lambda config, mesh: (config, None))
  monkeypatch.setattr(steps, "step", step)
  monkeypatch.setattr(steps, "history", history)


def timed(step, history=0.0, full=0.0, full_every=0):
  """A config whose parts take so long."""
  stage = config_lib.stage("self_resampled", 1)
  stage.degradation.update(detached=bool(full_every), full_every=full_every)
  config = config_lib.default()
  config.stages, config.stage = ("a",), {"a": stage}
  config.step, config.history, config.full = step, history, full
  return config


def test_parts_of_a_step_are_over_the_baselines(clock):
  found = step_parts.measure(
    {"base": timed(2.0, 0.5), "other": timed(3.0, 1.0)}, "base", mesh(), 3
  )
  assert found == {
    "base": {"step": 1.0, "history": 0.25},
    "other": {"step": 1.5, "history": 0.5},
  }


@pytest.mark.parametrize(("every", "step"), [(1, 3.0), (2, 2.0), (4, 1.5)])
def test_a_mixture_counts_both_kinds_of_steps(clock, every, step):
  """Of so many steps one takes 3, and the others take 1."""
  mixed = timed(2.0, 1.0, full=6.0, full_every=every)
  found = step_parts.measure(
    {"base": timed(2.0), "mixed": mixed}, "base", mesh(), 3
  )
  assert found["mixed"] == {"step": pytest.approx(step), "history": 0.5}


def test_a_full_step_is_another_program():
  stage = "stage.only.degradation"
  config = tiny(f"{stage}.detached=True", f"{stage}.full_every=2")
  program, batch = steps.prepare(config, mesh())
  for local, count in ((0, 1), (2, 1), (1, 2), (3, 2)):
    steps.step(program, batch, "only", local)
    assert len(program._steps) == count


def test_a_raced_step_leaves_the_weights(monkeypatch):
  program, batch = steps.prepare(tiny(), mesh())
  seen = []
  compiled = program.step("only")

  def step(state, batch, schedule):
    seen.append(np.asarray(jax.tree.leaves(state.params)[0]))
    return compiled(state, batch, schedule)

  program._steps.update(dict.fromkeys(program._steps, step))
  call = steps.step(program, batch, "only")
  losses = [float(call()["loss"]) for _ in range(2)]
  np.testing.assert_array_equal(*seen)
  assert losses[0] != losses[1]  # other noise: it was a step


# --- tables and charts -------------------------------------------------------


def made_up(scale=1.0):
  """Numbers such as `proxy.measure` gives, of two models."""
  kind = lambda i: {
    "rms": [scale * (i + 1) / 10, scale * (i + 1) / 5],
    "bands": [0.4, 0.3, 0.2, 0.1, 0.0],
    "persistence": 0.5,
    "direction": [0.1 * i, 0.1 * i],
    "chance": [0.01, -0.01],
  }
  one = {name: kind(i) for i, name in enumerate(KINDS)}
  loss = dict.fromkeys(("truth", *KINDS), 0.25 * scale)
  return {"errors": {"a": one, "b": one}, "loss": {"a": loss, "b": loss}}


COSTS = {
  "plain": {"step": 1.0, "history": 0.0},
  "resampled": {"step": 2.0, "history": 0.5},
}


@pytest.fixture
def figures(monkeypatch):
  """The figures that are drawn."""
  drawn = []
  keep = lambda figure: drawn.append(figure) or b""
  monkeypatch.setattr(analysis_charts, "_png", keep)
  return drawn


def test_the_proxy_section_has_the_means_over_seeds():
  write = analyses.ANALYSES["proxy"].write
  text, png = write([made_up(), made_up(3.0)], {})
  assert "row *a*" in text
  assert "row *b*" in text
  assert text.count("| noise, s=.1 | 0.200 | 0.300 | 0.400 | 0.50 |") == 2
  assert "| 0.00 | 40 | 30 | 20 | 10 | 0 |" in text
  assert f"| b |{' 0.5000 |' * (len(KINDS) + 1)}" in text
  assert png.startswith(b"\x89PNG")


def test_every_kind_of_error_has_a_colour_of_its_own(figures):
  analyses.ANALYSES["proxy"].write([made_up()], {})
  (figure,) = figures
  (legend,) = figure.legends
  words = [text.get_text() for text in legend.get_texts()]
  assert words == [*KINDS, "by chance"]
  lines = figure.axes[0].get_lines()
  colours = [line.get_color() for line in lines]
  assert len(set(colours)) == len(KINDS)
  assert colours[-1] == LIGHT.ink  # the real one
  # The real error's cosine with itself says nothing.
  names = [line.get_label() for line in figure.axes[1].get_lines()]
  assert names == [*proxy.KINDS, "by chance"]


def test_the_cost_section_has_shares():
  slow = {"step": 3.0, "history": 1.5}
  seeds = [COSTS, COSTS | {"resampled": slow}]
  text, png = analyses.ANALYSES["cost"].write(seeds, {"plain": 0.5})
  assert "| plain | 1.00 (1.00 to 1.00) | 0.00 (0.00 to 0.00) | 0 |" in text
  row = "| resampled | 2.50 (2.00 to 3.00) | 1.00 (0.50 to 1.50) | 40 |"
  assert row in text
  assert png.startswith(b"\x89PNG")


def test_bars_end_where_the_step_does(figures):
  analyses.ANALYSES["cost"].write([COSTS], {"resampled": 0.125})
  left, right = figures[0].axes
  ends = [bar.get_x() + bar.get_width() for bar in left.patches]
  assert ends == [1.0, 1.5, 1.0, 2.0]  # the rest of both, then the histories
  # A row without that number has no point, and its number is not another's.
  (point,) = right.get_lines()
  assert point.get_xydata().tolist() == [[2.0, 12.5]]
  assert [text.get_text() for text in right.texts] == ["2"]


def test_a_chart_of_costs_alone_can_be_drawn():
  _, png = analyses.ANALYSES["cost"].write([COSTS], {})
  assert png.startswith(b"\x89PNG")
