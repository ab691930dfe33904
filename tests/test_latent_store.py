"""The store of latents: bits come back, and what is not whole is refused."""

import dataclasses
import itertools
import json
import os
import pickle

import grain
import jax
import numpy as np
import pytest

from avd_jax import config as config_lib
from avd_jax import parallel
from avd_jax.data import latent_store, pipeline
from avd_jax.errors import UserError
from avd_jax.training import loop
from avd_jax.training.program import Program

SPEC = latent_store.Spec(
  codec="vae",
  text_encoder="umt5",
  shape=(3, 2, 2, 4),
  text_dim=6,
  text_length=5,
  frames=9,
  height=16,
  width=16,
  fps=None,
  clips_per_video=2,
  shard_size=2,
  processes=2,
  videos="five",
  captions="none",
)
# Videos of the records of each part, in shards of two.
PARTS = ([0, 0, 2, 4, 4], [1, 3, 3])


def values(shape, seed):
  rng = np.random.default_rng(seed)
  return rng.normal(size=shape).astype(latent_store.DTYPE)


def clip(process, place):
  """(latents, text) of a record."""
  seed = 100 * process + place
  return values(SPEC.shape, seed), values((1 + seed % 5, 6), seed + 50)


def fill(path, process):
  latent_store.claim(path, SPEC, process)
  latent_store.write_null(path, process, values((1, 6), 7))
  done = latent_store.Progress()
  videos = PARTS[process]
  for start in range(0, len(videos), 2):
    places = range(start, min(start + 2, len(videos)))
    records = [
      latent_store.pack(*clip(process, i), {"caption": f"{process} {i}"})
      for i in places
    ]
    mine = [videos[i] for i in places]
    latent_store.add_shard(path, process, done, records, mine)
  done.finished = True
  latent_store.save(path, process, done)


@pytest.fixture
def store(tmp_path):
  fill(tmp_path, 1)
  fill(tmp_path, 0)
  return tmp_path


def test_every_bit_comes_back():
  latents, text = clip(0, 3)
  record = latent_store.pack(latents, text, {"caption": "Grüße", "start": 4})
  found, words, header = latent_store.unpack(record)
  for ours, theirs in ((latents, found), (text, words)):
    assert theirs.dtype == latent_store.DTYPE
    assert ours.shape == theirs.shape
    assert ours.tobytes() == theirs.tobytes()
  assert (header["caption"], header["start"]) == ("Grüße", 4)
  # By hand, as the documentation says: a length, JSON, little-endian bfloat16.
  length = int.from_bytes(record[:4], "little")
  assert json.loads(record[4 : 4 + length])["latents"] == [3, 2, 2, 4]
  assert record[4 + length :] == latents.tobytes() + text.tobytes()


def test_records_come_in_the_order_of_their_videos(store):
  source = latent_store.LatentSource(store, 2)
  assert isinstance(source, pipeline.Source)
  told = [source.header(i)["caption"] for i in range(len(source))]
  assert told == ["0 0", "0 1", "1 0", "0 2", "1 1", "1 2", "0 3", "0 4"]
  record = source.clip(4, np.random.default_rng(0))
  latents, text = clip(1, 1)
  assert set(record) == {"video", "caption", "text", "given"}
  assert record["caption"] == "1 1"
  assert record["given"] == 0
  assert record["video"].dtype == record["text"].dtype == np.float32
  np.testing.assert_array_equal(record["video"], latents[:2].astype(np.float32))
  assert record["text"].shape == (5, 6)
  np.testing.assert_array_equal(record["text"][: len(text)], text)
  assert not record["text"][len(text) :].any()
  np.testing.assert_array_equal(source.null_text[0], values((1, 6), 7)[0])
  assert not source.null_text[1:].any()


def test_no_video_is_in_both_splits(store, caplog):
  def captions(split, count):
    source = latent_store.LatentSource(store, 3, split, count)
    return {source.header(i)["caption"] for i in range(len(source))}

  assert captions("eval", 2) == {"1 0", "1 1"}  # videos 1 and 3, one clip each
  assert captions("train", 2) == {"0 0", "0 1", "0 2", "0 3", "0 4"}
  assert captions("eval", 0) == captions("train", 0)
  assert "reads the clips of training" in caplog.text
  with pytest.raises(UserError, match=r"data\.eval_files=5: give 0 to 4"):
    captions("eval", 5)


def test_workers_read_a_copy_of_it(store):
  source = pickle.loads(pickle.dumps(latent_store.LatentSource(store, 3)))
  stream = grain.MapDataset.range(len(source)).map(source.__getitem__)
  stream = stream.to_iter_dataset().mp_prefetch(
    grain.multiprocessing.MultiprocessingOptions(num_workers=1)
  )
  found = [r["video"] for r in itertools.islice(stream, 3)]
  np.testing.assert_array_equal(found, [source[i]["video"] for i in range(3)])


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"frames": 4}, "frames=4 latent frames are asked for; its clips have 3"),
    ({"frames": 0}, "frames=0"),
    ({"text_dim": 8}, "have 6 dimensions, the model reads text_dim=8"),
    ({"split": "test"}, "split='test': give 'train' or 'eval'"),
  ],
)
def test_clips_that_it_cannot_give_are_refused(store, options, message):
  with pytest.raises(UserError, match=message):
    latent_store.LatentSource(store, **{"frames": 3} | options)


def test_what_is_no_whole_store_is_refused(store, tmp_path_factory):
  def opened(path=store):
    return latent_store.LatentSource(path, 3)

  with pytest.raises(UserError, match="no store of latents"):
    opened(tmp_path_factory.mktemp("empty"))
  shard = store / "part_000" / "shard_00001.array_record"
  whole = shard.read_bytes()
  shard.write_bytes(whole[:-1])
  with pytest.raises(UserError, match=r"part_000/shard_00001.* is damaged"):
    opened()
  shard.unlink()
  with pytest.raises(UserError, match=r"part_000/shard_00001.* is gone"):
    opened()
  place = whole.index(clip(0, 2)[0].tobytes())
  shard.write_bytes(whole[:place] + b"\0\0\0\0" + whole[place + 4 :])
  with pytest.raises(UserError, match=r"record 2 is damaged"):
    opened()[3]
  index = store / "part_001" / "index.json"
  index.write_text("{")
  with pytest.raises(UserError, match="not valid JSON"):
    opened()
  index.unlink()
  with pytest.raises(UserError, match="part 1 of 2 is not finished"):
    opened()
  (store / "store.json").write_text("{}")
  with pytest.raises(UserError, match="does not describe latents"):
    opened()


def test_other_settings_are_refused_by_name(store):
  latent_store.claim(store, SPEC, 0)
  other = dataclasses.replace(SPEC, codec="new", fps=8.0)
  with pytest.raises(UserError, match="codec 'vae', not 'new'; fps None, not"):
    latent_store.claim(store, other, 0)
  newer = dataclasses.asdict(SPEC) | {"version": 2}
  (store / "store.json").write_text(json.dumps(newer))
  with pytest.raises(UserError, match="format 2"):
    latent_store.claim(store, SPEC, 0)


@pytest.mark.parametrize("links", [True, False])
def test_of_two_that_begin_at_once_one_is_refused(tmp_path, monkeypatch, links):
  """The second looks before the first has written, and writes after it."""
  link = os.link

  def late(part, file):
    monkeypatch.undo()
    latent_store.claim(tmp_path, SPEC, 0)
    if not links:
      raise PermissionError("no links here")
    link(part, file)

  monkeypatch.setattr(os, "link", late)
  other = dataclasses.replace(SPEC, codec="new")
  with pytest.raises(UserError, match="begun with codec 'vae', not 'new'"):
    latent_store.claim(tmp_path, other, 1)
  assert latent_store.spec(tmp_path) == SPEC
  assert not list(tmp_path.glob("*.part"))


def latent_config(store, **data):
  config = config_lib.default()
  config.data.update(
    source="latents", path=str(store), frames=2, height=2, width=2,
    text_length=5, batch_size=2,
  )  # fmt: skip
  config.data.update(data)
  config.model.update(
    channels=4, text="embeddings", text_dim=6, patch=1, dim=12, num_heads=1,
    num_layers=1, ffn_dim=8, freq_dim=4, scan_unroll=1,
  )  # fmt: skip
  config.stage = {"tf": config_lib.stage("ground_truth", 1)}
  config.stages = ("tf",)
  config.evaluation.update(frames=4, given=1)
  return config


def test_a_run_trains_on_a_store(store, tmp_path, monkeypatch):
  """Batches are latents and embeddings; no text is the store's, not zeros."""
  made, real = [], Program.step
  monkeypatch.setattr(
    Program, "step", lambda self, *a: made.append(self) or real(self, *a)
  )
  mesh = parallel.make_mesh(jax.devices()[:1], (1, 1, 1, 1))
  state = loop.train(latent_config(store), tmp_path / "run", mesh, False)
  assert int(state.step) == 1
  assert made[0].null_text.shape == (5, 6)
  assert np.abs(made[0].null_text[0]).max() > 0


@pytest.mark.parametrize(
  ("change", "says"),
  [
    (dict(height=4), r"latents are \(2, 2\)"),
    (dict(text_length=7), "text_length are 5"),
    (dict(frames=4), "4 latent frames .* have 3"),
  ],
)
def test_a_store_of_another_shape_is_refused(store, change, says):
  config = latent_config(store, **change)
  data = config_lib.typed(pipeline.DataConfig, config.data)
  with pytest.raises(UserError, match=says):
    pipeline.make_source(data)
