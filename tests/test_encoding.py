"""Videos to latents: every clip once, whatever stops the work on the way."""

import functools
import hashlib
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax import disk
from avd_jax.cli import main
from avd_jax.data import aggregate, latent_store, video
from avd_jax.errors import UserError
from avd_jax.models import umt5, vae
from avd_jax.wan import encoding, importing, prompting, tiny, tokenizer

pytest.importorskip("tokenizers")
pytest.importorskip("ftfy")

SIZE = {"frames": 5, "height": 16, "width": 32, "fps": None}
LENGTHS = {"a.mkv": 12, "b.mkv": 7, "deep/c.mkv": 12, "e.mkv": 5, "f.mkv": 3}
CAPTIONS = {"a.mkv": "a red ball", "c.mkv": "ball " * 600, "e.mkv": "two boats"}
# Clips in order: (file, first frame). bad and f have none.
CLIPS = [
  *(("a.mkv", start) for start in (1, 4, 6)),
  *(("b.mkv", start) for start in (0, 1, 2)),
  *(("deep/c.mkv", start) for start in (1, 4, 6)),
  ("e.mkv", 0),
]


def film(name):
  rng = np.random.default_rng(len(name) + LENGTHS[name])
  return rng.integers(0, 256, (LENGTHS[name], 16, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def encoder(wan_ckpt):
  return encoding.Encoder(wan_ckpt)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
  folder = tmp_path_factory.mktemp("videos")
  for name in LENGTHS:
    video.write_video(folder / name, film(name), 12)
  (folder / "bad.mkv").write_bytes(b"no video" * 99)
  return folder


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
  file = tmp_path_factory.mktemp("captions") / "captions.json"
  file.write_text(json.dumps(CAPTIONS))
  return file


@pytest.fixture(scope="module")
def encode(encoder, videos, captions):
  """(out, other options) -> what a run says it did."""

  def run(out, **options):
    options = dict(clips_per_video=3, shard_size=4) | SIZE | options
    options = encoding.Options(**options)
    return encoding.run(encoder, videos, captions, out, options)

  return run


@pytest.fixture(scope="module")
def store(encode, tmp_path_factory):
  """(path, what was done)."""
  path = tmp_path_factory.mktemp("store")
  return path, encode(path)


def contents(path):
  files = [file for file in path.rglob("*") if file.is_file()]
  files = {f.relative_to(path).as_posix(): f.read_bytes() for f in files}
  assert files
  return files


def test_clips_are_what_vae_and_text_encoder_say(store, videos, wan_ckpt):
  path, _ = store
  source = latent_store.LatentSource(path, 2, text_dim=tiny.TEXT.dim)
  headers = [source.header(i) for i in range(len(source))]
  assert [(h["file"], h["start"]) for h in headers] == CLIPS
  cfg, params = importing.load_vae(wan_ckpt)
  whole = jax.jit(functools.partial(vae.encode, cfg, chunk=None))
  bf16 = latent_store.DTYPE
  for i in (2, 4):
    name, start = CLIPS[i]
    pixels = video.to_float(film(name)[start : start + 5])[None]
    wanted = whole(params, jnp.asarray(pixels))[0]
    # Frame after frame there, all at once here: the last bit may differ.
    np.testing.assert_allclose(source[i]["video"], wanted, rtol=1e-2, atol=1e-2)
    again = source[i]["video"].astype(bf16).astype(np.float32)
    np.testing.assert_array_equal(again, source[i]["video"])
  cfg, params = importing.load_text_encoder(wan_ckpt)
  told = ["a red ball", "two boats", ""]
  ids, lengths = tokenizer.load(wan_ckpt).encode(told, 512)
  embed = jax.jit(umt5.encode, static_argnums=1)
  each = [slice(i, i + 1) for i in range(len(told))]
  wanted = [embed(params, cfg, ids[i], lengths[i])[0] for i in each]
  found = [source[0]["text"], source[9]["text"], source.null_text]
  np.testing.assert_array_equal(found, np.asarray(wanted, np.float32))
  np.testing.assert_array_equal(found, prompting.embed(wan_ckpt, told, 512))
  short, most = max(lengths) - 2, max(lengths)
  cut = rf"it has {most} tokens, at most {short} fit: 2 would be cut"
  with pytest.raises(UserError, match=cut):
    prompting.check(wan_ckpt, told, int(short))
  longest = told[int(np.argmax(lengths))]
  (line,) = prompting.check(wan_ckpt, [longest], int(short), cut=True)
  assert line.endswith(f"at most {short} fit: 2 are cut")
  text, lost = prompting.TextEncoder(wan_ckpt, int(short))(longest)
  assert lost == 2
  kept = prompting.embed(wan_ckpt, [longest], int(short))[0]
  np.testing.assert_array_equal(kept, text.astype(np.float32))
  for text, length in zip(found, lengths, strict=True):
    assert np.abs(text[:length]).max(1).min() > 0
    assert not text[length:].any()
  kept = [headers[0]["text"], headers[9]["text"]]
  assert kept == [[length, tiny.TEXT.dim] for length in lengths[:2]]
  first = (videos / "a.mkv").read_bytes()
  digest = hashlib.sha256(first).hexdigest()
  assert headers[0]["sha256_of_first_mib"] == digest
  assert headers[0]["bytes"] == len(first)
  assert (headers[0]["fps"], headers[0]["stride"]) == (12, 1)
  assert (headers[0]["caption"], headers[0]["tokens_cut"]) == ("a red ball", 0)
  assert headers[6]["tokens_cut"] > 0


def test_what_was_left_out_or_altered_is_listed(store):
  path, done = store
  listed = json.loads((path / "part_000" / "skipped.json").read_text())
  bad, short = listed["skipped"]
  assert bad["file"] == "bad.mkv"
  assert "not a video" in bad["reason"]
  assert short["file"] == "f.mkv"
  assert "3 frames, 5 needed" in short["reason"]
  assert listed["uncaptioned"] == ["b.mkv"]
  lost = latent_store.LatentSource(path, 2).header(6)["tokens_cut"]
  assert listed["cut"] == [{"file": "deep/c.mkv", "tokens": lost}]
  assert lost > 0
  assert listed["partial"] == []
  assert done.records == len(CLIPS)
  assert [shard["records"] for shard in done.shards] == [4, 4, 2]


class Killed(Exception):
  """Stands for the end of the process."""


def dies(function, call):
  """`function`, but the process ends in this call of it (from 0)."""
  calls = iter(range(1000))

  def wrapped(*args):
    if next(calls) == call:
      raise Killed
    return function(*args)

  return wrapped


def torn(call):
  """`aggregate.write_shard`, killed in the middle of this call."""
  calls, write = iter(range(99)), aggregate.write_shard

  def wrapped(file, records):
    if next(calls) == call:
      file.with_name(file.name + ".part").write_bytes(b"".join(records)[:999])
      raise Killed
    write(file, records)

  return wrapped


def lost(call):
  """`latent_store.save`, killed before the index has its name."""
  calls, save = iter(range(99)), latent_store.save

  def wrapped(path, process, done):
    if next(calls) == call:
      file = latent_store.part(path, process) / "index.json.part"
      file.write_text("{")
      raise Killed
    save(path, process, done)

  return wrapped


@pytest.mark.parametrize(
  "deaths",
  [
    # In clips: of the second shard, its last one, and the third shard's first.
    [("latents", 5), ("latents", 3), ("latents", 0)],
    # The store's own file, the null text, the first shard, the second one;
    # then a shard that is whole, but not yet in the index.
    [("store", 0), *(("torn", i) for i in (0, 1, 1)), ("index", 0)],
    # The lists at the end, the index after them.
    [("json", 2), ("json", 1)],
  ],
)
def test_killed_anywhere_it_ends_the_same(
  encode, encoder, store, tmp_path, monkeypatch, deaths
):
  for what, call in deaths:
    with monkeypatch.context() as patch:
      if what == "latents":
        patch.setattr(encoder, "latents", dies(encoder.latents, call))
      elif what in ("store", "json"):
        name = {"store": "create_json", "json": "write_json"}[what]
        patch.setattr(disk, name, dies(getattr(disk, name), call))
      elif what == "index":
        patch.setattr(latent_store, "save", lost(call))
      else:
        patch.setattr(aggregate, "write_shard", torn(call))
      with pytest.raises(Killed):
        encode(tmp_path)
  with pytest.raises(UserError, match=r"not finished|no store"):
    latent_store.LatentSource(tmp_path, 2)
  encode(tmp_path)
  assert contents(tmp_path) == contents(store[0])


def test_work_that_is_done_is_not_done_again(encode, store, monkeypatch):
  before = contents(store[0])
  monkeypatch.setattr(encoding.Encoder, "latents", None)
  assert encode(store[0]) == store[1]
  assert contents(store[0]) == before


def test_two_processes_write_what_one_does(encode, store, tmp_path):
  encode(tmp_path, process_count=2, process_index=1)
  with pytest.raises(UserError, match="part 0 of 2 is not finished"):
    latent_store.LatentSource(tmp_path, 2)
  encode(tmp_path, process_count=2, process_index=0)
  one, two = (latent_store.LatentSource(p, 2) for p in (store[0], tmp_path))
  assert len(one) == len(two) == len(CLIPS)
  for i in range(len(one)):
    assert one.header(i) == two.header(i)
    for name in ("video", "text"):
      np.testing.assert_array_equal(one[i][name], two[i][name])


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({"clips_per_video": 2}, "begun with clips_per_video 3, not 2"),
    ({"shard_size": 9, "fps": 4.0}, "fps None, not 4.0; shard_size 4, not 9"),
    ({"process_count": 2}, "processes 1, not 2"),
    ({"frames": 9}, r"shape \(2, 2, 4, 16\), not \(3, 2, 4, 16\)"),
    ({"frames": 7}, "--frames 7: give 1 .* 4, [59] is the nearest"),
    ({"frames": 0}, "--frames 0: .* 1 is the nearest"),
    ({"width": 40}, "--width 40: give a multiple of 16, 32 is the nearest"),
    ({"height": 0}, "--height 0: .* 16 is the nearest"),
    ({"fps": 0.0}, "--fps 0.0"),
    ({"fps": float("nan")}, "--fps nan"),
    ({"shard_size": 0}, "--shard-size 0: at least 1"),
    ({"process_index": 1}, "--process-index 1"),
  ],
)
def test_settings_that_cannot_be_are_refused(encode, store, changed, message):
  before = contents(store[0])
  with pytest.raises(UserError, match=message):
    encode(store[0], **changed)
  assert contents(store[0]) == before


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("gone.json", None, "no such file"),
    ("a.yaml", "", "give a .json, .csv or .tsv"),
    ("a.json", "{", "not valid JSON"),
    ("a.json", '{"a.mkv": 3}', "give an object"),
    ("a.json", '["a.mkv"]', "give an object"),
    ("a.json", '{"z.mkv": "x"}', "names none of the 6 videos"),
    ("a.csv", "video,text\na.mkv,x\n", "columns file and caption"),
    ("a.csv", "", "columns file and caption"),
    ("a.csv", "file,caption\na.mkv\n", "line 2 lacks"),
    ("a.tsv", "file\tcaption\na\tx\na\ty\n", "two captions for a"),
    ("a.csv", b"\xff\xfe", "not UTF-8"),
  ],
)
def test_captions_that_cannot_be_read(
  encoder, videos, tmp_path, name, text, message
):
  if text is not None:
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / name).write_bytes(data)
  options = encoding.Options(**SIZE)
  out = tmp_path / "out"
  with pytest.raises(UserError, match=message):
    encoding.run(encoder, videos, tmp_path / name, out, options)
  assert not out.exists()


def test_tables_hold_any_caption(tmp_path):
  (tmp_path / "a.csv").write_text('caption,file\n"a, ""b""\nc",x/a.mp4\n')
  assert encoding.read_captions(tmp_path / "a.csv") == {"x/a.mp4": 'a, "b"\nc'}
  (tmp_path / "a.tsv").write_text("\ufefffile\tcaption\na.mp4\tä, b\n")
  assert encoding.read_captions(tmp_path / "a.tsv") == {"a.mp4": "ä, b"}


def test_a_store_begins_in_a_place_of_its_own(encode, videos, tmp_path):
  for name in ("1.txt", "2.txt", "3.txt", "4.txt"):
    (tmp_path / name).write_text("mine")
  for out, message in (
    (tmp_path / "1.txt", "1.txt is a file: give a directory"),
    (tmp_path, r"is no store \(it holds 1.txt, 2.txt, 3.txt and 1 more\)"),
    (videos, r"is no store \(it holds a.mkv, b.mkv, bad.mkv and 3 more\)"),
  ):
    with pytest.raises(UserError, match=message):
      encode(out)
  assert len(list(tmp_path.iterdir())) == 4
  assert not (videos / "store.json").exists()


def test_other_weights_have_another_name(encoder, wan_ckpt):
  other = encoding.Encoder(wan_ckpt)
  names = lambda encoder: (encoder.name, encoder.text_encoder)
  assert names(other) == names(encoder)
  cfg, params = other._vae
  kernels = params["encoder"]["conv_in"]
  other._vae = (cfg, params | {"encoder": {"conv_in": kernels}})
  assert other.name != encoder.name
  assert other.text_encoder == encoder.text_encoder


def test_the_program_encodes_a_folder(
  wan_ckpt, videos, tmp_path, capsys, monkeypatch
):
  folder = tmp_path / "videos"
  folder.mkdir()
  for name in ("a.mkv", "bad.mkv", "b.mkv"):
    (folder / name).write_bytes((videos / name).read_bytes())
  whole = (folder / "a.mkv").read_bytes()
  (folder / "part.mkv").write_bytes(whole[: len(whole) * 9 // 10])
  (folder / "short.mkv").write_bytes(whole[: len(whole) // 2])
  (folder / "a.txt").write_text("a red ball\n")
  (folder / "part.txt").write_text("ball " * 600)
  out = tmp_path / "out"
  command = [
    "encode",
    "--videos",
    str(folder),
    "--checkpoint",
    str(wan_ckpt),
  ]
  command += ["--out", str(out), "--height", "16", "--width", "32"]
  with warnings.catch_warnings():
    warnings.simplefilter("error", UserWarning)
    assert main.main([*command, "--frames", "5", "--fps", "6"]) == 0
  line = capsys.readouterr().out.splitlines()[-1]
  assert "2 clips in 1 shards, 3 skipped (b.mkv, bad.mkv, short.mkv)" in line
  kept = video.probe(folder / "part.mkv").frames
  assert f"1 that end early (part.mkv: {kept} of 12 frames)" in line
  assert re.search(r"1 with a caption cut short \(part.mkv: \d+ tokens\)", line)
  assert line.endswith("skipped.json")
  listed = json.loads((out / "part_000" / "skipped.json").read_text())
  assert "needed (it ends early, 12 were" in listed["skipped"][-1]["reason"]
  source = latent_store.LatentSource(out, 1)
  header = source.header(0)
  assert (header["caption"], header["stride"]) == ("a red ball", 2)
  assert (header["start"], header["fps"]) == (2, 6)
  assert main.main([*command, "--frames", "6"]) == 2
  assert "--frames 6" in capsys.readouterr().err
  missing = ["--videos", str(tmp_path / "gone"), "--frames", "5"]
  assert main.main([*command, *missing]) == 2
  assert "gone: no such folder" in capsys.readouterr().err
