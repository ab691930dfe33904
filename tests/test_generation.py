"""Videos from prompts and given frames, and into files while they are made."""

import dataclasses
import functools
import itertools
import json
import threading

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_sampling import CLOSE, inputs, tiny, weights

from avd_jax import checkpoint, sampling
from avd_jax import config as config_lib
from avd_jax.cli import main
from avd_jax.data import video, video_stream
from avd_jax.diffusion import rollout, solvers
from avd_jax.errors import UserError
from avd_jax.models import vae
from avd_jax.sampling import Texts, generation, prompts, spaces, streaming
from avd_jax.wan import importing, prompting
from avd_jax.wan import tiny as tiny_wan

# --- prompts that change, and chunks that are partly given -------------------

WAYS = {
  "guided": dict(guidance=2.0),
  "routed": dict(attention=dict(window=2, sink=1, routing_top_k=1)),
  "recomputed": dict(recompute=4, recompute_keep=2),
}


def made_in(way, **changes):
  """A sampler of a world with captions, a chunk a call."""
  options = WAYS.get(way, {}) | dict(segment=1, steps=1) | changes
  see = {"attention": options.pop("attention")} if way == "routed" else {}
  # In one layer keys and values depend on neither text nor history.
  config = tiny(text="bytes", num_layers=2, **see)
  config.sampling.update(options)
  config_lib.check(config)
  return sampling.Sampler(config, weights(config))


@pytest.mark.parametrize("way", WAYS)
def test_a_new_prompt_makes_the_cache_anew(way):
  """As if all of the past had been cached under it, one chunk at a time."""
  sampler = made_in(way)
  start, one = inputs(1)
  two = one[::-1] + 7
  texts = Texts((0, 3), (one, two))
  parts, caches = [start], {}
  for made, cache in sampler.segments(start, texts, 6, seed=5):
    parts.append(np.asarray(made))
    caches[len(parts)] = jax.tree.map(np.array, cache)
  film = np.concatenate(parts, 1)
  alone = sampler.extend(start, one, 6, seed=5)
  np.testing.assert_array_equal(film[:, :3], alone[:, :3])
  assert np.abs(film - alone)[:, 3:].max() > 1e-3
  # What comes next is what follows such a past under the new prompt.
  CLOSE(film, sampler.extend(film[:, :3], two, 6, seed=5))
  denoiser, (_, room) = sampler.denoiser(), sampler.room(1, 6, texts.starts)
  empty = denoiser.init_cache(
    jax.ShapeDtypeStruct(start.shape, "float32"), room
  )
  fresh = jax.jit(functools.partial(rollout.prefill, denoiser))(
    sampler.params, film[:, :4], two, empty
  )
  jax.tree.map(CLOSE, caches[4], fresh)


def test_a_switch_need_not_meet_a_segment():
  start, one = inputs(1)
  texts = Texts((0, 2, 4), (one, one + 5, one))
  film = made_in("", context_noise=0.3).extend(start, texts, 6, seed=5)
  cut = made_in("", context_noise=0.3, segment=2)
  CLOSE(cut.extend(start, texts, 6, seed=5), film)
  for starts in ((1, 2), (0, 2, 2)):
    with pytest.raises(UserError, match="later and later"):
      Texts(starts, (one,) * len(starts))


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_given_frames_of_an_unfinished_chunk_are_held(solver):
  """Three frames given, two a chunk: the third stands still while its chunk is
  made, at the chunk's own level."""
  config = tiny(chunk_frames=2)
  config.sampling.update(solver=solver, steps=3, segment=1)
  sampler = sampling.Sampler(config, weights(config))
  start, text = inputs(3)
  film = sampler.extend(start, text, 6, seed=2)
  np.testing.assert_array_equal(film[:, :3], start)
  # By hand.
  denoiser = sampler.denoiser()
  call = jax.jit(functools.partial(denoiser.cached, sampler.params))
  like = jax.ShapeDtypeStruct((2, 2, *start.shape[2:]), jnp.float32)
  cache = denoiser.init_cache(like, 3)
  _, cache = call(start[:, :2], jnp.zeros(2), text, cache, jnp.int32(0))
  key = jax.random.fold_in(jax.random.key(2), 1)
  noise = jax.random.normal(key, like.shape)

  def velocity(x, t, cache):
    known = (1 - t[0]) * start[:, 2:] + t[0] * noise[:, :1]
    x = jnp.concatenate([known, x[:, 1:]], 1)
    return call(x, t, text, cache, jnp.int32(1))

  grid = solvers.time_grid(3, config.sampling.shift)
  if solver == "euler":
    x = noise
    for t, then in itertools.pairwise(grid):
      v, cache = velocity(x, jnp.full(2, t), cache)
      x = x + (then - t) * v
  else:
    x, _ = solvers.solve(velocity, noise, jnp.ones(2), grid, cache, solver)
  CLOSE(film[:, 3], x[:, 1])


def test_prompts_say_when_they_begin(tmp_path):
  said = prompts.parse(["a@b 2s", "c@1.5s", "d@x@3s"])
  assert said == [(0, "a@b 2s"), (1.5, "c"), (3, "d@x")]
  file = tmp_path / "p.json"
  entries = [{"at": p.at, "prompt": p.text} for p in said]
  file.write_text(json.dumps(entries))
  assert prompts.read(file) == said
  begins = lambda chunk: 0.5 * chunk
  assert prompts.starts(said, begins, 8) == (0, 3, 6)
  for words, message in (
    (["a", "b"], "'b' is not the first"),
    (["a@1s"], "must be at 0 s"),
    (["a", "b@2s", "c@2s"], "2 s follows one at 2 s: times must increase"),
  ):
    with pytest.raises(UserError, match=message):
      prompts.parse(words)
  for late, message in (("b@9s", "too late: .* 3.5 s"), ("b@0s", "increase")):
    with pytest.raises(UserError, match=message):
      prompts.starts(prompts.parse(["a", late]), begins, 8)
  close = prompts.parse(["a", "b@1.1s", "c@1.4s"])
  with pytest.raises(UserError, match=r"same chunk .* 0.5 s apart"):
    prompts.starts(close, begins, 8)
  for text in ("{", "[]", '["a"]', '[{"at": "0", "prompt": "a"}]'):
    file.write_text(text)
    with pytest.raises(UserError, match="--prompts"):
      prompts.read(file)


# --- files that grow ---------------------------------------------------------


def film(frames, height=32, width=48):
  """Patches that change, uint8."""
  rng = np.random.default_rng(0)
  steps = rng.normal(size=(frames, height // 8, width // 8, 3))
  steps = (128 + 9 * np.cumsum(steps, 0)).clip(0, 255).astype(np.uint8)
  return steps.repeat(8, 1).repeat(8, 2)


def readable(path):
  """Frames that a player finds in a file right now."""
  with av.open(str(path)) as container:
    return sum(1 for _ in container.decode(video=0))


def test_a_file_plays_while_it_grows(tmp_path):
  frames, out = film(33), tmp_path / "new" / "x.mp4"
  with video_stream.VideoWriter(out, 16) as file:
    for first, end in ((0, 9), (9, 21), (21, 33)):
      file.write(frames[first:end])
      assert readable(out) == end - 1  # all but the last
  assert video.probe(out) == (33, 16, 32, 48)
  whole = video.read_clip(out, 0, 33)
  assert np.abs(whole.astype(int) - frames).mean() < 8
  np.testing.assert_array_equal(video.read_clip(out, 17, 7), whole[17:24])
  exact = tmp_path / "x.mkv"
  with video_stream.VideoWriter(exact, 16, scale=2) as file:
    file.write(video.to_float(frames[:5]))
    file.write(frames[5:])
  np.testing.assert_array_equal(
    video.read_clip(exact, 0, 33)[:, ::2, 1::2], frames
  )
  with video_stream.VideoWriter(tmp_path / "x.webp", 16) as file:
    file.write(frames[:3])
    assert not file.path.exists()
  with Image.open(tmp_path / "x.webp") as image:
    assert image.n_frames == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_what_was_written_stays_playable(error, tmp_path):
  """Whatever ends the making of a video."""
  out, frames, heard = tmp_path / "x.mp4", jnp.asarray(film(40)), []
  written = threading.Event()

  def hear(count):
    heard.append(count)
    written.set()

  def parts():
    yield frames[None, :12], 1
    assert written.wait(60)
    raise error("now")

  decode = lambda latents: [latents[0, :4], latents[0, 4:]]
  with pytest.raises(error), video_stream.VideoWriter(out, 16) as file:
    streaming.write(file, parts(), decode, 40, hear)
  assert readable(out) == sum(heard) == 12


def test_the_next_part_is_begun_before_the_last_is_fetched(tmp_path):
  begun = threading.Event()

  class Frames:
    """Like an array that a device has not made yet."""

    def __array__(self, *args, **kwargs):
      assert begun.wait(60)
      return np.zeros((4, 8, 8, 3), np.uint8)

  def parts():
    yield jnp.zeros(()), 1
    begun.set()
    yield jnp.zeros(()), 2

  with video_stream.VideoWriter(tmp_path / "x.mp4", 16) as file:
    decode = lambda latents: [Frames()]
    pace = streaming.write(file, parts(), decode, 6)
    assert file.frames == 6
  assert str(streaming.Pace(3.14, None)) == "first frames after 3.1 s"
  assert str(streaming.Pace(3, 0.8)).endswith("3.0 s, then 0.8 s a chunk")
  assert pace.first > 0 < pace.chunk


def test_a_writer_s_error_ends_the_making(tmp_path):
  asked = []

  def parts():
    for i in range(100):
      asked.append(i)
      yield jnp.zeros((1, 4, 8, 8, 3), jnp.uint8), 1

  class Full(video_stream.VideoWriter):
    def write(self, frames):
      raise UserError(f"{self.path}: no space left")

  with (
    pytest.raises(UserError, match="no space left"),
    Full(tmp_path / "x.mp4", 16) as file,
  ):
    streaming.write(file, parts(), lambda latents: [latents[0]], 400)
  assert len(asked) <= 4


# --- Wan ---------------------------------------------------------------------

pytest.importorskip("tokenizers")
pytest.importorskip("ftfy")
SIZE = ("--height", "32", "--width", "48", "--steps", "2")


@pytest.fixture(scope="module")
def on_latents(wan_ckpt, tmp_path_factory):
  """A run with the same weights, as training on latents leaves it."""
  workdir = tmp_path_factory.mktemp("latents")
  sampler = sampling.load(wan_ckpt)
  sampler.config.data.update(source="latents", path="gone")
  checkpoints = checkpoint.Checkpoints(workdir)
  record = {"config": config_lib.to_json(sampler.config)}
  checkpoints.save(5, {"ema": sampler.params}, record)
  checkpoints.close()
  return workdir


def sample(*words):
  return main.main(["sample", *map(str, words)])


def test_wan_extends_a_video_under_two_prompts(
  wan_ckpt, tmp_path, capsys, monkeypatch
):
  """Every stage against the parts it is made of."""
  clip = film(40)
  source, out = tmp_path / "in.mkv", tmp_path / "out.mp4"
  video.write_video(source, clip, 32)  # every other frame, at Wan's 16
  seen, write, load = [], video_stream.VideoWriter.write, sampling.load

  def watched(file, frames):
    write(file, frames)
    seen.append(frames)
    assert readable(out) >= file.frames - 1

  def freed(*args, **options):
    kinds = {(x.shape, str(x.dtype)) for x in jax.live_arrays()}
    assert ((tiny_wan.TEXT.vocab_size, 32), "bfloat16") not in kinds
    return load(*args, **options)

  monkeypatch.setattr(video_stream.VideoWriter, "write", watched)
  monkeypatch.setattr(generation.loading, "load", freed)
  said = ("--prompt", "a red boat", "--prompt", "a storm@1s")
  said += ("--negative-prompt", "blurred", "--seed", 3)
  given = ("--video", source, "--given", 13, "--frames", 30)
  assert not sample("--workdir", wan_ckpt, "--out", out, *said, *given, *SIZE)
  told = capsys.readouterr().out.splitlines()
  assert told[-2] == f"wrote {out}: 30 frames, the first 13 given"
  assert told[-1].startswith("first frames after")
  assert told[-1].endswith("s a chunk")
  assert video.probe(out) == (30, 16, 32, 48)

  texts = ["a red boat", "a storm", "blurred"]
  one, two, null = prompting.embed(wan_ckpt, texts, 512)
  assert np.abs(one - two).max() > 1e-3
  cfg, params = importing.load_vae(wan_ckpt)
  pixels = video.to_float(clip[:26:2])[None]
  latents = jax.jit(functools.partial(vae.encode, cfg))(params, pixels)
  assert latents.shape[1] == 4  # a chunk, and a frame that is held
  sampler = dataclasses.replace(load(wan_ckpt), null_text=null)
  assert sampler.config.sampling.guidance == 5
  assert sampler.config.sampling.segment == 1
  sampler.config.sampling.steps = 2
  # Chunks begin at frames 0, 9 and 21: the third is the first after 1 s.
  heard = Texts((0, 2), (one[None], two[None]))
  latents = sampler.extend(np.asarray(latents), heard, 9, seed=3)
  whole = jax.jit(functools.partial(vae.decode, cfg, chunk=None))(
    params, latents
  )
  CLOSE(np.concatenate(seen), whole[0, :30], atol=1e-3)


def test_wan_goes_on_from_an_image_in_a_run_on_latents(
  wan_ckpt, on_latents, tmp_path, capsys
):
  """The same weights make the same video; texts and VAE are from --wan."""
  image = tmp_path / "boat.png"
  Image.fromarray(film(1, 40, 48)[0]).save(image)
  words = ("--prompt", "a boat", "--frames", 2, "--video", image, *SIZE)
  first, second = tmp_path / "a.mkv", tmp_path / "b.mkv"
  assert not sample("--workdir", wan_ckpt, "--out", first, *words)
  told = capsys.readouterr().out
  assert "boat.png is 48x40, the video 48x32: 20.0 % of its height is" in told
  words += ("--workdir", on_latents, "--wan", wan_ckpt, "--guidance", 5)
  assert not sample("--out", second, *words)
  films = [video.read_clip(path, 0, 2) for path in (first, second)]
  np.testing.assert_array_equal(*films)


def test_several_devices_make_the_same_video(wan_ckpt, tmp_path, monkeypatch):
  """A chunk's tokens cut in two, and heads: two given chunks, one made."""
  clip, load, shares = tmp_path / "a.mkv", generation.loading.load, []
  video.write_video(clip, film(21), 16)

  def seen(workdir, mesh):
    sampler = load(workdir, mesh=mesh)
    keys = sampler._empty((1, 3, 4, 6, 16), 3).kv.k[0]
    shares.append(keys.sharding.shard_shape(keys.shape))
    return sampler

  monkeypatch.setattr(generation.loading, "load", seen)
  words = ("--workdir", wan_ckpt, "--prompt", "a", "--video", clip, *SIZE)
  words += ("--given", "21", "--frames", "33", "--config.model.dtype=float32")
  mesh = ("--config.mesh.context=2", "--config.mesh.tensor=2")
  first, second = tmp_path / "one.mkv", tmp_path / "four.mkv"
  assert not sample(*words, "--out", first)
  assert not sample(*words, "--out", second, *mesh)
  assert shares == [(2, 3, 18, 2, 128), (2, 3, 9, 1, 128)]  # guided
  one, four = (
    video.read_clip(path, 0, 33).astype(int) for path in (first, second)
  )
  assert one[21:].std() > 5
  assert np.abs(one - four).max() <= 1


def test_what_generation_refuses(
  wan_ckpt, on_latents, tmp_path, capsys, monkeypatch
):
  monkeypatch.delattr(generation, "_embed")  # nothing comes so far
  image, clip = tmp_path / "a.png", tmp_path / "a.mkv"
  Image.fromarray(film(1)[0]).save(image)
  video.write_video(clip, film(21), 16)
  whole = ("--video", clip, "--given", "21")  # two chunks
  (tmp_path / "file").write_text("")
  before = {file: file.read_bytes() for file in tmp_path.iterdir()}
  ours = ("--workdir", wan_ckpt, "--prompt", "a")
  for words, message in (
    (("--workdir", wan_ckpt), "give --prompt"),
    (("--workdir", on_latents, "--prompt", "a"), "has no vae of its own: give"),
    ((*ours, "--wan", tmp_path), "has no vae: avd import-wan"),
    (
      ("--workdir", wan_ckpt, "--prompt", "x " * 600),
      "would be cut; shorten it, or --cut-prompts",
    ),
    ((*ours, "--prompt", "b"), "'b' is not the first"),
    ((*ours, "--prompt", "b@9s"), "too late: the last chunk begins at 4.3"),
    ((*ours, "--prompts", "p.json"), "--prompt and --prompts"),
    (
      ("--workdir", wan_ckpt, "--prompts", "p.json"),
      "p.json: no such file",
    ),
    ((*ours, "--height", "40"), "--height 40: give a multiple of 16, 32 is"),
    ((*ours, "--width", "0"), "--width 0: give a multiple of 16"),
    ((*ours, "--seconds", "0"), "--seconds 0.0: must be positive"),
    ((*ours, "--seconds", "1", "--frames", "9"), "both say how long"),
    ((*ours, "--given", "5"), "--given 5: of which video or image?"),
    ((*ours, "--video", clip), "--video needs --given"),
    ((*ours, "--video", clip, "--given", "6"), "1 + a multiple of 4 frames, 5"),
    ((*ours, "--video", clip, "--given", "25"), "asked for 25 frames"),
    ((*ours, "--video", image, "--given", "5"), "is an image, 1 frame"),
    ((*ours, "--video", image, "--frames", "1"), "1 are given: nothing is"),
    (
      (*ours, "--video", image, "--fit", "refuse"),
      "a.png is 48x32, the video 832x480: 13.5 % of its height would be",
    ),
    ((*ours, "--video", "no.png"), "no.png: no such file"),
    ((*ours, "--video", tmp_path / "file"), "--video needs --given"),
    ((*ours, "--out", tmp_path / "file" / "x.mp4"), "Not a directory"),
    ((*ours, "--out", tmp_path / "x.avi"), "x.avi: give one of"),
    ((*ours, "--out", clip), "a.mkv exists: give another file, or --overwrite"),
    ((*ours, *whole, "--out", clip, "--overwrite"), "a.mkv is --video itself"),
    ((*ours, *whole, "--config.sampling.recompute=2"), "2 given chunks fill"),
    ((*ours, *SIZE, "--config.mesh.context=4"), "18 tokens of a chunk are"),
    ((*ours, "--config.mesh.tensor=16"), "does not fit 8 devices"),
    ((*ours, "--config.mesh.context=-1"), "mesh.context -1: say how many"),
    ((*ours, "--config.mesh.fsdp=2"), "mesh.fsdp: cannot change"),
    ((*ours, "--config.model.attention.implementation=cudnn"), "'cudnn': it"),
  ):
    out = () if "--out" in words else ("--out", tmp_path / "x.mp4")
    assert sample(*words, *out) == 2, words
    line = capsys.readouterr().err
    assert message in line, line
    assert line.count("\n") == 1
  after = {file: file.read_bytes() for file in tmp_path.iterdir()}
  assert after == before


def test_a_streamed_decoding_is_the_whole_one(wan_ckpt):
  """However the latents come."""
  config = sampling.read_config(wan_ckpt)
  decode = spaces.of(config, wan_ckpt, None).decode(32, 48)
  latents = jax.random.normal(jax.random.key(0), (1, 9, 4, 6, 16))
  parts = [decode(part) for part in jnp.split(latents, [1, 6], 1)]
  cfg, params = importing.load_vae(wan_ckpt)
  whole = jax.jit(functools.partial(vae.decode, cfg, chunk=None))(
    params, latents
  )
  CLOSE(np.concatenate([x for part in parts for x in part]), whole[0])
