"""Batches: resumable at any step, the same however the work is shared."""

import dataclasses
import itertools
import logging
import multiprocessing

import numpy as np
import pytest

from avd_jax.data import captions, pipeline, video, worlds
from avd_jax.errors import UserError
from avd_jax.typing import Batch

# 23 videos, so that an epoch ends within a batch and clips come up again.
WORLDS = pipeline.DataConfig(
  batch_size=8, frames=3, num_videos=23, text_length=32, seed=5
)


class Draws:
  """Records that show which record and which draw of its clip they are."""

  def __init__(self, length=23):
    self.length = length

  def __len__(self):
    return self.length

  def __getitem__(self, index):
    return self.clip(index, np.random.default_rng(index))

  def clip(self, index, rng):
    video = np.array([index, rng.random()])
    return {"video": video, "caption": "", "given": index % 3}


def first(iterator, count):
  batches = list(itertools.islice(iterator, count))
  iterator.close()
  return batches


def assert_same(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others, strict=True):
    np.testing.assert_array_equal(batch.x, other.x)
    np.testing.assert_array_equal(batch.text, other.text)
    np.testing.assert_array_equal(batch.given, other.given)


def test_batches_are_what_a_step_eats():
  source = pipeline.make_source(WORLDS)
  (batch,) = first(pipeline.batches(WORLDS, source), 1)
  assert isinstance(batch, Batch)
  assert batch.x.shape == (8, 3, 12, 12, 3)
  assert batch.x.dtype == np.float32
  assert np.abs(batch.x).max() <= 1
  assert batch.text.shape == (8, 32)
  assert batch.text.dtype == np.int32
  assert captions.decode_bytes(batch.text[3]) == "one ball on a dark background"
  assert batch.given.dtype == np.int32
  assert batch.given.tolist() == [0] * 8
  whole = {source[i]["video"].tobytes() for i in range(23)}
  assert all(x.tobytes() in whole for x in batch.x)


@pytest.mark.parametrize("step", [0, 1, 2, 3, 7, 20])
def test_resume_at_any_step_is_exact(step):
  source = Draws()
  whole = first(pipeline.batches(WORLDS, source), step + 4)
  resumed = first(pipeline.batches(WORLDS, source, start_step=step), 4)
  assert_same(whole[step:], resumed)


def test_an_epoch_holds_every_record_once_and_the_next_differs():
  stream = np.concatenate(
    [b.x for b in first(pipeline.batches(WORLDS, Draws()), 9)]
  )
  epochs = stream[:69].reshape(3, 23, 2)
  for epoch in epochs:
    assert sorted(epoch[:, 0]) == list(range(23))
  orders = {tuple(epoch[:, 0]) for epoch in epochs}
  assert len(orders) == 3
  # A record's clip is drawn anew each time it comes up.
  assert len(set(stream[:, 1])) == len(stream)


def test_what_a_record_is_given_comes_with_it():
  for batch in first(pipeline.batches(WORLDS, Draws()), 3):
    assert batch.given.dtype == np.int32
    np.testing.assert_array_equal(batch.given, batch.x[:, 0] % 3)
  batch, _ = pipeline.fixed_batch(WORLDS, Draws(), [1, 5])
  assert batch.given.tolist() == [1, 2]


def test_seeds_give_other_orders_and_other_clips():
  batches = []
  for seed in (0, 1):
    cfg = pipeline.DataConfig(batch_size=8, seed=seed)
    batches += first(pipeline.batches(cfg, Draws()), 1)
  assert (batches[0].x[:, 0] != batches[1].x[:, 0]).any()
  assert not set(batches[0].x[:, 1]) & set(batches[1].x[:, 1])


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_share_a_batch_without_overlap(count):
  whole = first(pipeline.batches(WORLDS, Draws()), 5)
  shares = [
    first(pipeline.batches(WORLDS, Draws(), 0, index, count), 5)
    for index in range(count)
  ]
  for step, batch in enumerate(whole):
    parts = [share[step].x for share in shares]
    assert all(len(part) == 8 // count for part in parts)
    # The same records, the same clips of them, in the same rows.
    np.testing.assert_array_equal(np.concatenate(parts), batch.x)


def test_resume_with_another_number_of_processes():
  whole = first(pipeline.batches(WORLDS, Draws()), 6)
  halves = [
    first(pipeline.batches(WORLDS, Draws(), 4, index, 2), 2)
    for index in range(2)
  ]
  for step in range(2):
    together = np.concatenate([h[step].x for h in halves])
    np.testing.assert_array_equal(together, whole[4 + step].x)


def test_a_worker_process_changes_nothing_and_ends_on_close():
  source = Draws()
  alone = first(pipeline.batches(WORLDS, source), 7)
  cfg = dataclasses.replace(WORLDS, num_workers=1)
  iterator = pipeline.batches(cfg, source, start_step=3)
  assert_same(alone[3:], list(itertools.islice(iterator, 4)))
  assert multiprocessing.active_children()
  iterator.close()
  for child in multiprocessing.active_children():
    child.join(10)
  assert not multiprocessing.active_children()


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_change_nothing(threads):
  cfg = dataclasses.replace(WORLDS, num_threads=threads)
  assert_same(
    first(pipeline.batches(WORLDS, Draws()), 5),
    first(pipeline.batches(cfg, Draws()), 5),
  )


def test_eval_worlds_are_no_training_worlds():
  splits = [pipeline.make_source(WORLDS, s) for s in ("train", "eval")]
  videos = [
    {source[i]["video"].tobytes() for i in range(23)} for source in splits
  ]
  assert len(videos[0]) == len(videos[1]) == 23
  assert not videos[0] & videos[1]


def test_fixed_batch_gives_the_truth_of_worlds():
  cfg = dataclasses.replace(WORLDS, num_balls=2)
  source = pipeline.make_source(cfg, "eval")
  batch, state = pipeline.fixed_batch(cfg, source, [4, 0, 4])
  assert batch.x.shape == (3, 3, 12, 12, 3)
  np.testing.assert_array_equal(batch.x[0], batch.x[2])
  assert state["position"].shape == (3, 3, 2, 2)
  drawn = worlds.render(
    cfg.world,
    state["position"],
    state["colour"][:, None],
    state["background"][:, None],
  )
  np.testing.assert_array_equal(drawn, batch.x)
  _, none = pipeline.fixed_batch(cfg, Draws(), [1])
  assert none is None


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
  """Three files whose pixels say the file and the frame."""
  path = tmp_path_factory.mktemp("clips")
  for i in range(3):
    film = np.full((20, 16, 16, 3), 50 * i, np.uint8)
    film[..., 2] = np.arange(20)[:, None, None] * 10
    video.write_video(path / f"{i}.mkv", film, fps=10)
    (path / f"{i}.txt").write_text(f"film {i}")
  return path


def test_files_make_batches_that_resume(clips):
  cfg = pipeline.DataConfig(
    source="video",
    path=str(clips),
    frames=4,
    height=8,
    width=8,
    batch_size=4,
    fps=5,
  )
  source = pipeline.make_source(cfg)
  whole = first(pipeline.batches(cfg, source), 4)
  starts = set()
  for x, text in zip(whole[0].x, whole[0].text, strict=True):
    pixels = video.to_uint8(x)
    number = int(pixels[0, 0, 0, 0]) // 50
    assert captions.decode_bytes(text) == f"film {number}"
    times = pixels[:, 4, 4, 2].astype(int) // 10
    assert list(np.diff(times)) == [2, 2, 2]
    starts.add(times[0])
  assert len(starts) > 1
  again = pipeline.batches(cfg, pipeline.make_source(cfg), start_step=2)
  assert_same(whole[2:], first(again, 2))
  halves = [
    first(pipeline.batches(cfg, source, 1, i, 2), 1)[0].x for i in range(2)
  ]
  np.testing.assert_array_equal(np.concatenate(halves), whole[1].x)


def test_a_file_gone_bad_is_named_and_training_goes_on(clips, tmp_path, caplog):
  for name in ("0.mkv", "1.mkv"):
    (tmp_path / name).write_bytes((clips / name).read_bytes())
  cfg = pipeline.DataConfig(
    source="video",
    path=str(tmp_path),
    frames=4,
    height=8,
    width=8,
    batch_size=4,
    num_threads=0,
    cache_mb=0,
  )
  source = pipeline.make_source(cfg)
  (tmp_path / "0.mkv").write_bytes(b"gone bad")
  with caplog.at_level(logging.WARNING):
    batches = first(pipeline.batches(cfg, source), 2)
  assert {
    int(v) for b in batches for v in video.to_uint8(b.x[..., 0]).flat
  } == {50}
  assert sum("0.mkv" in line for line in caplog.messages) == 1
  # With nothing left to read, the reader's own error reaches the loop.
  (tmp_path / "1.mkv").unlink()
  with pytest.raises(UserError, match="in a row"):
    next(pipeline.batches(cfg, source))


def test_held_out_files_are_not_trained_on(clips):
  cfg = pipeline.DataConfig(
    source="video", path=str(clips), frames=4, height=8, width=8, eval_files=1
  )
  names = [
    {p.name for p in pipeline.make_source(cfg, split).paths}
    for split in ("train", "eval")
  ]
  assert names == [{"0.mkv", "2.mkv"}, {"1.mkv"}]


def test_captions_too_long_are_found_before_training(clips):
  cfg = pipeline.DataConfig(
    source="video", path=str(clips), frames=4, text_length=5
  )
  with pytest.raises(UserError, match=r"0\.txt: caption of 6 bytes"):
    pipeline.make_source(cfg)
  cfg = pipeline.DataConfig(caption_detail="colour", num_balls=4)
  with pytest.raises(UserError, match="text_length=64"):
    pipeline.make_source(cfg)


@pytest.mark.parametrize(
  ("arguments", "says"),
  [
    ((0, 0, 3), r"batch_size=8 \(global\) cannot be shared by 3 processes"),
    ((0, 2, 2), "process_index=2 of 2"),
    ((-1,), "start_step=-1"),
  ],
)
def test_impossible_shares_are_refused_at_once(arguments, says):
  with pytest.raises(UserError, match=says):
    pipeline.batches(WORLDS, Draws(), *arguments)


@pytest.mark.parametrize(
  "change",
  [
    {"source": "camera"},
    {"frames": 0},
    {"batch_size": 0},
    {"num_workers": -1},
    {"stride": 0},
    {"aggregate_rounds": -1},
    {"seed": -1},
    {"seed": 1 << 32},
    {"fps": 0.0},
    {"fps": 8, "stride": 2},
  ],
)
def test_impossible_configs_are_refused_by_name(change):
  with pytest.raises(UserError, match=f"{next(iter(change))}="):
    pipeline.DataConfig(**change)


def test_unknown_split_is_refused():
  with pytest.raises(UserError, match="split='test'"):
    pipeline.make_source(WORLDS, "test")
