"""Scenes: that each obeys its law, and nothing but its index decides it."""

import dataclasses

import numpy as np
import pytest

from avd_jax.data import captions, drawing, pipeline, scenes, worlds
from avd_jax.errors import UserError

SCENES = tuple(scenes.SCENES)


def config_of(kind, **changes):
  size = {"height": 16, "width": 16, "radius": 2.0}
  return worlds.WorldConfig(kind=kind, **(size | changes))


def videos_of(config, count=20, frames=60, seed=0, stream=worlds.TRAIN):
  world = worlds.World(config, seed, count, frames, stream)
  return [world[i] for i in range(count)]


def test_every_kind_but_balls_is_a_scene():
  assert ("balls", *scenes.SCENES) == drawing.KINDS


def test_balls_are_drawn_as_ever():
  # Their numbers, in their order: reports of earlier runs depend on it.
  config = worlds.WorldConfig(num_balls=2)
  record = worlds.World(config, 7, 5, 6, worlds.EVAL)[3]
  draw = np.random.default_rng((7, 3, worlds.EVAL)).random(11)
  np.testing.assert_array_equal(
    record["state"]["position"][0].ravel(), np.float32(2 + draw[:4] * 8)
  )
  angle = 2 * np.pi * draw[4:6]
  velocity = 1.25 * np.stack([np.sin(angle), np.cos(angle)], -1)
  np.testing.assert_array_equal(
    record["state"]["velocity"], np.float32(velocity)
  )
  np.testing.assert_array_equal(record["state"]["hue"], np.float32(draw[6:8]))
  np.testing.assert_array_equal(
    record["state"]["background"], np.float32(0.1 + draw[8:] * (0.5 - 0.1))
  )


@pytest.mark.parametrize("kind", SCENES)
def test_a_video_is_a_function_of_seed_stream_and_index(kind):
  config = config_of(kind)
  short = worlds.World(config, 3, 40, 8)
  long = worlds.World(config, 3, 9, 30)
  first, other = short[5], long[5]
  assert first["video"].shape == (8, 16, 16, 3)
  assert first["video"].dtype == np.float32
  np.testing.assert_array_equal(first["video"], other["video"][:8])
  assert first["caption"] == other["caption"]
  for value in first["state"].values():
    assert value.dtype == np.float32
  videos = [
    worlds.World(config, seed, 20, 1, stream)[i]["video"].tobytes()
    for seed in range(2)
    for stream in (worlds.TRAIN, worlds.EVAL)
    for i in range(20)
  ]
  assert len(set(videos)) == len(videos)


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (12, 20)])
@pytest.mark.parametrize("kind", SCENES)
def test_layers_share_out_every_pixel(kind, size):
  config = config_of(kind, height=size[0], width=size[1], radius=1.6)
  scene = scenes.SCENES[kind]
  low, high = scene.limits(config)
  for record in videos_of(config, 6, 40):
    state = record["state"]
    geometry = scene.geometry(state)
    assert (geometry >= low - 1e-4).all()
    assert (geometry <= high + 1e-4).all()
    layers = scene.layers(config, geometry)
    assert layers.shape == (40, len(scene.paints), *size)
    assert layers.min() >= -1e-6
    np.testing.assert_allclose(layers.sum(1), 1, atol=1e-6)
    assert scenes.colours(kind, state).shape == (len(scene.paints), 3)
    assert (state["background"] >= 0.1).all()
    assert (state["background"] <= 0.5).all()
    assert np.abs(record["video"]).max() <= 1 + 1e-6


@pytest.mark.parametrize("kind", SCENES)
def test_background_and_hues_vary_and_last(kind):
  records = videos_of(config_of(kind), 30, 2)
  for key in ("background", "hue"):
    values = np.stack([r["state"][key] for r in records])
    assert np.std(values, axis=0).min() > 0.05
  state = records[0]["state"]
  np.testing.assert_allclose(
    state["colour"], worlds.hue_to_rgb(state["hue"]), atol=1e-5
  )


def test_what_the_camera_leaves_is_there_when_it_returns():
  # A pixel a frame: every frame is the one before, moved by a column.
  for record in videos_of(config_of("pan", speed=1.0), 8):
    video, camera = record["video"], record["state"]["camera"]
    for f in range(59):
      step = camera[f + 1] - camera[f]
      if step == pytest.approx(1, abs=1e-5):
        ours, theirs = video[f, :, 1:], video[f + 1, :, :-1]
      elif step == pytest.approx(-1, abs=1e-5):
        ours, theirs = video[f, :, :-1], video[f + 1, :, 1:]
      else:
        continue
      np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.ptp(camera) > 14
    assert {np.sign(s) for s in np.diff(camera)} >= {1.0, -1.0}
    # 32 frames away and back: the same again.
    np.testing.assert_allclose(video[0], video[32], atol=1e-4)


def test_ball_hides_behind_the_bar_and_keeps_its_speed():
  config = config_of("occluder")
  left, right = scenes.bar_edges(config)
  assert (left, right) == (5, 11)
  for record in videos_of(config):
    video, state = record["video"], record["state"]
    bar = np.broadcast_to(2 * state["bar"] - 1, (60, 16, 6, 3))
    np.testing.assert_allclose(video[:, :, 5:11], bar, atol=1e-6)
    away = np.abs(video - (2 * state["background"] - 1)).max(-1) > 0.2
    away[:, :, 5:11] = False
    area = away.sum((1, 2))
    assert area.min() == 0
    assert area.max() >= 12
    step = np.linalg.norm(np.diff(state["position"][:, 0], axis=0), axis=-1)
    np.testing.assert_allclose(np.median(step), config.speed, rtol=1e-4)
    assert np.linalg.norm(state["velocity"]) == pytest.approx(1.25)
    assert abs(state["velocity"][0, 1]) >= 0.86 * config.speed


def test_glass_fills_and_stays_full():
  config = config_of("pour")
  begins = {"before": 0, "during": 0, "full": 0}
  for record in videos_of(config, 200, 84):
    level, stream = record["state"]["level"], record["state"]["stream"]
    full = level == 10
    assert level.min() >= 0
    assert level.max() <= 10
    assert (np.diff(level) >= 0).all()
    # The stream falls while the level rises; it may begin between two frames.
    rises = np.diff(level) > 0
    assert rises[stream[:-1] == 1].all()
    assert 0 <= rises.sum() - stream.sum() <= 1
    assert full[-1]
    steady = np.diff(level)[1:-1][rises[2:] & rises[:-2]]
    np.testing.assert_allclose(steady, record["state"]["rate"], atol=1e-4)
    assert stream[2] or level[2] > 0
    start = "full" if full[0] else "during" if stream[0] else "before"
    begins[start] += 1
  assert min(begins.values()) >= 6
  assert begins["during"] > 100


def test_level_is_what_is_seen():
  config = config_of("pour")
  layers = scenes.SCENES["pour"].layers(
    config, np.array([[0.0, 0], [3.5, 0], [10, 0], [3.5, 1]])
  )
  liquid = layers[:, 2].sum((1, 2))
  # Ten columns wide; the stream is two, from the top to the surface.
  np.testing.assert_allclose(liquid, [0, 35, 100, 35 + 2 * 11.5], atol=1e-5)


def test_ink_spreads_as_the_root_of_time_and_stays_ink():
  config = config_of("ink")
  fresh, dry = scenes.SCENES["ink"].widths(config)
  assert fresh == 2
  grown, whole = 0, []
  for record in videos_of(config, 60, 84):
    width = record["state"]["width"].astype(np.float64)
    assert (np.diff(width) >= 0).all()
    wet = (width > fresh) & (width < dry)
    variance = np.diff(np.square(width))[wet[1:] & wet[:-1]]
    np.testing.assert_allclose(variance, record["state"]["rate"], atol=1e-4)
    assert width[-1] == pytest.approx(dry)
    grown += width[0] < fresh + 0.2
    layers = scenes.SCENES["ink"].layers(
      config, scenes.SCENES["ink"].geometry(record["state"])
    )
    amount = layers[:, 1].sum((1, 2))
    whole.append(amount / amount.max())
  assert grown > 3
  # What is missing is beyond the frame.
  assert np.min(whole) > 0.92


def fly(position, velocity, pull, size, radius, frames):
  """Walks a falling ball through a thousand moments a frame."""
  parts = 1000
  y, x, down, across = *position, *velocity
  path = []
  for _ in range(frames):
    path.append((y, x))
    for _ in range(parts):
      down += pull / parts / 2
      y, x = y + down / parts, x + across / parts
      down += pull / parts / 2
      if y > size - radius:
        y, down = 2 * (size - radius) - y, -down
      if not radius <= x <= size - radius:
        wall = radius if x < radius else size - radius
        x, across = 2 * wall - x, -across
  return np.array(path)


def test_ball_falls_as_it_would_step_by_step():
  config = config_of("fall")
  pull = scenes.gravity(config)
  for record in videos_of(config, 3, 50):
    state = record["state"]
    position, velocity = state["position"][:, 0], state["velocity"][:, 0]
    start = position[0].astype(float), velocity[0].astype(float)
    path = fly(*start, pull, 16, 2.0, 50)
    np.testing.assert_allclose(position, path, atol=0.02)


def test_energy_of_a_falling_ball_stays():
  config = config_of("fall")
  for record in videos_of(config, 40):
    state = record["state"]
    position, velocity = state["position"][:, 0], state["velocity"][:, 0]
    height = 14 - position[:, 0]
    energy = scenes.gravity(config) * height + np.square(velocity).sum(1) / 2
    np.testing.assert_allclose(energy, state["energy"], rtol=1e-4)
    assert height.min() >= -1e-5
    assert 5.5 < height.max() <= 12 + 1e-5


def test_captions_say_what_is_seen():
  seen = set()
  for kind in SCENES:
    for detail in ("count", "colour"):
      config = config_of(kind, caption_detail=detail)
      longest = worlds.longest_caption(config)
      for record in videos_of(config, 100, 1):
        caption = record["caption"]
        assert len(caption) <= len(longest)
        assert scenes.SCENES[kind].sentence.split("{}")[-1] in caption
        name = worlds.colour_name(record["state"]["colour"][0])
        coloured = detail == "colour" and kind != "pan"
        assert (name in caption.split(",")[0]) == coloured
        seen.add(caption)
  assert "a glass fills with liquid on a dark background" in seen
  assert "a drop of red ink spreads, dark blue background" in seen


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"kind": "bals"}, r"kind='bals'.*'balls', 'pan', .*'fall'"),
    ({"kind": "fall", "num_balls": 2}, "num_balls=2"),
    ({"kind": "pour", "speed": 0.0}, "speed=0"),
    ({"kind": "pan", "width": 10}, "width=10"),
    ({"kind": "occluder", "radius": 3.0}, r"radius=3\.0.*2\.33"),
    ({"kind": "ink", "radius": 3.0}, r"radius=3\.0.*2\.46"),
  ],
)
def test_impossible_scenes_are_refused_by_name(change, message):
  with pytest.raises(UserError, match=message):
    config_of(**({"kind": "balls"} | change))


@pytest.mark.parametrize("kind", SCENES)
def test_pipeline_reads_a_scene(kind):
  cfg = pipeline.DataConfig(
    kind=kind, height=16, width=16, frames=5, batch_size=4, radius=1.5
  )
  assert cfg.world == config_of(kind, radius=1.5)
  source = pipeline.make_source(cfg, "eval")
  batch, state = pipeline.fixed_batch(cfg, source, range(3))
  assert batch.x.shape == (3, 5, 16, 16, 3)
  assert state["hue"].shape[0] == 3
  assert captions.decode_bytes(batch.text[0]) == source[0]["caption"]
  with pytest.raises(UserError, match="text_length=9"):
    pipeline.make_source(dataclasses.replace(cfg, text_length=9))
