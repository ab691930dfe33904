"""Worlds: what is drawn, where it is, and that nothing else decides it."""

import colorsys
import dataclasses

import numpy as np
import pytest

from avd_jax.data import captions, worlds
from avd_jax.errors import UserError

CONFIGS = [
  worlds.WorldConfig(),
  worlds.WorldConfig(height=16, width=24, num_balls=3, radius=2.5, speed=3.0),
]


def reflect(start, velocity, low, high, frames):
  """Walks a point through a room, turning it round at each wall it meets."""
  position, velocity, path = start, velocity, [start]
  for _ in range(frames - 1):
    position = position + velocity
    while not low <= position <= high:
      wall = high if position > high else low
      position, velocity = 2 * wall - position, -velocity
    path.append(position)
  return np.array(path)


@pytest.mark.parametrize("config", CONFIGS)
def test_bounce_is_step_by_step_reflection(config):
  record = worlds.World(config, seed=1, num_videos=3, frames=200)[2]
  state = record["state"]
  for ball in range(config.num_balls):
    for axis, size in enumerate((config.height, config.width)):
      path = reflect(
        float(state["position"][0, ball, axis]),
        float(state["velocity"][ball, axis]),
        config.radius,
        size - config.radius,
        200,
      )
      np.testing.assert_allclose(
        state["position"][:, ball, axis], path, atol=2e-4
      )


def test_bounce_is_exact_far_away_and_backwards():
  start, velocity = np.array(2.5), np.array(1.25)
  late = worlds.bounce(start, velocity, np.array(1e6), 2.0, 10.0)
  assert late == reflect(2.5, 1.25, 2.0, 10.0, int(1e6 % 64) + 1)[-1]
  back = worlds.bounce(start, velocity, np.array(-1.0), 2.0, 10.0)
  assert back == 2.75


@pytest.mark.parametrize("config", CONFIGS)
def test_balls_stay_inside_at_their_speed(config):
  for index in range(20):
    state = worlds.World(config, 0, 20, 300)[index]["state"]
    low = np.full(2, config.radius)
    high = np.array([config.height, config.width]) - config.radius
    assert (state["position"] >= low - 1e-5).all()
    assert (state["position"] <= high + 1e-5).all()
    np.testing.assert_allclose(
      np.linalg.norm(state["velocity"], axis=-1), config.speed, rtol=1e-5
    )
    step = np.linalg.norm(np.diff(state["position"], axis=0), axis=-1)
    assert (step <= config.speed + 1e-4).all()
    assert np.median(step) > 0.9 * config.speed


def test_a_video_is_a_function_of_seed_and_index():
  config = worlds.WorldConfig(num_balls=2)
  world = worlds.World(config, seed=7, num_videos=100, frames=8)
  again = worlds.World(config, seed=7, num_videos=5, frames=20)
  first, other = world[3], again[3]
  assert first["video"].shape == (8, 12, 12, 3)
  assert first["video"].dtype == np.float32
  np.testing.assert_array_equal(first["video"], other["video"][:8])
  assert first["caption"] == other["caption"]
  videos = {
    worlds.World(config, seed, 50, 2)[i]["video"].tobytes()
    for seed in range(4)
    for i in range(50)
  }
  assert len(videos) == 200


def test_eval_stream_shares_no_video_with_training():
  # Seeds and indices small enough that streams mixed up by numpy's padding of
  # seed sequences, (s, 1) and (s, 1, 0), would meet.
  config = worlds.WorldConfig()
  videos = [
    worlds.World(config, seed, 60, 1, stream)[i]["video"].tobytes()
    for stream in (worlds.TRAIN, worlds.EVAL)
    for seed in range(3)
    for i in range(60)
  ]
  assert len(set(videos)) == len(videos)


def test_a_ball_covers_its_area_at_its_place():
  config = worlds.WorldConfig(height=20, width=30, radius=4.0)
  white, black = np.ones((1, 3)), np.zeros(3)
  centre = np.array([[8.25, 17.5]])
  frame = worlds.render(config, centre, white, black)
  assert frame.shape == (20, 30, 3)
  assert frame.dtype == np.float32
  share = (frame[..., 0] + 1) / 2
  assert share.sum() == pytest.approx(np.pi * 4.0**2, rel=0.02)
  rows, columns = np.mgrid[:20, :30] + 0.5
  assert (share * rows).sum() / share.sum() == pytest.approx(8.25, abs=0.05)
  assert (share * columns).sum() / share.sum() == pytest.approx(17.5, abs=0.05)


def test_render_covers_exactly_and_later_balls_lie_in_front():
  config = worlds.WorldConfig(height=16, width=16, num_balls=2, radius=3.0)
  red, blue = [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]
  background = np.array([0.2, 0.3, 0.4], np.float32)
  same = np.array([[8.0, 8.0], [8.0, 8.0]])
  frame = worlds.render(config, same, np.array([red, blue]), background)
  np.testing.assert_array_equal(frame[8, 8], [-1, -1, 1])
  np.testing.assert_array_equal(frame[0, 0], background * 2 - 1)
  assert frame.min() >= -1
  assert frame.max() <= 1


def test_render_takes_any_leading_dimensions():
  config = CONFIGS[1]
  rng = np.random.default_rng(0)
  position = rng.uniform(3, 13, (2, 5, 3, 2))
  colour, background = rng.random((2, 1, 3, 3)), rng.random((2, 1, 3))
  video = worlds.render(config, position, colour, background)
  assert video.shape == (2, 5, 16, 24, 3)
  one = worlds.render(config, position[1, 4], colour[1, 0], background[1, 0])
  np.testing.assert_array_equal(video[1, 4], one)


def test_colours_are_saturated_and_persist():
  config = worlds.WorldConfig(background_low=0.2, background_high=0.3)
  backgrounds = []
  for index in range(30):
    record = worlds.World(config, 0, 30, 10)[index]
    state = record["state"]
    expected = colorsys.hsv_to_rgb(float(state["hue"][0]), 1, 1)
    np.testing.assert_allclose(state["colour"][0], expected, atol=1e-5)
    assert (state["background"] >= 0.2).all()
    assert (state["background"] <= 0.3).all()
    # A corner is never reached by more than a ball's rim: most frames show it.
    corner = np.median(record["video"][:, 0, 0], axis=0)
    np.testing.assert_allclose(corner, state["background"] * 2 - 1, atol=1e-6)
    backgrounds.append(state["background"])
  assert np.std(backgrounds, axis=0).min() > 0.01


def test_captions_count_or_name_colours():
  assert worlds.World(worlds.WorldConfig(), 0, 9, 1)[4]["caption"] == (
    "one ball on a dark background"
  )
  config = worlds.WorldConfig(num_balls=2, caption_detail="colour")
  seen = set()
  for index in range(200):
    record = worlds.World(config, 0, 200, 1)[index]
    caption = record["caption"]
    names = [worlds.colour_name(c) for c in record["state"]["colour"]]
    assert caption.startswith(f"a {names[0]} ball and a {names[1]} ball, ")
    assert len(caption) <= len(worlds.longest_caption(config))
    seen.update(names)
  assert seen == {"red", "yellow", "green", "cyan", "blue", "magenta"}


@pytest.mark.parametrize(
  ("rgb", "name"),
  [
    ([1, 0, 0], "red"),
    ([1, 0, 0.1], "red"),
    ([0.5, 0.5, 0.1], "yellow"),
    ([0.1, 0.2, 0.4], "blue"),
    ([0.3, 0.3, 0.32], "grey"),
  ],
)
def test_colour_names(rgb, name):
  assert worlds.colour_name(np.array(rgb, np.float32)) == name


@pytest.mark.parametrize(
  "change",
  [
    {"num_balls": 0},
    {"radius": 6.0},
    {"radius": 0.0},
    {"background_low": 0.6},
    {"background_high": 1.1},
    {"speed": -1.0},
    {"caption_detail": "all"},
  ],
)
def test_impossible_worlds_are_refused_by_name(change):
  with pytest.raises(UserError, match=next(iter(change))):
    dataclasses.replace(worlds.WorldConfig(), **change)


def test_source_refuses_what_it_does_not_have():
  world = worlds.World(worlds.WorldConfig(), 0, 3, 1)
  assert len(world) == 3
  with pytest.raises(IndexError, match="3 of 3"):
    world[3]
  with pytest.raises(UserError, match="seed=-1"):
    worlds.World(worlds.WorldConfig(), -1, 3, 1)
  with pytest.raises(UserError, match="frames=0"):
    worlds.World(worlds.WorldConfig(), 0, 3, 0)


def test_bytes_round_trip_and_pad_with_zero():
  caption = "a ball, ein Bällchen, 球\x00"
  tokens = captions.encode_bytes(caption, 40)
  assert tokens.shape == (40,)
  assert tokens.dtype == np.int32
  assert tokens.max() < captions.VOCABULARY
  size = len(caption.encode())
  assert (tokens[:size] > 0).all()
  assert (tokens[size:] == 0).all()
  assert captions.decode_bytes(tokens) == caption
  np.testing.assert_array_equal(captions.encode_bytes("A", 2), [66, 0])
  assert captions.encode_bytes("é" * 4, 8).min() > 0


def test_a_long_caption_is_refused_with_both_lengths():
  with pytest.raises(UserError, match=r"9 bytes .* text_length=8"):
    captions.encode_bytes("123456789", 8)
