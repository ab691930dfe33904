"""Sampling: a video is the same however it is cut, and comes from its run."""

import functools
import gc
import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax import checkpoint, parallel, sampling
from avd_jax import config as config_lib
from avd_jax.cli import devices
from avd_jax.diffusion import solvers
from avd_jax.errors import UserError
from avd_jax.models import attention as model_attention
from avd_jax.models import denoiser as denoiser_lib
from avd_jax.models.dit_config import DiTConfig
from avd_jax.ops import attention
from avd_jax.ops.kernels import splash
from avd_jax.training.program import Program

CLOSE = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-4)


def tiny(**model):
  config = config_lib.default()
  config.data.update(frames=4, text_length=6)
  config.model.update(
    dim=12,
    ffn_dim=12,
    num_heads=2,
    num_layers=1,
    patch=6,
    text="none",
    freq_dim=4,
    text_dim=4,
    text_tokens=2,
    scan_unroll=1,
  )
  config.model.update(**model)
  config.sampling.update(steps=2, shift=3.0, segment=2)
  return config


def weights(config, seed=0):
  """Random weights, none of them at a telling zero."""
  model = config_lib.typed(DiTConfig, config.model)
  x = jax.ShapeDtypeStruct((1, model.chunk_frames, 12, 12, 3), jnp.float32)
  text = jax.ShapeDtypeStruct((1, config.data.text_length), jnp.int32)
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: jnp.asarray(
      rng.normal(size=s.shape) / max(s.shape[-1], 4) ** 0.5, s.dtype
    ),
    denoiser_lib.abstract_params(model, x, text),
  )


def inputs(given, b=2):
  rng = np.random.default_rng(3)
  video = rng.uniform(-1, 1, (b, given, 12, 12, 3)).astype(np.float32)
  return video, rng.integers(0, 200, (b, 6)).astype(np.int32)


@pytest.fixture(scope="module")
def sampler():
  """A window and a sink, so that videos outgrow their cache."""
  config = tiny(attention=dict(window=2, sink=1))
  return sampling.Sampler(config, weights(config))


def by_hand(sampler, given, text, frames, seed):
  """The video of a plain loop over the cached face, solvers written out.

  Guidance is two models side by side, each with a cache of its own. What is
  made enters the caches noised, fresh ones too; what is given never is.
  """
  denoiser = denoiser_lib.make(sampler.model)
  options, size = sampler.config.sampling, sampler.model.chunk_frames
  scales = (options.guidance, 1 - options.guidance)
  texts = (text, np.zeros_like(text))
  call = jax.jit(functools.partial(denoiser.cached, sampler.params))
  shape = (len(given), size, *given.shape[2:])
  like = jax.ShapeDtypeStruct(shape, jnp.float32)
  fresh = lambda: [denoiser.init_cache(like, frames // size) for _ in scales]
  noised, told = options.context_noise, options.context_told
  caches, place = fresh(), 0

  def velocity(x, t, chunk):
    total, level = 0.0, jnp.full(len(x), t, jnp.float32)
    for i, scale in enumerate(scales):
      v, caches[i] = call(x, level, texts[i], caches[i], jnp.int32(chunk))
      total = total + scale * v
    return total

  grid = solvers.time_grid(options.steps, options.shift)
  chunks, remembered = [], []
  for chunk in range(frames // size):
    if place == options.recompute:
      caches, place = fresh(), 0
      for x, level in remembered[-options.recompute_keep :]:
        velocity(x, level, place)
        place += 1
    x, seen, level = given[:, chunk * size : (chunk + 1) * size], None, 0.0
    if not x.shape[1]:
      key = jax.random.fold_in(jax.random.key(seed), chunk)
      x = jax.random.normal(key, shape)
      for t, then in itertools.pairwise(grid):
        v = velocity(x, t, place)
        if options.solver == "heun":
          v = (v + velocity(x + (then - t) * v, then, place)) / 2
        x = x + (then - t) * v
      _, key = jax.random.split(jax.random.fold_in(key, 1))
      seen = (1 - noised) * x + noised * jax.random.normal(key, shape)
      level = noised if told is None else told
    remembered.append((x if seen is None else seen, level))
    velocity(*remembered[-1], place)
    chunks.append(np.asarray(x))
    place += 1
  return np.concatenate(chunks, 1)


@pytest.mark.parametrize("given", [0, 3])
def test_a_video_is_the_plain_loop_s(sampler, given):
  start, text = inputs(given)
  video = sampler.extend(start, text, 8, seed=5)
  assert video.shape == (2, 8, 12, 12, 3)
  np.testing.assert_array_equal(video[:, :given], start)
  CLOSE(video, by_hand(sampler, start, text, 8, seed=5))


def test_guided_chunks_of_two_frames_by_heun():
  config = tiny(text="bytes", chunk_frames=2)
  config.sampling.update(guidance=3.0, solver="heun", steps=1)
  sampler = sampling.Sampler(config, weights(config))
  start, text = inputs(2)
  CLOSE(
    sampler.extend(start, text, 6, seed=2),
    by_hand(sampler, start, text, 6, seed=2),
  )


def test_segments_do_not_show(sampler):
  """Other lengths of segments and of videos: the same frames."""
  start, text = inputs(1)
  video = sampler.extend(start, text, 8, seed=1)
  # 7 frames in segments of 2: the last one is cut.
  config = config_lib.from_json(config_lib.to_json(sampler.config))
  config.sampling.segment = 7
  whole = sampling.Sampler(config, sampler.params)
  CLOSE(whole.extend(start, text, 8, seed=1), video)
  CLOSE(sampler.extend(start, text, 5, seed=1), video[:, :5])


def test_a_stream_hands_on_what_is_done(sampler):
  start, text = inputs(1)
  parts = list(sampler.stream(start, text, 6, seed=1))
  assert [part.shape[1] for part in parts] == [2, 2, 1]
  heard = []
  video = sampler.extend(start, text, 6, seed=1, on_frames=heard.append)
  assert heard == [2, 2, 1]
  np.testing.assert_array_equal(np.concatenate(parts, 1), video[:, 1:])


def test_one_program_serves_every_segment(sampler):
  start, text = inputs(1)
  sampler.extend(start, text, 9)
  count = sampler.segment._cache_size()
  sampler.extend(start, text, 21, seed=9)
  assert sampler.segment._cache_size() == count


def test_seeds_decide(sampler):
  start, text = inputs(1)
  one, same, other = (sampler.extend(start, text, 3, s) for s in (1, 1, 2))
  np.testing.assert_array_equal(one, same)
  assert np.abs(one - other)[:, 1:].max() > 0.1
  # Each chunk and each video has noise of its own.
  assert np.abs(one[:, 1] - one[:, 2]).max() > 0.1


def test_impossible_lengths_are_refused(sampler):
  start, text = inputs(3)
  with pytest.raises(UserError, match="3 frames are asked for and 3 are given"):
    sampler.extend(start, text, 3)
  config = tiny(chunk_frames=2)
  pairs = sampling.Sampler(config, None)
  with pytest.raises(UserError, match=r"7 frames in all .* chunks of 2"):
    pairs.extend(start[:, :2], text, 7)


# --- from a run --------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(workdir, EMA weights): a run saved from eight devices."""
  workdir, config = tmp_path_factory.mktemp("run"), tiny()
  mesh = parallel.make_mesh(jax.devices(), (2, 2, 1, 2))
  shardings = Program(config, mesh).shardings
  params, ema = weights(config, 1), weights(config, 2)
  items = {
    "params": jax.device_put(params, shardings.params),
    "ema": jax.device_put(ema, shardings.ema),
  }
  checkpoints = checkpoint.Checkpoints(workdir)
  for step in (3, 7):
    checkpoints.save(step, items, {"config": config_lib.to_json(config)})
    checkpoints.wait()
  checkpoints.close()
  return workdir, ema


def test_a_sampler_holds_the_average_on_one_device(run):
  workdir, ema = run
  sampler = sampling.load(workdir)
  jax.tree.map(np.testing.assert_array_equal, sampler.params, ema)
  for leaf in jax.tree.leaves(sampler.params):
    assert len(leaf.sharding.device_set) == 1
  ours, theirs = (config_lib.to_json(c) for c in (tiny(), sampler.config))
  ours["mesh"]["data"] = 1  # training's is not sampling's
  assert ours == theirs


def test_a_trained_model_may_be_sampled_with_another_attention(run):
  """Dense weights, routed: the same weights, and another video; and back."""
  workdir, ema = run
  sees = lambda **what: [
    f"--config.model.attention.{name}={value}" for name, value in what.items()
  ]
  dense = sampling.load(workdir)
  routed = sampling.load(workdir, sees(routing_top_k=1))
  jax.tree.map(np.testing.assert_array_equal, routed.params, ema)
  assert routed.model.attention.routing_top_k == 1
  given, text = inputs(1)
  videos = [s.extend(given, text, 4) for s in (dense, routed)]
  # Two chunks have one chunk of history at most: nothing to choose yet.
  CLOSE(videos[0][:, :2], videos[1][:, :2])
  assert np.abs(videos[0] - videos[1]).max() > 1e-3
  every = sampling.load(workdir, sees(routing_top_k=3)).extend(given, text, 4)
  CLOSE(every, videos[0])
  with pytest.raises(UserError, match=r"model.dim: cannot change in a trained"):
    sampling.load(workdir, ["--config.model.dim=24"])
  with pytest.raises(UserError, match="one device is used here"):
    sampling.load(workdir, ["--config.mesh.tensor=2"])
  with pytest.raises(UserError, match="routing_top_k"):
    sampling.load(workdir, sees(routing_top_k=400))


def test_a_routed_run_may_be_sampled_dense_and_longer(run, tmp_path):
  """None unsets what a run has set; a longer video has more to choose from."""
  workdir, _ = run
  routed = "--config.model.attention.routing_top_k"
  with pytest.raises(UserError, match=r"routing_top_k 200: .* give 1 to 127"):
    sampling.load(workdir, [f"{routed}=200"])
  longer = sampling.load(workdir, [f"{routed}=200"], frames=300)
  assert longer.model.attention.routing_top_k == 200
  config = longer.config
  config_lib.override(config, [f"{routed}=None"])
  assert config.model.attention.routing_top_k is None
  config_lib.override(config, [f"{routed}=3"])
  assert config.model.attention.routing_top_k == 3
  with pytest.raises(UserError, match="None"):
    config_lib.override(config, ["--config.model.dim=None"])


def test_a_rollout_of_any_length_is_traced_once(sampler, monkeypatch):
  count = []
  attend = attention.attend
  monkeypatch.setattr(
    attention, "attend", lambda *a, **k: count.append(1) or attend(*a, **k)
  )
  fresh = sampling.Sampler(sampler.config, sampler.params)
  given, text = inputs(1)
  parts = fresh.stream(given, text, 21)
  next(parts)
  traced = len(count)
  assert traced
  assert sum(part.shape[1] for part in parts) == 18
  assert len(count) == traced


@pytest.mark.parametrize(
  "damage", ["manifest", "arrays", "metadata", "record", "missing"]
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_torn_checkpoint_is_named(run, tmp_path, damage):
  """Whatever is wrong with its files: one line, which one, what to do."""
  workdir = tmp_path / "run"
  shutil.copytree(run[0], workdir)
  newest = workdir / "checkpoints" / "7"
  files = [p for p in (newest / "ema").rglob("*") if p.is_file()]
  if damage == "manifest":
    for path in (newest / "ema").rglob("manifest.ocdbt"):
      path.write_bytes(path.read_bytes()[:20])
  elif damage == "arrays":
    for path in files:
      if "/d/" in str(path):
        path.write_bytes(b"")
  elif damage == "metadata":
    (newest / "ema" / "_METADATA").write_text("{")
  elif damage == "record":
    (newest / "record" / "metadata").write_text('{"config": ')
  else:
    shutil.rmtree(newest / "ema")
  with pytest.raises(UserError) as error:
    sampling.load(workdir)
  message = str(error.value)
  del error
  gc.collect()  # reads that were under way complain now, not in another test
  assert str(newest) in message
  assert "delete that directory" in message
  assert "\n" not in message
  shutil.rmtree(newest)  # as it says
  sampling.load(workdir)


def test_an_unfinished_checkpoint_does_not_count(run, tmp_path):
  """What a process was writing when it died has another name."""
  workdir = tmp_path / "run"
  shutil.copytree(run[0], workdir)
  place = workdir / "checkpoints"
  (place / "7").rename(place / "9.orbax-checkpoint-tmp")
  checkpoints, step = checkpoint.open_existing(workdir)
  checkpoints.close()
  assert step == 3


def test_only_the_newest_checkpoints_are_kept(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  for step in (1, 2, 3, 3):
    checkpoints.save(step, {"a": jnp.full(3, step)}, {"step": step})
  checkpoints.wait()
  assert checkpoints.latest() == 3
  assert checkpoints.record(3) == {"step": 3}
  target = {"a": jax.ShapeDtypeStruct((3,), jnp.int32)}
  np.testing.assert_array_equal(checkpoints.restore(2, target)["a"], [2] * 3)
  # Another shape is named, and its files are not blamed for it.
  wrong = {"a": jax.ShapeDtypeStruct((4,), jnp.int32)}
  with pytest.raises(UserError, match=r"checkpoints/3 cannot .* if it is dam"):
    checkpoints.restore(3, {"a": wrong})
  checkpoints.close()
  names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
  assert names == ["2", "3"]


def test_missing_runs_are_refused(tmp_path):
  with pytest.raises(UserError, match="nowhere does not exist"):
    sampling.load(tmp_path / "nowhere")
  with pytest.raises(UserError, match="has no checkpoints"):
    sampling.load(tmp_path)
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(UserError, match="no whole checkpoint"):
    sampling.load(tmp_path)


@pytest.mark.parametrize("devices", [1, 2])
def test_what_attention_cannot_do_is_refused_before_weights_are_read(
  devices, monkeypatch
):
  """What the cache of this video asks for, no more: not what training does."""
  mesh = parallel.make_mesh(jax.devices()[:2], (1, 1, 2, 1))
  mesh = None if devices == 1 else mesh
  config = tiny(dim=128, attention=dict(implementation="splash"))
  with pytest.raises(UserError, match=r"'splash': .* TPUs only") as error:
    sampling.check(config, (12, 12), 3, mesh)
  assert "\n" not in str(error.value)
  monkeypatch.setattr(attention, "platform_of", lambda place: "tpu")
  long = splash.MOST + 1
  sampling.check(config, (12, 12), long, mesh)
  model = config_lib.typed(DiTConfig, config.model)
  shape = dict(heads=2, head_dim=64, dtype="float32", tokens=4)
  with pytest.raises(UserError, match=f"at most {splash.MOST} chunks"):
    model_attention.check(model.attention, long, place=mesh, **shape)
  # Where a query chooses all that it sees, nothing is routed.
  see = dict(routing_top_k=3, implementation="tpu")
  config = tiny(dim=256, attention=see)
  sampling.check(config, (12, 12), 5, mesh)
  with pytest.raises(UserError, match=r"'tpu': .* for routed history"):
    sampling.check(config, (12, 12), 4, mesh)


@pytest.mark.parametrize("count", [1, 2])
def test_a_video_whose_cache_cannot_be_held_is_refused(count):
  """Two layers of keys and values, 4 tokens of width 32 a chunk, float32."""
  mesh = parallel.make_mesh(jax.devices()[:2], (1, 1, 2, 1))
  mesh = None if count == 1 else mesh
  config = tiny(dim=32, num_layers=2, text="bytes")
  memory = 10 * (2 * 2 * 4 * 32 * 4)
  check = lambda chunks: sampling.check(config, (12, 12), chunks, mesh, memory)
  check(10 * count)
  with pytest.raises(UserError, match=f"{10 * count + 1} chunks take"):
    check(10 * count + 1)
  with pytest.raises(UserError, match=rf"{count + 1} videos of 10 chunks take"):
    sampling.check(config, (12, 12), 10, mesh, memory, videos=count + 1)
  # Guidance has a second cache; a window forgets.
  config.sampling.guidance = 3.0
  with pytest.raises(UserError, match=f"{10 * count} chunks take"):
    check(10 * count)
  config.model.attention.window = 2
  check(10**9)


def test_the_memory_of_a_cpu_is_the_machines():
  assert 2**30 < devices.memory() < 2**50
