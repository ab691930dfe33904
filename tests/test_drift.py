"""The metrics must not be fooled: each test degrades a truth in a known way."""

import json
import time

import numpy as np
import pytest

from avd_jax.data import worlds
from avd_jax.errors import UserError
from avd_jax.evaluation import drift, manifold, objects

# Sizes of toy worlds: (side, radius).
SIZES = [(12, 2.0), (12, 3.0), (16, 3.0), (24, 3.0)]


def config_of(side=12, radius=2.0, balls=1):
  return worlds.WorldConfig(
    height=side, width=side, radius=radius, num_balls=balls
  )


def truth_of(config, seed=0, videos=5, frames=24):
  world = worlds.World(config, seed, videos, frames, stream=worlds.EVAL)
  return drift.truth(world, videos)


def draw(config, state, background=None, colour=None, position=None):
  """Draws a truth again with some of it changed."""
  background = state["background"] if background is None else background
  colour = state["colour"] if colour is None else colour
  position = state["position"] if position is None else position
  return worlds.render(
    config, position, colour[:, None], background[:, None]
  ).astype(np.float32)


def empty_of(config, state):
  nothing = state["colour"][:, :0], state["position"][:, :, :0]
  return draw(config, state, colour=nothing[0], position=nothing[1])


def apart(position):
  """Distances [b f] between the two nearest balls."""
  pairs = np.linalg.norm(
    position[:, :, :, None] - position[:, :, None], axis=-1
  )
  k = position.shape[2]
  return pairs[:, :, *np.triu_indices(k, 1)].min(-1)


@pytest.mark.parametrize("balls", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_truth_is_perfect(size, balls):
  config = config_of(*size, balls)
  video, state = truth_of(config)
  metrics = drift.frame_metrics(video, video, state, config)
  assert {m.shape for m in metrics.values()} == {video.shape[:2]}
  assert metrics["off_manifold"].max() < 1e-3
  assert metrics["object_share"].min() == 1
  assert metrics["failed"].max() == 0
  assert metrics["hue_error"].max() < 1e-3
  assert metrics["background_error"].max() < 1e-5
  assert metrics["flicker"].max() < 1e-6
  if balls == 2:
    # Or else the balls that touch would not have been tested.
    assert (apart(state["position"]) < 2 * config.radius).mean() > 0.1


@pytest.mark.parametrize("distance", [0.0, 0.3, 1.0, 2.0, 4.0])
def test_truth_is_perfect_when_balls_touch(distance):
  config = config_of(12, 2.0, balls=2)
  hue = np.linspace(0, 0.95, 12)
  state = {
    "position": np.array([[[[6, 4], [6, 4 + distance]]]] * 12, np.float32),
    "colour": worlds.hue_to_rgb(np.stack([hue, hue[::-1] ** 2], 1)),
    "background": np.random.default_rng(0).uniform(0.1, 0.5, (12, 3)),
  }
  video = draw(config, state)
  metrics = drift.frame_metrics(video, video, state, config)
  assert metrics["off_manifold"].max() < 1e-3
  assert metrics["failed"].max() == 0
  assert metrics["hue_error"].max() < 1e-3


@pytest.mark.parametrize("balls", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_another_video_of_the_world_is_no_failure(size, balls):
  # What a model may do: other places, colours and meetings of the balls.
  config = config_of(*size, balls)
  video, state = truth_of(config)
  other, _ = truth_of(config, seed=1)
  metrics = drift.frame_metrics(other, video, state, config)
  # Two balls within half a radius cannot be told from one that is missing.
  assert metrics["failed"].mean() <= (0.06 if balls == 2 else 0)
  assert metrics["off_manifold"].mean() < (5e-3 if balls == 2 else 1e-4)


@pytest.mark.parametrize("balls", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_empty_frame_of_the_right_background_fails(size, balls):
  config = config_of(*size, balls)
  video, state = truth_of(config)
  metrics = drift.frame_metrics(empty_of(config, state), video, state, config)
  assert metrics["off_manifold"].min() > 0.005
  assert metrics["object_share"].max() == 0
  assert metrics["failed"].min() == 1
  assert metrics["hue_error"].min() == 0.5
  assert metrics["background_error"].max() < 1e-5
  assert np.isnan(metrics["speed_error"]).all()


@pytest.mark.parametrize("size", SIZES)
def test_one_of_two_balls_missing_fails(size):
  config = config_of(*size, balls=2)
  video, state = truth_of(config)
  left = draw(
    config,
    state,
    colour=state["colour"][:, :1],
    position=state["position"][:, :, :1],
  )
  metrics = drift.frame_metrics(left, video, state, config)
  seen = apart(state["position"]) > 0.5 * config.radius
  assert metrics["object_share"][seen].max() == 0
  assert metrics["off_manifold"][seen].min() > 1e-3


@pytest.mark.parametrize("balls", [1, 2])
@pytest.mark.parametrize("size", [(12, 2.0), (16, 3.0), (24, 3.0)])
def test_doubled_ball_fails(size, balls):
  config = config_of(*size, balls)
  video, state = truth_of(config, videos=12)
  _, other = truth_of(config, seed=1, videos=12)
  position = np.concatenate(
    [state["position"], other["position"][:, :, :1]], axis=2
  )
  colour = np.concatenate([state["colour"], other["colour"][:, :1]], axis=1)
  doubled = draw(config, state, colour=colour, position=position)
  metrics = drift.frame_metrics(doubled, video, state, config)
  clear = apart(position) > 1.5 * config.radius
  assert clear.sum() > 50
  assert metrics["failed"][clear].mean() == 1
  assert metrics["off_manifold"][clear].min() > 0.005


def test_too_large_and_too_faint_balls_are_no_objects():
  config = config_of(16, 3.0)
  video, state = truth_of(config)
  empty = empty_of(config, state)
  faint = empty + 0.3 * (video - empty)
  inside = state["position"].clip(4.5, 16 - 4.5)
  large = draw(config_of(16, 4.5), state, position=inside)
  for bad in (faint, large):
    metrics = drift.frame_metrics(bad, video, state, config)
    assert metrics["object_share"].max() == 0


def test_small_faults_are_no_failures():
  config = config_of(12, 2.0, balls=2)
  video, state = truth_of(config)
  noise = np.random.default_rng(0).normal(0, 0.1, video.shape)
  empty = empty_of(config, state)
  for fault in (video + noise, empty + 0.8 * (video - empty)):
    metrics = drift.frame_metrics(fault, video, state, config)
    assert metrics["failed"].mean() < 0.02
    assert 1e-3 < metrics["off_manifold"].mean() < 0.02


@pytest.mark.parametrize("size", SIZES)
def test_background_error_is_exact(size):
  config = config_of(*size, balls=2)
  video, state = truth_of(config, frames=10)
  shift = np.array([0.06, -0.02, 0.03])
  wrong = draw(config, state, background=state["background"] + shift)
  metrics = drift.frame_metrics(wrong, video, state, config)
  np.testing.assert_allclose(
    metrics["background_error"], np.linalg.norm(shift), atol=1e-5
  )


def test_background_outside_its_range_is_off_the_manifold():
  config = config_of()
  video, state = truth_of(config)
  state["background"] = np.full_like(state["background"], 0.5)
  brighter = draw(config, state, background=state["background"] + 0.3)
  metrics = drift.frame_metrics(brighter, video, state, config)
  assert metrics["broken"].min() == 1
  np.testing.assert_allclose(
    metrics["background_error"], 0.3 * 3**0.5, atol=1e-5
  )


@pytest.mark.parametrize("turn", [0.05, 0.25, 0.5, 0.7, 0.95])
def test_hue_error_is_the_circular_distance(turn):
  config = config_of()
  video, state = truth_of(config, videos=12, frames=4)
  hue = state["hue"] + turn
  turned = draw(config, state, colour=worlds.hue_to_rgb(hue))
  metrics = drift.frame_metrics(turned, video, state, config)
  np.testing.assert_allclose(
    metrics["hue_error"], min(turn, 1 - turn), atol=1e-3
  )
  assert metrics["failed"].max() == 0


def test_hue_error_matches_balls_whatever_their_order():
  config = config_of(24, 3.0, balls=2)
  video, state = truth_of(config, frames=8)
  swapped = draw(
    config,
    state,
    colour=state["colour"][:, ::-1],
    position=state["position"][:, :, ::-1],
  )
  metrics = drift.frame_metrics(swapped, video, state, config)
  assert metrics["hue_error"][apart(state["position"]) > 6].max() < 1e-3


def test_flicker_speed_and_psnr_are_what_they_say():
  config = config_of()
  video, state = truth_of(config, frames=20)
  truth = drift.frame_metrics(video, video, state, config)
  assert np.nanmax(truth["speed_error"]) < 0.01
  assert np.isnan(truth["speed_error"][:, 0]).all()

  still = np.repeat(video[:, :1], 20, axis=1)
  frozen = drift.frame_metrics(still, video, state, config)
  known = frozen["speed_error"][np.isfinite(frozen["speed_error"])]
  np.testing.assert_allclose(known, config.speed, atol=0.03)
  assert frozen["failed"].max() == 0

  # A tenth of [0, 1] up and down again, within [-1, 1] all the same.
  state["background"][:] = 0.3
  steps = 0.1 * (np.arange(20) % 2)[None, :, None]
  video = draw(config, state)
  blinking = worlds.render(
    config,
    state["position"],
    state["colour"][:, None],
    state["background"][:, None] + steps,
  )
  metrics = drift.frame_metrics(blinking, video, state, config)
  assert metrics["flicker"][:, 0].max() == 0
  np.testing.assert_allclose(metrics["flicker"][:, 1:], 0.1, atol=1e-5)
  covered = manifold.coverage(config, state["position"][:, :, 0])
  error = np.square(0.2 * (1 - covered)).mean(-1)[:, 1::2]
  np.testing.assert_allclose(
    metrics["psnr"][:, 1::2], 10 * np.log10(4 / error), atol=1e-3
  )


def test_a_model_that_ignores_its_history_is_caught_by_content():
  config = config_of()
  video, state = truth_of(config, videos=16)
  other, _ = truth_of(config, seed=1, videos=16)
  made = np.concatenate([video[:, :4], other[:, 4:]], axis=1)
  summary = drift.summarize(
    drift.frame_metrics(made, video, state, config), given=4
  )
  assert abs(summary["delta_db"]) < 0.3
  assert max(summary["failed"]) == 0
  assert min(summary["background_error"]) > 0.15
  assert min(summary["hue_error"]) > 0.15
  assert summary["psnr_at"]["1"] < 16
  # A redrawn background every frame, on the other hand, flickers.
  frames = np.random.default_rng(0).permuted(other[:, 4:], axis=0)
  made = np.concatenate([video[:, :4], frames], axis=1)
  metrics = drift.frame_metrics(made, video, state, config)
  assert min(drift.summarize(metrics, given=4)["flicker"]) > 0.01


def test_fading_colours_drift():
  config = config_of()
  video, state = truth_of(config, videos=8, frames=44)
  empty = empty_of(config, state)
  strength = np.clip(1 - (np.arange(44) - 3) / 40, 0, 1)
  fading = empty + strength[:, None, None, None] * (video - empty)
  metrics = drift.frame_metrics(fading, video, state, config)
  summary = drift.summarize(metrics, given=4)
  assert summary["delta_db"] > 3
  for key in ("off_manifold", "failed"):
    assert summary[key] == sorted(summary[key])
  assert summary["failed"][0] == 0
  assert summary["failed"][2] == 1


def test_not_a_number_is_the_worst_of_every_metric():
  config = config_of()
  video, state = truth_of(config, frames=6)
  broken = video.copy()
  broken[0, 3, 5, 5, 1] = np.nan
  broken[1, 4] = np.inf
  broken[2, 5] = 1e30
  metrics = drift.frame_metrics(broken, video, state, config)
  for place in ((0, 3), (1, 4)):
    assert metrics["off_manifold"][place] == 4
    assert metrics["failed"][place] == 1
    assert metrics["psnr"][place] == 0
  assert metrics["failed"][2, 5] == 1
  assert metrics["failed"].sum() == 3
  json.dumps(drift.summarize(metrics, given=1), allow_nan=False)


def test_shapes_that_do_not_belong_together_are_refused():
  config = config_of()
  video, state = truth_of(config, frames=6)
  with pytest.raises(UserError, match="its world draws"):
    drift.frame_metrics(video[:, :, :8], video, state, config)
  with pytest.raises(UserError, match="differ in shape"):
    drift.frame_metrics(video[:, :4], video, state, config)
  with pytest.raises(UserError, match="4 balls"):
    drift.frame_metrics(video, video, state, config_of(balls=5))
  metrics = drift.frame_metrics(video, video, state, config)
  with pytest.raises(UserError, match="3 or more"):
    drift.summarize(metrics, given=4)


def fake_metrics(frames=34, videos=5, **changed):
  shape = (videos, frames)
  names = ("broken", "object_share", "failed", "background_error", "hue_error")
  metrics = {name: np.zeros(shape) for name in (*names, "flicker")}
  metrics |= {"off_manifold": np.full(shape, 0.01), "psnr": np.zeros(shape)}
  return metrics | changed


def test_summary_has_exactly_the_schema():
  ramp = np.tile(np.arange(34.0) - 4, (5, 1))
  quality = np.full((5, 34), 4e-2)
  quality[:, 4:10] = 4e-4
  metrics = fake_metrics(psnr=ramp, hue_error=ramp, off_manifold=quality - 1e-5)
  summary = drift.summarize(metrics, given=4)
  numbers = {"delta_db", "psnr_at", "seeds"}
  thirds = {"off_manifold", "broken", "object_share", "failed", "flicker"}
  thirds |= {"background_error", "hue_error"}
  assert set(summary) == numbers | thirds
  assert all(len(summary[key]) == 3 for key in thirds)
  # Frame 1 is the first that was generated; given frames never count.
  assert summary["psnr_at"] == {"1": 0.0, "2": 1.0, "4": 3.0, "8": 7.0}
  assert summary["hue_error"] == [4.5, 14.5, 24.5]
  assert summary["seeds"] == 1
  # 40 dB in the first fifth and 20 dB after: 40 - (6 * 40 + 24 * 20) / 30.
  assert summary["delta_db"] == pytest.approx(16)
  assert json.loads(json.dumps(summary)) == summary


def test_short_rollout_has_no_late_psnr():
  summary = drift.summarize(fake_metrics(frames=8), given=4)
  assert summary["psnr_at"] == {"1": 0.0, "2": 0.0, "4": 0.0, "8": None}
  merged = drift.aggregate([summary, summary])
  assert merged["psnr_at"]["8"] is None


def test_aggregate_gives_means_and_ranges():
  one = drift.summarize(fake_metrics(), given=4)
  failed = np.ones((5, 34))
  two = drift.summarize(fake_metrics(failed=failed), given=4)
  merged = drift.aggregate([one, two])
  assert set(merged) == {*one, "range"}
  assert set(merged["range"]) == set(one) - {"seeds"}
  assert merged["seeds"] == 2
  assert merged["failed"] == [0.5, 0.5, 0.5]
  assert merged["range"]["failed"] == [[0, 1]] * 3
  assert merged["range"]["psnr_at"]["1"] == [0, 0]
  json.dumps(merged, allow_nan=False)


def test_curves_band_is_of_videos_or_of_seeds():
  high = fake_metrics(failed=np.ones((5, 34)))
  videos = drift.curves([fake_metrics(psnr=np.eye(5, 34))])
  assert "5 videos" in videos["psnr"].spread
  assert videos["psnr"].low[0] < videos["psnr"].mean[0] == 0.2
  seeds = drift.curves([fake_metrics(), high])["failed"]
  assert "2 seeds" in seeds.spread
  assert (seeds.low[3], seeds.mean[3], seeds.high[3]) == (0, 0.5, 1)
  np.testing.assert_allclose(
    videos["manifold_psnr"].mean, 10 * np.log10(4 / 0.01001)
  )


def test_hue_is_the_inverse_of_the_worlds():
  hue = np.linspace(0, 1, 61)[:-1]
  np.testing.assert_allclose(
    objects.hue_of(worlds.hue_to_rgb(hue)), hue, atol=1e-12
  )


def test_real_video_metrics():
  rng = np.random.default_rng(0)
  still = rng.uniform(-1, 1, (2, 1, 16, 16, 3)).astype(np.float32)
  video = np.repeat(still, 12, axis=1)
  same = drift.frame_metrics_real(video, video)
  for name in ("sharpness", "saturation", "contrast"):
    np.testing.assert_allclose(same[name], 1, rtol=1e-4)
  assert same["psnr"].min() > 60
  assert np.abs(same["brightness"]).max() < 1e-6
  assert same["flicker"].max() == 0

  late = video.copy()
  late[:, 8:] = late[:, 8:].mean(-1, keepdims=True)
  grey = drift.frame_metrics_real(late)
  assert "psnr" not in grey
  assert grey["saturation"][:, 8:].max() < 1e-3
  assert grey["flicker"][:, 8].min() > 0.1

  late = video.copy()
  late[:, 8:] = 0.5 * late[:, 8:] - 0.5
  dim = drift.frame_metrics_real(late, video)
  np.testing.assert_allclose(dim["contrast"][:, 8:], 0.5, rtol=1e-3)
  assert dim["brightness"][:, 8:].max() < -0.2
  summary = drift.summarize_real(dim, given=2)
  assert summary["delta"]["contrast"] > 0.1
  assert summary["psnr_at"]["1"] > 60
  assert summary["contrast"][2] == pytest.approx(0.5, rel=0.02)

  late[:, 9] = np.nan
  assert np.isfinite(drift.frame_metrics_real(late)["sharpness"]).all()
  with pytest.raises(UserError, match="differ in shape"):
    drift.frame_metrics_real(video, video[:, 1:])


def test_it_is_fast():
  # A quarter of the usual 64 videos, in .3 s of a core; the bound is for slow
  # ones.
  config = config_of()
  video, state = truth_of(config, videos=16, frames=84)
  start = time.process_time()
  drift.frame_metrics(video, video, state, config)
  assert time.process_time() - start < 2
