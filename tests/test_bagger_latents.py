"""BAgger on latents: a tiny Wan, from videos to a round's training."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from avd_jax import config as config_lib
from avd_jax import disk, parallel
from avd_jax.algorithms import bagger
from avd_jax.bagger import rounds
from avd_jax.bagger.rollouts import Rollouts
from avd_jax.data import aggregate, latent_store, pipeline, video
from avd_jax.errors import UserError
from avd_jax.training import loop
from avd_jax.wan import codec, encoding, tiny

pytest.importorskip("tokenizers")
pytest.importorskip("ftfy")

CAPTIONS = ("a red ball", "", "two boats", "a quick brown fox")
FRAMES, HEIGHT, WIDTH = 9, 16, 16  # pixels: 3 latent frames of 2 x 2


@pytest.fixture(scope="module")
def encoder(wan_ckpt):
  return codec.Encoder(wan_ckpt)


@pytest.fixture(scope="module")
def store(encoder, tmp_path_factory):
  """Four captioned clips, encoded."""
  root, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
  for i, caption in enumerate(CAPTIONS):
    film = rng.integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    video.write_video(root / f"{i}.mkv", film, 8)
    (root / f"{i}.txt").write_text(caption)
  options = encoding.Options(FRAMES, HEIGHT, WIDTH, None)
  encoding.run(encoder, root, None, root / "store", options)
  return root / "store"


def config_of(store, wan_ckpt):
  """A base of two steps and a round of two."""
  config = config_lib.default()
  config.init_from = str(wan_ckpt)
  config.data.update(
    source="latents", path=str(store), frames=3, height=2, width=2,
    batch_size=2, text_length=512,
  )  # fmt: skip
  config.model.update(
    dataclasses.asdict(
      dataclasses.replace(tiny.DIT, chunk_frames=1, remat="none")
    )
  )
  stage = lambda: config_lib.stage(
    "ground_truth", 2, objective="diffusion_forcing", learning_rate=1e-4
  )
  config.stages, config.stage = ("base",), {"base": stage(), "round": stage()}
  config.bagger.update(
    rounds=1, share=0.5, batch_size=2, codec=f"wan:{wan_ckpt}"
  )
  config.log.update(every=1, checkpoint_every=1)
  config.sampling.update(steps=1, segment=2, guidance=2.0)
  config.evaluation.update(videos=1, given=1, frames=4)
  return config


def run(config, workdir):
  mesh = parallel.make_mesh(jax.devices()[:1], (1, 1, 1, 1))
  return rounds.run(config, workdir, mesh, progress=False)


def test_time_turns_around_frame_by_frame(encoder):
  """And not latent by latent: frame 0 is a latent of its own."""
  rng = np.random.default_rng(1)
  pixels = rng.uniform(-1, 1, (2, FRAMES, HEIGHT, WIDTH, 3))
  pixels = pixels.astype(np.float32)
  latents = encoder.encode(pixels)
  assert latents.shape == (2, 3, 2, 2, 16)
  assert latents.dtype == np.float32
  again = encoder.decode(latents)
  assert again.shape == pixels.shape
  assert np.abs(again).max() <= 1
  back = encoder.encode(bagger.reverse(again))
  assert back.shape == latents.shape
  # Latent 0 of the reversal is the last frame alone, whatever comes after it.
  last = encoder.encode(again[:, -1:])
  np.testing.assert_allclose(back[:, :1], last, rtol=1e-3, atol=1e-3)
  assert np.abs(back - latents[:, ::-1]).mean() > 0.1
  # Video by video: the others in a call change nothing.
  np.testing.assert_array_equal(encoder.decode(latents[1:])[0], again[1])


class Killed(Exception):
  """Stands for the end of the process."""


@pytest.fixture(scope="module")
def whole(store, wan_ckpt, tmp_path_factory):
  """A run that was killed before its store was whole, and gone on with."""
  workdir = tmp_path_factory.mktemp("run")
  with pytest.MonkeyPatch.context() as patch:

    def dies(*args):
      raise Killed

    patch.setattr(aggregate, "finish_round", dies)
    with pytest.raises(Killed):
      run(config_of(store, wan_ckpt), workdir)
  shard = aggregate.shard(workdir / "store", 1, 0)
  written = shard.stat().st_mtime_ns
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Rollouts, "_trajectories", None)  # none is made again
    trained = run(config_of(store, wan_ckpt), workdir)
  assert trained == [workdir / "round_1" / "train"]
  assert shard.stat().st_mtime_ns == written
  return workdir


def test_the_aggregate_holds_latents_embeddings_and_provenance(
  whole, store, encoder
):
  spec, seeds = aggregate.spec(whole / "store"), latent_store.spec(store)
  assert (spec.codec, spec.text_encoder) == (seeds.codec, seeds.text_encoder)
  assert spec.codec.startswith("wan-vae-")
  assert (spec.shape, spec.dtype) == ((3, 2, 2, 16), "bfloat16")
  trajectories = aggregate.Aggregate(whole / "store", 1, 3, 2)
  clips = latent_store.LatentSource(store, 3)
  assert len(trajectories) == 2
  for i in range(2):
    record, header = trajectories[i], trajectories.header(i)
    clip = clips[header["clip"]]
    assert header["prompt"] == clip["caption"]
    assert header["caption"] == bagger.rewrite(clip["caption"])
    text, cut = encoder.text(header["caption"])
    assert header["tokens_cut"] == cut == 0
    np.testing.assert_array_equal(record["text"][: len(text)], text)
    assert not record["text"][len(text) :].any()
    assert record["video"].shape == clip["video"].shape
    assert record["given"] == 2
    assert header["error"][0] == 0  # the given chunk is the clip's own
    assert min(header["error"][1:]) > 0
    assert header["checkpoint"] == {"workdir": "base", "step": 2}


def test_a_trajectory_is_the_reversed_rollout(whole, store, wan_ckpt, encoder):
  """The first batch again, by hand; the prompt's embedding is heard."""
  from avd_jax import sampling

  trajectories = aggregate.Aggregate(whole / "store", 1)
  headers = [trajectories.header(i) for i in range(2)]
  clips = latent_store.LatentSource(store, 3)
  picked = [clips[header["clip"]] for header in headers]
  sampler = dataclasses.replace(
    sampling.load(whole / "base"), null_text=clips.null_text
  )
  given = np.stack([clip["video"][:1] for clip in picked])
  text = np.stack([clip["text"] for clip in picked])
  made = sampler.extend(given, text, 3, headers[0]["seed"])
  back = encoder.encode(bagger.reverse(encoder.decode(made)))
  stored = np.stack([trajectories[i]["video"] for i in range(2)])
  wanted = back.astype(latent_store.DTYPE).astype(np.float32)
  np.testing.assert_array_equal(stored, wanted)
  other = sampler.extend(given, text[::-1], 3, headers[0]["seed"])
  assert np.abs(other - made).max() > 1e-4


def test_a_round_trains_on_both_with_their_embeddings(whole, store):
  path = whole / "round_1" / "train" / "config.json"
  config = config_lib.from_json(json.loads(path.read_text()))
  data = config_lib.typed(pipeline.DataConfig, config.data)
  source = pipeline.make_source(data)
  assert len(source) == 4 + 2
  np.testing.assert_array_equal(source.null_text, source.seed.null_text)
  batch, _ = pipeline.fixed_batch(data, source, [0, 4, 5])
  assert batch.text.shape == (3, 512, tiny.TEXT.dim)
  assert batch.text.dtype == np.float32
  assert np.abs(batch.text).max((1, 2)).min() > 0
  assert batch.given.tolist() == [0, 2, 2]
  manifest = json.loads((whole / "round_1" / "manifest.json").read_text())
  assert (manifest["trajectories"], manifest["step"]) == (2, 2)


def refused(config, workdir):
  with pytest.raises(UserError) as caught:
    run(config, workdir)
  assert not workdir.exists()  # nothing was trained for it
  return str(caught.value)


@pytest.mark.parametrize(
  ("section", "change", "says"),
  [
    ("bagger", dict(codec="pixels"), "bagger.codec 'pixels' with data.source"),
    ("bagger", dict(codec="wan:nowhere"), "bagger.codec: nowhere has no vae"),
    ("bagger", dict(frames=4), "latents cut from the middle"),
    ("bagger", dict(prompts="gone.json"), "gone.json does not exist"),
    ("data", dict(path=""), "data.path is empty"),
    ("data", dict(path="nowhere"), "nowhere: no store of latents"),
    ("data", dict(source="worlds"), "model.channels 16: videos have 3"),
  ],
)
def test_settings_that_cannot_work_are_refused_at_once(
  store, wan_ckpt, tmp_path, section, change, says
):
  config = config_of(store, wan_ckpt)
  config[section].update(change)
  assert says in refused(config, tmp_path / "run")


@pytest.mark.parametrize(
  ("gone", "says"),
  [
    ("vae", "has no vae: avd import-wan --component vae"),
    ("text", "has no text: avd import-wan --component text"),
    ("tokenizer.json", "no tokenizer at"),
  ],
)
def test_a_checkpoint_that_lacks_something_is_named(
  store, wan_ckpt, tmp_path, gone, says
):
  copy = tmp_path / "ckpt"
  shutil.copytree(wan_ckpt, copy, ignore=shutil.ignore_patterns(gone))
  config = config_of(store, wan_ckpt)
  config.bagger.codec = f"wan:{copy}"
  message = refused(config, tmp_path / "run")
  assert message.startswith("bagger.codec: ")
  assert says in message


def test_another_vae_is_refused(store, wan_ckpt, whole, tmp_path):
  """The store's clips, and the aggregate's trajectories, are of one."""
  other = tmp_path / "store"
  shutil.copytree(store, other)
  values = json.loads((other / "store.json").read_text())
  disk.write_json(other / "store.json", values | {"codec": "wan-vae-0"})
  config = config_of(other, wan_ckpt)
  assert "were encoded with wan-vae-0" in refused(config, tmp_path / "run")
  trained = config_of(other, wan_ckpt).data
  trained.update(aggregate=str(whole / "store"), aggregate_rounds=1)
  with pytest.raises(UserError, match=r"is of codec 'wan-vae-.*'wan-vae-0'"):
    pipeline.make_source(config_lib.typed(pipeline.DataConfig, trained))
  copy = tmp_path / "copy"
  shutil.copytree(whole, copy)
  spec = dataclasses.asdict(aggregate.spec(copy / "store"))
  disk.write_json(copy / "store" / "store.json", spec | {"codec": "wan-vae-0"})
  with pytest.raises(UserError, match="begun with codec 'wan-vae-0', not"):
    Rollouts(config_of(store, wan_ckpt), copy / "store").check()


def test_channels_and_a_start_that_are_not_there_are_named(
  store, wan_ckpt, tmp_path
):
  mesh = parallel.make_mesh(jax.devices()[:1], (1, 1, 1, 1))
  config = config_of(store, wan_ckpt)
  config.model.channels = 8
  with pytest.raises(UserError, match=r"16 channels, .*model.channels 8"):
    loop.train(config, tmp_path / "a", mesh, False)
  config = config_of(store, tmp_path / "gone")
  with pytest.raises(UserError, match=r"init_from: .*gone.*avd import-wan"):
    loop.train(config, tmp_path / "b", mesh, False)
