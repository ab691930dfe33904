"""Wan's files in and out: every layout, bit by bit; and what is refused."""

import dataclasses
import json
import os
import pickle
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax import checkpoint, parallel, sampling
from avd_jax import config as config_lib
from avd_jax.cli import main as cli
from avd_jax.errors import UserError
from avd_jax.models import denoiser
from avd_jax.models.dit_config import DiTConfig
from avd_jax.training import loop
from avd_jax.training.program import Program
from avd_jax.wan import (
  exporting,
  importing,
  readers,
  sources,
  tiny,
  trees,
  writers,
)

pytest.importorskip("tokenizers")

INDEX = "diffusion_pytorch_model.safetensors.index.json"
WHOLE = "diffusion_pytorch_model.safetensors"
VAE_FILE, TEXT_FILE = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"


@pytest.fixture(scope="module")
def wans(tmp_path_factory):
  """A tiny Wan in every layout."""
  root = tmp_path_factory.mktemp("wans")
  for layout in tiny.LAYOUTS:
    tiny.run(root / layout, layout)
  return root


@pytest.fixture(scope="module")
def imported(wans, tmp_path_factory):
  """A checkpoint of each."""
  root = tmp_path_factory.mktemp("imported")
  for layout in tiny.LAYOUTS:
    importing.run(wans / layout, root / layout)
  return root


def held(ckpt):
  """All leaves of a checkpoint: {(component, path): array}."""
  places = {
    "dit": ("checkpoints/0/ema", "ema"),
    "vae": ("vae/params", "params"),
    "text": ("text/params", "params"),
  }
  return {
    (component, path): leaf
    for component, (place, name) in places.items()
    if (ckpt / place).is_dir()
    for path, leaf in trees.saved(ckpt / place, name).each()
  }


def equal(a, b):
  assert set(a) == set(b)
  for name, x in a.items():
    assert x.dtype == b[name].dtype, name
    np.testing.assert_array_equal(x, b[name], err_msg=str(name))


def copied(path, to):
  """A directory again, to be damaged."""
  for file in path.rglob("*"):
    if file.is_file():
      place = to / file.relative_to(path)
      place.parent.mkdir(parents=True, exist_ok=True)
      place.write_bytes(file.read_bytes())
  return to


def test_layouts_hold_the_same_model(imported):
  original = held(imported / "original")
  assert {component for component, _ in original} == set(sources.COMPONENTS)
  equal(held(imported / "diffusers"), original)
  forced = held(imported / "self-forcing")
  half = {
    name: x.astype(jnp.bfloat16)
    for name, x in original.items()
    if name[0] == "dit"
  }
  equal(forced, half)  # and so it was the average that was taken
  for name in ("tokenizer.json", "config.json"):
    files = [imported / layout / name for layout in ("original", "diffusers")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("layout", ["original", "self-forcing"])
def test_what_went_in_comes_out(imported, tmp_path, layout):
  exporting.run(imported / layout, tmp_path / "out")
  importing.run(tmp_path / "out", tmp_path / "again")
  equal(held(tmp_path / "again"), held(imported / layout))
  whole = tmp_path / "out" / "transformer" / WHOLE
  dtype = "bfloat16" if layout == "self-forcing" else "float32"
  for name, x in tiny.weights("dit", "diffusers", 0, jnp.dtype(dtype)).items():
    np.testing.assert_array_equal(readers.read(whole)[name].view(), x)


def test_safetensors_reads_what_is_written(wans):
  numpy = pytest.importorskip("safetensors.numpy")
  for path in wans.rglob("*.safetensors"):
    ours = readers.read(path)
    equal({k: s.view() for k, s in ours.items()}, numpy.load_file(path))


def test_what_safetensors_writes_is_read(tmp_path):
  numpy = pytest.importorskip("safetensors.numpy")
  tree = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones((3, 1), jnp.bfloat16),
    "c": np.float16(7).reshape(1),
  }
  numpy.save_file(tree, tmp_path / "x.safetensors", {"made": "by hand"})
  read = readers.read(tmp_path / "x.safetensors")
  equal({k: stored.view() for k, stored in read.items()}, tree)


@pytest.fixture(scope="module")
def restored(imported):
  """The transformer as training and sampling restore it."""
  checkpoints, step = checkpoint.open_existing(imported / "self-forcing")
  record = checkpoints.record(step)
  config = config_lib.from_json(record["config"])
  assert step == record["step"] == 0
  x = jax.ShapeDtypeStruct((1, 3, 2, 2, 16), jnp.float32)
  text = jax.ShapeDtypeStruct((1, 4, tiny.DIT.text_dim), jnp.float32)
  target = denoiser.abstract_params(tiny.DIT, x, text)
  params = checkpoints.restore(step, {"ema": target})["ema"]
  checkpoints.close()
  return config, params


def test_a_run_starts_from_an_import(wans, imported, restored):
  config, params = restored
  wide = dataclasses.replace(tiny.DIT, dtype="bfloat16")  # to compute in
  assert config_lib.typed(DiTConfig, config.model) == wide
  path = imported / "self-forcing" / "config.json"
  assert config_lib.to_json(config) == json.loads(path.read_text())
  cfg, straight = importing.load_dit(wans / "self-forcing")
  assert cfg == tiny.DIT
  equal(trees.flat(straight), trees.flat(params))
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_chunks_one_by_one_are_chunks_at_once(restored):
  """Three frames a chunk, 512 text vectors most of which are zero."""
  _, params = restored
  model = denoiser.make(tiny.DIT)
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (1, 9, 4, 6, 16))
  t = jax.random.uniform(keys[1], (1, 3))
  text = jax.random.normal(keys[2], (1, 512, tiny.DIT.text_dim))
  text = text.at[:, 7:].set(0)
  want = jax.jit(model.parallel)(params, x, t, text)
  cached = jax.jit(model.cached)
  cache, parts = model.init_cache(x[:, :3], 3), []
  for i in range(3):
    chunk = x[:, 3 * i : 3 * i + 3]
    v, cache = cached(params, chunk, t[:, i], text, cache, jnp.int32(i))
    parts.append(v)
  scale = jnp.abs(want).max()
  assert scale > 0.1
  np.testing.assert_allclose(
    jnp.concatenate(parts, 1), want, atol=2e-5 * float(scale)
  )


def mesh():
  """data 1, fsdp 2, context 2, tensor 2."""
  return parallel.make_mesh(jax.devices(), (1, 2, 2, 2))


def test_files_are_read_straight_onto_a_mesh(wans):
  _, whole = importing.load_dit(wans / "diffusers")
  _, spread = importing.load_dit(wans / "diffusers", mesh())
  equal(trees.flat(spread), trees.flat(whole))
  kernel = spread["blocks"]["q"]["kernel"]
  assert kernel.shape == (2, 256, 256)
  assert kernel.addressable_shards[0].data.shape == (2, 128, 128)


def test_training_starts_straight_from_files(wans, imported, restored):
  """Each device reads its share, and what it starts with is what it reads."""
  config, params = restored
  config = config_lib.from_json(config_lib.to_json(config))
  config.init_from = str(wans / "self-forcing")
  program = Program(config, mesh())
  start = loop.initial_weights(config, program)
  equal(trees.flat(start), trees.flat(params))
  wanted = jax.tree.map(lambda x: x.sharding, program.abstract_state().ema)
  assert jax.tree.map(lambda x: x.sharding, start) == wanted
  config.model.num_layers = 3
  with pytest.raises(UserError, match=r"another model \(model.num_layers"):
    loop.initial_weights(config, program)
  # A run is a run, whatever else lies there.
  config.model.num_layers = 2
  run, stray = imported / "self-forcing", imported / "self-forcing" / "x.pt"
  stray.write_bytes(b"")
  config.init_from = str(run)
  equal(trees.flat(loop.initial_weights(config, program)), trees.flat(params))
  stray.unlink()
  config.init_from = str(wans / "original" / "Wan2.1_VAE.pth")
  with pytest.raises(UserError, match=r"init_from: .*no dit there"):
    loop.initial_weights(config, program)


def test_a_part_of_a_leaf_is_a_part_of_it(wans):
  _, found = importing.read(sources.find(wans / "original", "dit")[0])
  for name, index in (
    ("blocks/ffn/up/kernel", (slice(1, 2), slice(3, 9), slice(None, None, 7))),
    ("head/kernel", (slice(5), slice(2, 4))),
    ("patch_embedding/kernel", (slice(None), slice(1, 3))),
  ):
    leaf = found[name]
    np.testing.assert_array_equal(leaf.read(index), leaf.read()[index])


def test_layers_of_several_types_become_float32(wans, tmp_path):
  source = copied(wans / "original", tmp_path / "source")
  name = "blocks.1.ffn.0.bias"
  half = lambda t: t.update({name: t[name].astype(jnp.bfloat16)})
  with_tensors(source / WHOLE, half)
  importing.run(source, tmp_path / "out", "dit")
  leaf = held(tmp_path / "out")["dit", "blocks/ffn/up/bias"]
  want = tiny.weights("dit", "original", 0)
  assert leaf.dtype == np.float32
  np.testing.assert_array_equal(leaf[0], want["blocks.0.ffn.0.bias"])
  np.testing.assert_array_equal(leaf[1], want[name].astype(jnp.bfloat16))


def test_the_vae_and_the_text_encoder_are_loaded(wans, imported):
  ckpt = imported / "original"
  cfg, params = importing.load_vae(ckpt)
  assert cfg == tiny.VAE
  want = tiny.weights("vae", "original", 0)["encoder.conv1.bias"]
  np.testing.assert_array_equal(params["encoder"]["conv_in"]["bias"], want)
  cfg, params = importing.load_text_encoder(ckpt)
  assert cfg == tiny.TEXT
  assert params["token_embedding"].dtype == jnp.bfloat16
  _, spread = importing.load_text_encoder(ckpt, mesh())
  equal(trees.flat(spread), trees.flat(params))
  assert not params["blocks"]["q"]["kernel"].sharding.is_equivalent_to(
    spread["blocks"]["q"]["kernel"].sharding, 3
  )


def test_components_of_several_sources_come_together(wans, tmp_path):
  out = tmp_path / "out"
  importing.run(wans / "self-forcing" / "self_forcing_dmd.pt", out)
  with pytest.raises(UserError, match="no vae"):
    importing.load_vae(out)
  importing.run(wans / "original" / VAE_FILE, out)
  importing.run(wans / "diffusers" / "text_encoder", out)
  assert len(held(out)) == 200
  assert (out / "tokenizer.json").is_file()


def test_only_what_is_being_written_is_in_memory(tmp_path, monkeypatch):
  class Leaf:
    """A megabyte of rows, made when asked for."""

    shape, dtype = (256, 1024), np.dtype(np.float32)

    def read(self, index=()):
      rng = np.random.default_rng(0)
      return rng.standard_normal(self.shape, np.float32)[index]

  monkeypatch.setattr(trees, "_CHUNK_BYTES", 1 << 16)
  tracemalloc.start()
  trees.save(tmp_path / "x", "x", {f"leaf_{i}": Leaf() for i in range(8)})
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 4 << 20
  for _, leaf in trees.saved(tmp_path / "x", "x").each():
    np.testing.assert_array_equal(leaf, Leaf().read())


class Command:
  """Unpickled by Python's own pickle, this would make a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def test_a_pickle_runs_nothing(tmp_path):
  bad = tmp_path / "bad.pt"
  with zipfile.ZipFile(bad, "w") as archive:
    content = pickle.dumps({"w": Command(tmp_path / "made")}, 2)
    archive.writestr("bad/data.pkl", content)
  with pytest.raises(UserError, match=r"wants to run .*mkdir: refused"):
    importing.run(bad, tmp_path / "out")
  assert not (tmp_path / "made").exists()
  assert not (tmp_path / "out").exists()


def truncated(path, share=0.5):
  path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def with_tensors(path, change):
  """A safetensors file again, its tensors changed."""
  tensors = {k: s.view().copy() for k, s in readers.read(path).items()}
  change(tensors)
  kinds = [(k, x.shape, x.dtype) for k, x in tensors.items()]
  with writers.Safetensors(path, kinds) as file:
    for name, x in tensors.items():
      file.put(name, x)


def drop(name):
  return lambda d: with_tensors(d / WHOLE, lambda t: t.pop(name))


def put(name, shape):
  zeros = np.zeros(shape, np.float32)
  return lambda d: with_tensors(d / WHOLE, lambda t: t.update({name: zeros}))


def quantized(d):
  raw = (d / WHOLE).read_bytes()
  (d / WHOLE).write_bytes(raw.replace(b'"F32"', b'"I32"'))


def fp8(d):
  raw = (d / WHOLE).read_bytes()
  (d / WHOLE).write_bytes(raw.replace(b'"F32"', b'"F8_E4M3"', 1))


def heads(value):
  """A config.json that says so many."""
  names = '"_class_name": "WanModel", "architectures": null'
  text = f'{{{names}, "num_heads": {value}}}'
  return lambda d: (d / "config.json").write_text(text)


@pytest.mark.parametrize(
  ("damage", "words"),
  [
    (lambda d: truncated(d / WHOLE), "truncated: .* ends at byte"),
    (lambda d: truncated(d / WHOLE, 1e-5), "damaged or truncated"),
    (lambda d: (d / WHOLE).write_bytes(b"no" * 99), "damaged or truncated"),
    (lambda d: truncated(d / VAE_FILE), r"VAE\.pth is truncated"),
    (lambda d: (d / VAE_FILE).write_bytes(b"\x80\x02}q."), "an old torch file"),
    (lambda d: (d / VAE_FILE).write_bytes(b"<html>"), "not a torch file"),
    (drop("head.head.bias"), "lacks 1 of the 69 tensors .*: head.head.bias"),
    (put("blocks.0.extra", (3,)), "1 tensors that .* not have: blocks.0.extra"),
    (
      put("blocks.1.ffn.0.bias", (511,)),
      r"blocks\.1\.ffn\.0\.bias is \(511,\), but .* has \(512,\)",
    ),
    (put("img_emb.proj.0.weight", (4,)), "image-to-video"),
    (put("patch_embedding.weight", (256, 36, 1, 2, 2)), "image-to-video"),
    (put("vace_blocks.0.x", (4,)), "VACE"),
    (quantized, "is int32; give the float32 or bfloat16"),
    (fp8, "F8_E4M3 .fp8., which is not read"),
    (
      lambda d: (d / "config.json").write_text(
        '{"_class_name": "WanModel", "num_layers": 30}'
      ),
      "num_layers 30, but the tensors have 2",
    ),
    (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
    (heads("3"), r"config.json: model.dim 256 is not divisible by .* 3"),
    (heads("0"), r"config.json: model.num_heads 0: not positive"),
    (heads('"two"'), r"config.json: num_heads is 'two': give a number"),
  ],
)
def test_damaged_and_other_files_are_named(wans, tmp_path, damage, words):
  source = copied(wans / "original", tmp_path / "source")
  damage(source)
  with pytest.raises(UserError, match=words):
    importing.run(source, tmp_path / "out")
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
  ("damage", "words"),
  [
    (lambda d: next(d.glob("*-00002-*")).unlink(), "00002.* does not exist"),
    (lambda d: (d / INDEX).unlink(), f"{INDEX} is missing"),
    (
      lambda d: (d / INDEX).write_text(
        (d / INDEX).read_text().replace("proj_out", "proj_in")
      ),
      r"holds proj_in\.\w+: it does not",
    ),
    *(
      (lambda d, text=text: (d / INDEX).write_text(text), f"{INDEX} is damaged")
      for text in (
        "[1]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
      )
    ),
  ],
)
def test_shards_that_do_not_fit_are_named(wans, tmp_path, damage, words):
  source = copied(wans / "diffusers" / "transformer", tmp_path / "source")
  damage(source)
  with pytest.raises(UserError, match=words):
    importing.run(source, tmp_path / "out")


def test_a_storage_that_is_packed_or_short_is_refused(tmp_path):
  tree = {"w": np.zeros((4, 4), np.float32)}
  writers.write_torch(tmp_path / "good.pt", tree)
  with zipfile.ZipFile(tmp_path / "good.pt") as good:
    content = good.read("good/data.pkl")
  for name, size, how in (
    ("packed", 64, zipfile.ZIP_DEFLATED),
    ("short", 60, zipfile.ZIP_STORED),
  ):
    with zipfile.ZipFile(tmp_path / f"{name}.pt", "w", how) as archive:
      archive.writestr("x/data.pkl", content)
      archive.writestr("x/data/0", bytes(size))
    with pytest.raises(UserError, match="damaged: storage"):
      readers.read(tmp_path / f"{name}.pt")


def said(capsys, *arguments):
  """What a mistaken command prints: one line, exit code 2."""
  assert cli.main([str(a) for a in arguments]) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ")
  assert err.count("\n") == 1
  return err


def test_the_three_jobs(tmp_path, capsys):
  small, ckpt, out = (tmp_path / name for name in ("small", "ckpt", "out"))
  make = ("make-tiny-wan", "--out", small, "--layout", "self-forcing")
  bring = ("import-wan", "--source", small, "--out", ckpt)
  take = ("export-wan", "--workdir", ckpt, "--out", out)
  for job in (make, bring, take):
    assert cli.main([str(a) for a in job]) == 0
  told = capsys.readouterr().out
  assert "GB of memory" in told
  few = "solver=consistency, sampling.steps=4, sampling.guidance=1.0"
  assert f"a few-step model: it gets sampling.{few}" in told
  config = sampling.read_config(ckpt)
  config_lib.check(config, trains=False)
  assert config.sampling.solver == "consistency"
  assert (config.sampling.steps, config.sampling.guidance) == (4, 1)
  assert config.sampling.shift == 5
  assert json.loads((out / "transformer" / "config.json").read_text()) == (
    exporting.dit_config(tiny.DIT)
  )
  assert "small exists" in said(capsys, *make)
  assert "already has checkpoints" in said(capsys, *bring)
  assert "out exists" in said(capsys, *take)
  assert "no vae there" in said(
    capsys, *bring[:3], "--out", tmp_path / "x", "--component", "vae"
  )
  assert "holds no text" in said(
    capsys, *take[:3], "--out", tmp_path / "x", "--component", "text"
  )
  assert "does not exist" in said(
    capsys, *bring[:2], tmp_path / "y", *bring[3:]
  )
  assert "is no imported checkpoint" in said(capsys, *bring[:4], tmp_path)
  assert "changes nothing" in said(capsys, *take, "--config.seed=1")
