"""What making a video costs: all parts are timed, by one program a kind."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from avd_jax import config as config_lib
from avd_jax import sampling
from avd_jax.cli import main as cli
from avd_jax.models import denoiser
from avd_jax.models.dit_config import DiTConfig
from avd_jax.sampling import Sampler
from avd_jax.studies import sample_cost
from avd_jax.wan import importing

TINY = str(Path(__file__).with_name("tiny_config.py"))
KINDS = ["dense", "window 2", "routed, top 1"]
ROW = {
  "history", "attention", "chunk_ms", "first_ms", "chunk_over_dense",
  "first_over_dense",
}  # fmt: skip
ASKED = {
  "steps", "solver", "guidance", "height", "width", "chunk_frames", "rounds",
  "rows",
}  # fmt: skip


def bench(workdir, *arguments):
  """The command's exit code."""
  size = ("--height", "32", "--width", "48", "--window", "2", "--top-k", "1")
  command = ("bench", "sample", "--workdir", workdir, *size, *arguments)
  return cli.main([str(argument) for argument in command])


@pytest.fixture
def tiny_run(monkeypatch):
  """A run on pixels that was never trained, instead of any workdir's."""
  config = config_lib.load(TINY, [])
  like = jax.ShapeDtypeStruct((1, 1, 12, 12, 3), "float32")
  text = jax.ShapeDtypeStruct((1, config.data.text_length), "int32")
  model = config_lib.typed(DiTConfig, config.model)
  params = jax.tree.map(
    lambda s: np.zeros(s.shape, s.dtype),
    denoiser.abstract_params(model, like, text),
  )
  monkeypatch.setattr(sampling, "read_config", lambda *_: config)
  monkeypatch.setattr(sampling, "load", lambda *_: Sampler(config, params))


def test_one_program_makes_chunks_after_any_history(tiny_run, monkeypatch):
  seen = []

  def videos(samplers, grid, histories):
    seen.append(samplers)
    return calls(samplers, grid, histories)

  # One that does routed history only.
  run = dict(routing_top_k=1, implementation="tpu")
  sampling.read_config().model.attention.update(run)
  calls = sample_cost.videos
  monkeypatch.setattr(sample_cost, "videos", videos)
  numbers = sample_cost.measure(
    "any", histories=(1, 2, 4), rounds=1, window=2, top_k=1, progress=False
  )
  (samplers,) = seen
  assert list(samplers) == KINDS
  for sampler in samplers.values():
    assert sampler.segment._cache_size() == 1
    assert sampler._prefill._cache_size() == 1
  attention = [s.model.attention for s in samplers.values()]
  settings = [(a.window, a.sink, a.routing_top_k) for a in attention]
  assert settings == [(None, 0, None), (2, 0, None), (None, 0, 1)]
  assert {a.implementation for a in attention} == {"auto"}
  # Pixels have neither VAE nor text encoder.
  assert set(numbers) == ASKED
  rows = numbers["rows"]
  assert [(row["history"], row["attention"]) for row in rows] == [
    (history, kind) for history in (1, 2, 4) for kind in KINDS
  ]
  for row in rows:
    assert set(row) == ROW
    assert min(row[name] for name in ROW - {"attention"}) > 0
    if row["attention"] == "dense":
      assert row["chunk_over_dense"] == row["first_over_dense"] == 1
  shown = sample_cost.table(numbers)
  assert all(shown.count(f"  {kind}  ") == 3 for kind in KINDS)
  assert "with model.attention.implementation auto" in shown
  assert "VAE" not in shown


def test_a_chunk_is_timed_against_the_whole_history(tiny_run, monkeypatch):
  """Given chunks 0 to 3, then chunk 4, again and again, at its place."""
  places = []
  config, params = sampling.read_config(), sampling.load().params

  def make(cfg):
    made = denoiser.make(cfg)

    def cached(params, x, t, text, cache, chunk):
      jax.debug.callback(lambda c: places.append(int(c)), chunk)
      return made.cached(params, x, t, text, cache, chunk)

    return made._replace(cached=cached, remember=None)

  config.sampling.segment = 1
  calls = sample_cost.videos(
    {"dense": Sampler(config, params, make)}, (12, 12), (4,)
  )
  for what in ("first", "chunk", "chunk"):
    jax.block_until_ready(calls["dense", 4, what]())
  jax.effects_barrier()
  # Of the one step of the solver, and into the cache.
  assert places == [0, 1, 2, 3, *3 * [4, 4]]


def test_a_wan_costs_its_parts(wan_ckpt, tmp_path, monkeypatch, capsys):
  pytest.importorskip("tokenizers")
  pytest.importorskip("ftfy")
  # The others' programs take long to compile, and are run above.
  monkeypatch.setattr(sample_cost, "kinds", lambda *_: {"dense": {}})
  files = tmp_path / "a.json", tmp_path / "a.png"
  assert not bench(
    wan_ckpt, "--histories", 1, 3, "--rounds", 2, "--json", files[0], "--plot",
    files[1], "--config.sampling.steps=1",
  )  # fmt: skip
  numbers = json.loads(files[0].read_text())
  assert set(numbers) == {"device", "parts", *ASKED}
  assert (numbers["steps"], numbers["guidance"]) == (1, 5.0)
  rows = numbers["rows"]
  assert [row["history"] for row in rows] == [1, 3]
  assert set(numbers["parts"]) == {"text", "encode", "decode"}
  assert min(numbers["parts"].values()) > 0
  for row in rows:
    assert set(row) == ROW | {"chunk_shares", "first_shares"}
    for shares in (row["chunk_shares"], row["first_shares"]):
      assert list(shares) == ["text", "vae", "dit"]
      assert sum(shares.values()) == pytest.approx(1)
      assert shares["vae"] > 0
    assert row["chunk_shares"]["text"] == 0 < row["first_shares"]["text"]
  assert "to encode a chunk" in capsys.readouterr().out
  assert files[1].stat().st_size > 5000


def test_shares_are_those_of_rounds():
  """A round in which all took ten times as long counts as the others."""
  slow = np.array([1.0, 10.0, 1.0])
  found = sample_cost.shares(1 * slow, 2 * slow, 7 * slow)
  assert found == pytest.approx({"text": 0.1, "vae": 0.2, "dit": 0.7})
  times = {
    "text": slow, "encode": 2 * slow, "decode": 3 * slow,
    ("dense", 4, "first"): 25 * slow, ("dense", 4, "chunk"): 9 * slow,
  }  # fmt: skip
  rows = sample_cost._row_shares(times, "dense", 4, prompts=2)
  # Two prompts, four chunks encoded, five decoded: 2 + 8 + 15 + 25.
  assert rows["first_shares"] == pytest.approx(
    {"text": 0.04, "vae": 0.46, "dit": 0.5}
  )
  assert rows["chunk_shares"] == pytest.approx(
    {"text": 0, "vae": 0.25, "dit": 0.75}
  )


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--histories", 0, 2], "--histories 0 2: give numbers of chunks"),
    (["--histories", 2, 2], "--histories 2 2"),
    (["--histories", 5, 1], "from small to large"),
    (["--rounds", 0], "--rounds 0: at least 1"),
    (["--window", 0], "--window 0: at least 1"),
    (["--top-k", 0], "--top-k 0: at least 1"),
    (["--height", 40], "--height 40: give a multiple of 16"),
    (["--config.model.attention.window=3"], "give --window"),
    (["--config.model.attention.implementation=xla"], "timed with auto"),
    (["--config.sampling.steps=0"], "sampling.steps 0: at least 1"),
    (["--config.sampling.recompute=9"], "20 given chunks fill"),
    (["--wan", "nowhere"], "nowhere has no vae"),
  ],
)
def test_what_cannot_be_measured_is_refused(
  wan_ckpt, arguments, message, monkeypatch, capsys
):
  monkeypatch.delattr(sampling, "load")
  assert bench(wan_ckpt, *arguments) == 2
  assert message in capsys.readouterr().err


def test_latents_need_a_vae(wan_ckpt, tmp_path, capsys):
  importing.run(wan_ckpt.parent / "files", tmp_path / "dit", "dit")
  assert bench(tmp_path / "dit") == 2
  assert "has no vae of its own: give --wan CKPT" in capsys.readouterr().err
