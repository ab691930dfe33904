"""BAgger: trajectories are reversed rollouts, and nothing is lost silently."""

import dataclasses
import json
import shutil
from pathlib import Path

import bagger_runs
import jax.numpy as jnp
import numpy as np
import pytest
from bagger_config import get_config
from bagger_runs import CONFIG, assert_each_once, contents, manifest, run

from avd_jax import config as config_lib
from avd_jax import disk, sampling
from avd_jax.algorithms import bagger
from avd_jax.bagger import rounds
from avd_jax.bagger.rollouts import Rollouts
from avd_jax.cli import main
from avd_jax.data import aggregate, captions, codec, pipeline
from avd_jax.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def compiled():
  """Trainings of one config share their compiled steps."""
  with bagger_runs.shared_programs():
    yield


@pytest.fixture
def whole():
  """The workdir of a run that nothing interrupted."""
  return bagger_runs.whole()


# --- what makes a trajectory -------------------------------------------------


def test_reversing_twice_changes_nothing():
  rng = np.random.default_rng(0)
  pixels = rng.uniform(-1, 1, (2, 5, 4, 4, 3)).astype(np.float32)
  through = lambda x: codec.PIXELS.encode(
    bagger.reverse(codec.PIXELS.decode(x))
  )
  once = through(pixels)
  for frame in range(5):
    np.testing.assert_array_equal(once[:, frame], pixels[:, 4 - frame])
  np.testing.assert_array_equal(through(once), pixels)
  np.testing.assert_array_equal(bagger.reverse(jnp.asarray(pixels)), once)


@pytest.mark.parametrize(
  ("chunks", "share", "prefix"),
  [(7, 4 / 7, 4), (10, 4 / 7, 6), (2, 4 / 7, 1), (7, 0.01, 1), (7, 0.99, 6)],
)
def test_the_prefix_leaves_something_on_both_sides(chunks, share, prefix):
  assert bagger.prefix_chunks(chunks, share) == prefix


def test_a_single_chunk_has_no_prefix():
  with pytest.raises(UserError, match="of 1 chunk has no prefix"):
    bagger.prefix_chunks(1)


WORDS = bagger.REVERSED


@pytest.mark.parametrize(
  "caption",
  ["", "a ball", " ", WORDS, WORDS * 2, WORDS + "x", WORDS * 3 + "x", "é\n"],
)
def test_rewriting_twice_gives_the_caption_back(caption):
  once = bagger.rewrite(caption)
  assert bagger.rewrite(once) == caption
  assert bool(caption) == (once != caption)


def test_the_clips_of_a_round_are_drawn_without_repetition():
  config = get_config()
  config.data.num_videos = 200
  one = Rollouts(config, Path("nowhere"))
  clips = [one.clips(round) for round in (1, 2)]
  for drawn in clips:
    assert len(set(drawn)) == len(drawn) == 100
    assert min(drawn) >= 0
    assert max(drawn) < 200
  assert 25 < len(set(clips[0]) & set(clips[1])) < 75
  assert one.clips(1) == clips[0]
  config.seed = 1
  assert set(Rollouts(config, Path("nowhere")).clips(1)) != set(clips[0])
  batches = one.batches(1)
  assert [len(b) for b in batches] == [4] * 25


# --- the run -----------------------------------------------------------------


def test_the_store_holds_reversed_rollouts_of_the_weights_before(whole):
  """The second round again, by hand."""
  config = get_config()
  sampler = sampling.load(whole / "round_1" / "train")
  source = Rollouts(config, whole / "store").seeds
  store = aggregate.Aggregate(whole / "store", 2)
  headers = [store.header(i) for i in range(6, 10)]
  assert {h["batch"] for h in headers} == {0}
  real = np.stack([source[h["clip"]]["video"] for h in headers])
  text = [source[h["clip"]]["caption"] for h in headers]
  assert [h["prompt"] for h in headers] == text
  tokens = np.stack([captions.encode_bytes(t, 64) for t in text])
  made = sampler.extend(real[:, :1], tokens, 5, headers[0]["seed"])
  made = np.clip(made, -1, 1)
  stored = np.stack([store[i]["video"] for i in range(6, 10)])
  np.testing.assert_array_equal(stored[:, ::-1], made)
  # From drifted to real: it ends in the clip's own first frame.
  np.testing.assert_array_equal(stored[:, -1], real[:, 0])
  assert np.abs(stored[:, 0] - real[:, -1]).mean() > 0.01
  for i, header in enumerate(headers, 6):
    assert store[i]["caption"] == "a reversed video of " + header["prompt"]
    assert header["checkpoint"] == {"workdir": "round_1/train", "step": 4}
  seeds = {store.header(i)["seed"] for i in range(len(store))}
  assert len(seeds) == 4  # of two batches in each of two rounds


def test_every_trajectory_is_in_the_store_once(whole):
  assert_each_once(whole, get_config())


def test_a_manifest_says_what_a_round_was(whole):
  for round, before in ((1, "base"), (2, "round_1/train")):
    found = manifest(whole, round)
    assert found["source"] == {"workdir": before, "step": 4}
    assert found["trajectories"] == 6
    assert [s["records"] for s in found["shards"]] == [4, 2]
    assert found["shards"] == aggregate.shards(whole / "store", round)
    assert found["error_by_frame"][0] == 0
    assert min(found["error_by_frame"][1:]) > 0.01
    assert set(found["seconds"]) == {"rollouts", "training"}
    assert found["started"] <= found["finished"]


def test_a_round_trains_on_seeds_and_all_rounds_before_from_the_base(whole):
  for round in (1, 2):
    path = whole / f"round_{round}" / "train" / "config.json"
    config = config_lib.from_json(json.loads(path.read_text()))
    assert config.init_from == str(whole / "base")
    assert config.stages == ("round",)
    data = config_lib.typed(pipeline.DataConfig, config.data)
    source = pipeline.make_source(data)
    assert len(source) == 12 + 6 * round
    given = [source[i].get("given", 0) for i in range(len(source))]
    assert given == [0] * 12 + [2] * 6 * round
    assert {source[i]["video"].shape for i in (0, 12)} == {(3, 12, 12, 3)}


def test_a_warm_start_goes_on_from_the_round_before():
  config, place = get_config(), Path("/runs/x")
  starts = lambda: [
    rounds.round_config(config, place, k).init_from for k in (1, 2)
  ]
  assert starts() == ["/runs/x/base"] * 2
  config.bagger.restart = "warm"
  assert starts() == ["/runs/x/base", "/runs/x/round_1/train"]


def test_a_finished_run_is_left_alone(whole, capsys):
  before = contents(whole)
  arguments = ["bagger", "--config", CONFIG, "--workdir", str(whole)]
  assert main.main(arguments) == 0
  assert f"round 2: {whole / 'round_2/train'}" in capsys.readouterr().out
  assert contents(whole) == before


# --- codecs ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Two frames of half the width are one latent: a codec with a stride."""

  name: str = "pairs"

  def encode(self, pixels):
    b, f, h, w, c = pixels.shape
    pairs = pixels.reshape(b, f // 2, 2, h, w, c).transpose(0, 1, 3, 2, 4, 5)
    return pairs.reshape(b, f // 2, h, 2 * w, c)

  def decode(self, latents):
    return np.stack(np.split(latents, 2, 3), 2).reshape(
      latents.shape[0], -1, latents.shape[2], latents.shape[3] // 2, 3
    )


def test_time_is_reversed_in_pixels_not_in_latents(
  whole, tmp_path, monkeypatch
):
  monkeypatch.setitem(codec.CODECS, "pairs", Pairs)
  config = get_config()
  config.bagger.codec = "pairs"
  rollouts = Rollouts(config, tmp_path / "store")
  rollouts.check()
  rollouts.make(1, whole / "base", {"workdir": "base", "step": 4}, False)
  assert aggregate.spec(tmp_path / "store").codec == "pairs"
  latents = aggregate.Aggregate(tmp_path / "store", 1)
  pixels = aggregate.Aggregate(whole / "store", 1)
  for i in range(6):
    # The same rollouts; inside each latent, too, the frames change places.
    swapped = np.roll(pixels[i]["video"], 6, 2)
    np.testing.assert_array_equal(latents[i]["video"], swapped)
  assert latents[0]["video"].tobytes() != pixels[0]["video"].tobytes()


# --- what a user can get wrong -----------------------------------------------


def pairs_file(tmp_path, pairs):
  path = tmp_path / "prompts.json"
  path.write_text(json.dumps(pairs))
  return str(path)


ONE = "one ball on a dark background"


def test_prompts_come_from_a_file_or_a_function(tmp_path, monkeypatch):
  config = get_config()
  rollouts = lambda: Rollouts(config, tmp_path / "store")
  config.bagger.prompts = pairs_file(tmp_path, {ONE: "ball, backwards"})
  rollouts().check()
  assert rollouts().rewrite(ONE) == "ball, backwards"
  assert rollouts().rewrite("") == ""
  (tmp_path / "mine.py").write_text("def turn(text): return text[::-1]\n")
  monkeypatch.syspath_prepend(tmp_path)
  config.bagger.prompts = "mine:turn"
  rollouts().check()
  assert rollouts().rewrite(ONE) == ONE[::-1]


@pytest.mark.parametrize(
  ("prompts", "says"),
  [
    ({"two balls": "x"}, f'prompts.json lacks the caption "{ONE}"'),
    ({ONE: ""}, f"made '' of '{ONE}'"),
    ({ONE: 3}, "give an object"),
    ({ONE: "x" * 65}, "does not fit text_length=64"),
    ("missing.json", "missing.json does not exist"),
    ("words", "give '', a .json file or module:function"),
    ("json:nothing", "no attribute 'nothing'"),
    ("nowhere:f", "No module named 'nowhere'"),
    ("json:loads", "Expecting value"),
    ("builtins:len", "made 29 of"),
  ],
)
def test_a_caption_is_never_lost(tmp_path, prompts, says):
  config, workdir = get_config(), tmp_path / "run"
  if isinstance(prompts, dict):
    prompts = pairs_file(tmp_path, prompts)
  config.bagger.prompts = prompts
  with pytest.raises(UserError, match=says):
    run(config, workdir)
  assert not workdir.exists()  # nothing was trained for it


@pytest.mark.parametrize(
  ("change", "says"),
  [
    (dict(text_length=40), "does not fit text_length=40"),
    (dict(frames=1), "bagger.given 1|of 1 chunk"),
    (dict(aggregate="x"), "data.aggregate is set by the rounds"),
  ],
)
def test_data_that_cannot_work_is_refused_at_once(tmp_path, change, says):
  config = get_config()
  config.data.update(change)
  with pytest.raises(UserError, match=says):
    run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("change", "says"),
  [
    (dict(codec="vqgan"), "codec 'vqgan': give one of pixels"),
    (dict(given=4), "bagger.given 4 chunks"),
    (dict(frames=2), "bagger.frames 2"),
  ],
)
def test_rounds_that_cannot_work_are_refused_at_once(tmp_path, change, says):
  config = get_config()
  config.bagger.update(change)
  with pytest.raises(UserError, match=says):
    run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_both_stages_are_needed(tmp_path):
  config = get_config()
  del config.stage["round"]
  with pytest.raises(UserError, match="no stage 'round'"):
    run(config, tmp_path)


@pytest.fixture
def copy(whole, tmp_path):
  """The finished run with its last round to do again."""
  workdir = tmp_path / "copy"
  shutil.copytree(whole, workdir)
  (workdir / "round_2" / "manifest.json").unlink()
  return workdir


@pytest.mark.parametrize("place", ["base", "round_1/train"])
@pytest.mark.parametrize("gone", ["checkpoints", "checkpoints/4"])
def test_weights_that_are_gone_are_named(copy, place, gone):
  shutil.rmtree(copy / place / gone)
  kept = contents(copy / "store")
  with pytest.raises(UserError, match=f"weights of .*{place} at step 4 are"):
    run(get_config(), copy)
  assert contents(copy / "store") == kept


@pytest.mark.parametrize(
  ("section", "change", "says"),
  [
    ("sampling", dict(steps=2), "sampling.steps: 1 -> 2"),
    ("bagger", dict(share=0.25), "bagger.share: 0.5 -> 0.25"),
    ("data", dict(num_videos=13), "data.num_videos: 12 -> 13"),
  ],
)
def test_a_workdir_belongs_to_one_config(copy, section, change, says):
  config, kept = get_config(), contents(copy)
  config[section].update(change)
  with pytest.raises(UserError, match=f"made with another config .*{says}"):
    run(config, copy)
  assert contents(copy) == kept


def test_a_store_of_another_codec_is_refused(copy):
  spec = aggregate.spec(copy / "store")
  other = dataclasses.replace(spec, codec="vae")
  disk.write_json(copy / "store" / "store.json", dataclasses.asdict(other))
  kept = contents(copy)
  with pytest.raises(UserError, match="codec 'vae', not 'pixels'"):
    run(get_config(), copy)
  assert contents(copy) == kept


def test_a_store_of_another_shape_is_refused(copy):
  config = get_config()
  config.bagger.frames = 7
  rollouts = Rollouts(config, copy / "store")
  with pytest.raises(UserError, match=r"shape \(5, 12, 12, 3\), not \(7, 12"):
    rollouts.check()


def test_a_damaged_store_is_noticed_before_training(copy):
  shard = aggregate.shard(copy / "store", 1, 0)
  shard.write_bytes(shard.read_bytes()[:-100])
  with pytest.raises(UserError, match=r"batch_00000.*damaged"):
    run(get_config(), copy)


def test_the_command_line_says_so_in_one_line(tmp_path, capsys):
  arguments = ["bagger", "--config", CONFIG, "--workdir", str(tmp_path / "x")]
  assert main.main([*arguments, "--config.bagger.prompts=words"]) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: bagger.prompts 'words'")
  assert error.count("\n") == 1
