"""The store: what goes in comes out, each trajectory once, or it says why."""

import dataclasses
import itertools
import json
import pickle

import numpy as np
import pytest

from avd_jax.data import aggregate, pipeline
from avd_jax.errors import UserError

SPEC = aggregate.Spec("pixels", (6, 4, 4, 3), chunk_frames=2)


def trajectory(clip, round=1):
  """A video whose values say the clip and the frame."""
  video = np.zeros(SPEC.shape, np.float32)
  video[..., 0] = clip
  video[..., 1] = round
  video[..., 2] = np.arange(6)[:, None, None]
  return video


def add_round(path, round, clips, finish=True):
  """Writes a round in shards of two."""
  aggregate.claim(path, SPEC)
  files = []
  for batch, start in enumerate(range(0, len(clips), 2)):
    files.append(aggregate.shard(path, round, batch))
    records = [
      aggregate.pack(
        trajectory(clip, round), {"clip": clip, "caption": f"clip {clip}"}
      )
      for clip in clips[start : start + 2]
    ]
    aggregate.write_shard(files[-1], records)
  if finish:
    aggregate.finish_round(path, round, files, clips)
  return files


@pytest.fixture
def store(tmp_path):
  """Two rounds of three trajectories."""
  add_round(tmp_path, 1, [4, 0, 7])
  add_round(tmp_path, 2, [2, 4, 9])
  return tmp_path


def test_a_record_comes_back_with_all_its_bits():
  rng = np.random.default_rng(0)
  for dtype in ("float32", "float16"):
    video = rng.normal(size=SPEC.shape).astype(dtype)
    header = {"caption": "Grüße \n", "round": 3, "error": [0.5, 1.0]}
    record = aggregate.pack(video[:, ::-1], header)
    found, known = aggregate.unpack(record)
    np.testing.assert_array_equal(found, video[:, ::-1])
    assert found.dtype == video.dtype
    assert known == header | {"shape": list(SPEC.shape), "dtype": dtype}


def test_the_format_is_what_the_documentation_says(store):
  """Read by hand: a length, JSON, little-endian floats."""
  record = aggregate.pack(trajectory(4), {"caption": "clip 4"})
  length = int.from_bytes(record[:4], "little")
  header = json.loads(record[4 : 4 + length].decode())
  values = np.frombuffer(record[4 + length :], "<f4").reshape(header["shape"])
  np.testing.assert_array_equal(values, trajectory(4))


def test_readers_see_each_trajectory_of_their_rounds_once(store):
  both = aggregate.Aggregate(store, 2)
  found = [(both[i]["video"][0, 0, 0, :2]).tolist() for i in range(len(both))]
  assert found == [[4, 1], [0, 1], [7, 1], [2, 2], [4, 2], [9, 2]]
  assert both[1]["caption"] == "clip 0"
  assert both.header(5)["clip"] == 9
  first = aggregate.Aggregate(store, 1)
  before = [first[i]["video"].tobytes() for i in range(len(first))]
  add_round(store, 3, [1])
  again = aggregate.Aggregate(store, 1)
  assert [again[i]["video"].tobytes() for i in range(len(again))] == before


def test_clips_are_windows_of_whole_chunks(store):
  source = aggregate.Aggregate(store, 1, frames=4, given=1)
  rng = np.random.default_rng(0)
  starts = []
  for _ in range(40):
    record = source.clip(2, rng)
    assert record["video"].dtype == np.float32
    assert record["given"] == 1
    frames = record["video"][:, 0, 0, 2]
    np.testing.assert_array_equal(np.diff(frames), 1)
    starts.append(int(frames[0]))
  # Of six frames in chunks of two: from the first or from the second chunk.
  assert set(starts) == {0, 2}
  assert 10 < starts.count(0) < 30
  # The fixed clip is the one that ends in real frames.
  assert source[2]["video"][:, 0, 0, 2].tolist() == [2, 3, 4, 5]


def test_a_source_can_be_handed_to_workers(store):
  source = aggregate.Aggregate(store, 2, 4, 1)
  source[0]
  other = pickle.loads(pickle.dumps(source))
  for i in range(6):
    np.testing.assert_array_equal(other[i]["video"], source[i]["video"])


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"codec": "vae"}, "codec 'pixels', not 'vae'"),
    ({"shape": (6, 8, 8, 3)}, r"shape \(6, 4, 4, 3\), not \(6, 8, 8, 3\)"),
    ({"chunk_frames": 3}, "chunk_frames 2, not 3"),
    ({"dtype": "float16"}, "dtype 'float32', not 'float16'"),
  ],
)
def test_a_store_takes_one_kind_of_trajectories(store, change, says):
  aggregate.claim(store, SPEC)
  before = sorted(f.read_bytes() for f in store.iterdir())
  with pytest.raises(UserError, match=f"was begun with {says}"):
    aggregate.claim(store, dataclasses.replace(SPEC, **change))
  assert sorted(f.read_bytes() for f in store.iterdir()) == before


def test_a_shard_is_there_whole_or_not_at_all(tmp_path):
  aggregate.claim(tmp_path, SPEC)
  file = aggregate.shard(tmp_path, 1, 0)

  def torn():
    yield aggregate.pack(trajectory(1), {"clip": 1})
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    aggregate.write_shard(file, torn())
  assert not aggregate.is_whole(file, 2)
  assert not file.exists()
  assert add_round(tmp_path, 1, [1, 2])[0] == file
  assert aggregate.is_whole(file, 2)
  assert not aggregate.is_whole(file, 1)
  content = file.read_bytes()
  for left in (0, 10, len(content) // 2, len(content) - 1):
    file.write_bytes(content[:left])
    assert not aggregate.is_whole(file, 2)


def test_an_unfinished_round_is_not_read(store):
  add_round(store, 3, [1, 2, 3], finish=False)
  assert len(aggregate.Aggregate(store, 2)) == 6
  with pytest.raises(UserError, match="round 3 is not in the store"):
    aggregate.Aggregate(store, 3)


@pytest.mark.parametrize("clips", [[1, 2], [1, 2, 3, 3], [1, 2, 4]])
def test_a_round_with_other_trajectories_is_not_finished(tmp_path, clips):
  files = add_round(tmp_path, 1, clips, finish=False)
  with pytest.raises(UserError, match="do not hold every source clip"):
    aggregate.finish_round(tmp_path, 1, files, [1, 2, 3])
  assert not aggregate.is_finished(tmp_path, 1)


def test_damage_and_loss_are_named(store):
  file = aggregate.shard(store, 1, 1)
  content = file.read_bytes()
  file.write_bytes(content[:-1])
  with pytest.raises(UserError, match=f"{file.name} of round 1 is damaged"):
    aggregate.Aggregate(store, 2)
  file.unlink()
  with pytest.raises(UserError, match=f"{file.name} of round 1 is gone"):
    aggregate.Aggregate(store, 2)
  file.write_bytes(content)
  aggregate.Aggregate(store, 2)
  (store / "store.json").write_text("{}")
  with pytest.raises(UserError, match="does not describe trajectories"):
    aggregate.Aggregate(store, 2)
  with pytest.raises(UserError, match="no store of trajectories"):
    aggregate.Aggregate(store / "nowhere", 2)


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    ((0,), "0 rounds"),
    ((2, 8), "clips of 8 frames cannot be cut"),
    ((2, 3), "clips of 3 frames cannot be cut"),
    ((2, 4, 2), "prefix of 2 chunks leaves nothing"),
  ],
)
def test_impossible_clips_are_refused(store, arguments, says):
  with pytest.raises(UserError, match=says):
    aggregate.Aggregate(store, *arguments)


def config(store, **changes):
  values = dict(
    frames=4,
    height=4,
    width=4,
    radius=1.0,
    batch_size=4,
    num_videos=5,
    aggregate=str(store),
    aggregate_rounds=2,
    aggregate_prefix=1,
  )
  return pipeline.DataConfig(**(values | changes))


def first(cfg, count, start=0, *share):
  source = pipeline.make_source(cfg)
  batches = pipeline.batches(cfg, source, start, *share)
  out = list(itertools.islice(batches, count))
  batches.close()
  return out


def test_an_epoch_holds_every_video_and_every_trajectory_once(store):
  """11 records, batches of 4: 11 batches are 4 epochs."""
  batches = first(config(store), 11)
  given = np.concatenate([b.given for b in batches])
  x = np.concatenate([b.x for b in batches])
  assert given.dtype == np.int32
  seeds = pipeline.make_source(config(store, aggregate=""))
  seeds = {seeds[i]["video"].tobytes(): i for i in range(5)}
  for epoch in range(4):
    rows = slice(11 * epoch, 11 * (epoch + 1))
    drawn, made = [], []
    for video, prefix in zip(x[rows], given[rows], strict=True):
      if video.tobytes() in seeds:
        drawn.append(seeds[video.tobytes()])
        assert prefix == 0
      else:
        made.append(tuple(video[0, 0, 0, :2].astype(int).tolist()))
        assert prefix == 1
    assert sorted(drawn) == list(range(5))
    assert sorted(made) == [(0, 1), (2, 2), (4, 1), (4, 2), (7, 1), (9, 2)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mixture_resumes_and_is_shared_exactly(store, workers):
  cfg = config(store, num_workers=workers)
  whole = first(config(store), 6)
  for step, batch in enumerate(first(cfg, 3, 3)):
    for found, wanted in zip(batch, whole[3 + step], strict=True):
      np.testing.assert_array_equal(found, wanted)
  halves = [first(config(store), 1, 2, i, 2)[0] for i in range(2)]
  for field in range(3):
    together = np.concatenate([half[field] for half in halves])
    np.testing.assert_array_equal(together, whole[2][field])


def test_evaluation_sees_no_trajectory(store):
  source = pipeline.make_source(config(store), "eval")
  assert len(source) == 5
  batch, state = pipeline.fixed_batch(config(store), source, [0, 1])
  assert state is not None
  np.testing.assert_array_equal(batch.given, [0, 0])


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"height": 8, "width": 8}, r"shape \(4, 4, 4, 3\), but .* \(4, 8, 8, 3\)"),
    ({"frames": 8}, "clips of 8 frames cannot be cut"),
    ({"aggregate_rounds": 3}, "round 3 is not in the store"),
    ({"aggregate_rounds": 0}, "0 rounds"),
    ({"aggregate_prefix": 2}, "prefix of 2"),
  ],
)
def test_a_training_that_does_not_fit_the_store_is_refused(
  store, changes, says
):
  with pytest.raises(UserError, match=says):
    pipeline.make_source(config(store, **changes))
