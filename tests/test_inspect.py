"""What queries choose: counted as by hand, of the very videos sampled."""

import collections
import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import said

from avd_jax import checkpoint, sampling
from avd_jax import config as config_lib
from avd_jax.cli import main as cli
from avd_jax.diffusion import solvers
from avd_jax.errors import UserError
from avd_jax.models import attention
from avd_jax.models import denoiser as denoiser_lib
from avd_jax.models.dit_config import DiTConfig
from avd_jax.ops import attention as front_door
from avd_jax.ops import rope, routing
from avd_jax.studies import onlooker, rollouts, routing_choice

FRAMES, GIVEN, VIDEOS = 6, 2, 3
TOP_K, DESCRIPTORS = (1, 2), ("rotated", "raw")
CLOSE = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=1e-4)
CASES = {
  "dense": {},
  # Six chunks in four slots: columns are not chunks.
  "routed": dict(
    attention=dict(window=2, sink=1, routing_top_k=2, descriptor="raw")
  ),
}


def tiny(**model):
  config = config_lib.default()
  config.data.update(frames=3, height=12, width=12, text_length=32)
  config.model.update(
    dim=12, ffn_dim=12, num_heads=2, num_layers=2, patch=6, text="none",
    freq_dim=4, text_dim=4, text_tokens=2, scan_unroll=1,
  )  # fmt: skip
  config.model.update(**model)
  config.sampling.update(steps=2, shift=3.0, segment=3)
  config.evaluation.update(videos=VIDEOS, given=GIVEN, frames=FRAMES)
  return config


def weights(config):
  """Random weights, none of them at a telling zero."""
  model = config_lib.typed(DiTConfig, config.model)
  shape = (1, model.chunk_frames, 12, 12, 3)
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  text = jax.ShapeDtypeStruct((1, config.data.text_length), jnp.int32)
  rng = np.random.default_rng(0)

  def weight(path, s):
    # Queries long enough for a softmax that is far from even.
    scale = 3.0 if "norm_q" in jax.tree_util.keystr(path) else 1.0
    value = scale * rng.normal(size=s.shape) / max(s.shape[-1], 4) ** 0.5
    return jnp.asarray(value, s.dtype)

  shapes = denoiser_lib.abstract_params(model, x, text)
  return jax.tree_util.tree_map_with_path(weight, shapes)


@functools.cache
def sampler_of(case):
  config = tiny(**CASES[case])
  return sampling.Sampler(config, weights(config))


@functools.cache
def rolled_out(case):
  """(video, tally) under the onlooker's eye."""
  sampler = sampler_of(case)
  prompts = rollouts.held_out(sampler.config)
  return routing_choice.roll_out(sampler, prompts, TOP_K, DESCRIPTORS, case)


class Hand:
  """A tally in numpy, token by token, of a plain loop over the cached face.

  Attributes:
    tally: what `onlooker` should have counted.
    own: int [p n l a j], what the model itself chose to attend to.
    video: what the loop made.
  """

  def __init__(self, sampler):
    self.see, self.params = sampler.model.attention, sampler.params
    n, m, t = FRAMES, len(DESCRIPTORS), len(TOP_K)
    self.tally = onlooker.Tally(
      np.zeros((2, n), int),
      np.zeros((2, n, 2, m, t, 2, n), int),
      np.zeros((2, n, 2, m, t, 2)),
      np.zeros((2, n, 2, t, 2)),
      np.zeros((2, n, 2, 2, n)),
    )
    self.own = np.zeros((2, n, 2, 2, n), int)
    self.keys = collections.defaultdict(dict)  # (layer, which) -> chunk -> k
    self.at, self.layer, self.held = None, 0, None
    self.denoiser = denoiser_lib.make(sampler.model, attend=self.attend)

  def velocity(self, x, t, chunk, text, cache):
    self.at, self.layer = (int(t == 0), chunk), 0
    level = jnp.full(len(x), t, jnp.float32)
    return self.denoiser.cached(
      self.params, x, level, text, cache, jnp.int32(chunk)
    )

  def attend(self, cfg, q, k, v, turns, layer, layout, chunk, platform):
    """Stands before a layer's attention, as a denoiser's `attend`."""
    self.held = np.asarray(layout.held(chunk))
    near, turned = rope.rotate(q, turns.own), rope.rotate(k, turns.own)
    far = near if turns.sink is None else rope.rotate(q, turns.sink)
    for which, keys in (("raw", k), ("rotated", turned)):
      self.keys[self.layer, which][int(chunk)] = np.float64(keys[:, 0])
    if not self.layer:
      self.tally.queries[self.at] += q.shape[0] * q.shape[2]
    asking = [np.float64(z[:, 0]) for z in (q, near, far)]
    for token in np.ndindex(*asking[0].shape[:3]):
      self.count(token, *(z[token] for z in asking))
    parts = attention.cached(
      cfg, q, k, v, turns, layer, layout, chunk, platform
    )
    self.layer += 1
    return parts

  def count(self, token, q, near, far):
    """One query's dense softmax over chunks, and its choices."""
    (b, _, a), chunk, sink = token, self.at[1], self.see.sink
    at = (*self.at, self.layer)
    reach = FRAMES if self.see.window is None else self.see.window
    seen = [j for j in range(chunk) if chunk - j <= reach or j < sink]
    query = {j: far if j < sink else near for j in [*seen, chunk]}
    keys = self.keys[self.layer, "rotated"]
    mass = {
      j: np.exp(keys[j][b, :, a] @ query[j] / q.size**0.5).sum() for j in query
    }
    mass = {j: value / sum(mass.values()) for j, value in mass.items()}
    for j, value in mass.items():
      self.tally.mass[*at, a, j] += value
    heaviest = sorted((mass[j] for j in seen), reverse=True)
    for i, top_k in enumerate(TOP_K):
      self.tally.best[*at, i, a] += sum(heaviest[:top_k])
    for m, which in enumerate(DESCRIPTORS):
      score = {}
      for j in seen:
        mean = self.keys[self.layer, which][j][b, :, a].mean(0)
        score[j] = mean @ (q if which == "raw" else query[j])
      ranked = sorted(seen, key=score.get, reverse=True)
      for i, top_k in enumerate(TOP_K):
        for j in ranked[:top_k]:
          self.tally.chosen[*at, m, i, a, j] += 1
          self.tally.caught[*at, m, i, a] += mass[j]

  def front_door(self, real, q, k, v, sight, **options):
    """Stands at the front door, and counts what a routed layer may see."""
    rule, q_sink = options["routing"], options["q_sink"]
    if rule is not None:
      flat = lambda z: None if z is None else z[:, 0]
      rule = rule._replace(q=flat(rule.q))
      choice = routing.choose(flat(q), sight, rule, flat(q_sink))
      for b, s, a, i in np.argwhere(np.asarray(choice) >= 0):
        chunk = self.held[choice[b, s, a, i]]
        self.own[*self.at, self.layer, a, chunk] += 1
    return real(q, k, v, sight, **options)


@functools.cache
def by_hand(case):
  """A rollout without jit, every query looked at."""
  sampler = sampler_of(case)
  truth, hand = rollouts.held_out(sampler.config).truth, Hand(sampler)
  truth = jax.tree.map(jnp.asarray, truth)
  like = jax.ShapeDtypeStruct((VIDEOS, 1, *truth.x.shape[2:]), jnp.float32)
  cache, chunks = hand.denoiser.init_cache(like, FRAMES), []
  grid = solvers.time_grid(2, 3.0)
  with pytest.MonkeyPatch.context() as patch:
    door = functools.partial(hand.front_door, front_door.attend)
    patch.setattr(front_door, "attend", door)
    for chunk in range(FRAMES):
      x = truth.x[:, chunk : chunk + 1]
      if chunk >= GIVEN:
        key = jax.random.fold_in(jax.random.key(0), chunk)
        x = jax.random.normal(key, like.shape)
        for t, then in itertools.pairwise(grid):
          v, cache = hand.velocity(x, t, chunk, truth.text, cache)
          x = x + (then - t) * v
      _, cache = hand.velocity(x, 0.0, chunk, truth.text, cache)
      chunks.append(x)
  hand.video = np.concatenate(chunks, 1)
  return hand


@pytest.mark.parametrize("case", CASES)
def test_the_videos_are_those_sampled(case):
  """Being looked at changes nothing."""
  CLOSE(rolled_out(case)[0], by_hand(case).video)


@pytest.mark.parametrize("case", CASES)
def test_a_tally_is_counted_by_hand(case):
  tally, hand = rolled_out(case)[1], by_hand(case).tally
  for name in ("queries", "chosen"):
    np.testing.assert_array_equal(
      getattr(tally, name), getattr(hand, name), err_msg=name
    )
  for name in ("caught", "best", "mass"):
    np.testing.assert_allclose(
      getattr(tally, name), getattr(hand, name), atol=1e-3, err_msg=name
    )


def test_a_routed_model_chooses_what_is_counted():
  """Its own descriptor and top_k: the choices that its attention is given."""
  see = sampler_of("routed").model.attention
  m, t = DESCRIPTORS.index(see.descriptor), TOP_K.index(see.routing_top_k)
  chosen = rolled_out("routed")[1].chosen[:, :, :, m, t]
  np.testing.assert_array_equal(chosen, by_hand("routed").own)


def test_guidance_is_not_counted_twice():
  """The branch with text alone, two frames a chunk."""
  config = tiny(text="bytes", chunk_frames=2, num_layers=1)
  config.sampling.update(guidance=3.0, steps=1)
  sampler = sampling.Sampler(config, weights(config))
  prompts = rollouts.held_out(config)
  _, tally = routing_choice.roll_out(sampler, prompts, (1,), ("raw",), "guided")
  tokens = VIDEOS * 2 * 4
  # A given chunk has no solver's steps.
  assert tally.queries.tolist() == [[0, tokens, tokens], [tokens] * 3]
  assert (
    tally.chosen[:, :, 0, 0, 0].sum(-1).tolist()
    == [
      [[0, 0], [tokens] * 2, [tokens] * 2],
    ]
    * 2
  )


def numbers_of(case):
  see = sampler_of(case).model.attention
  tally = rolled_out(case)[1]
  return routing_choice.numbers(tally, see, GIVEN, TOP_K, DESCRIPTORS)


@pytest.mark.parametrize("case", CASES)
def test_numbers_add_up(case):
  entries = numbers_of(case)
  named = [(e["pass"], e["descriptor"], e["top_k"]) for e in entries]
  assert set(named) == set(
    itertools.product(onlooker.PASSES, DESCRIPTORS, TOP_K)
  )
  assert len(named) == 8
  close = functools.partial(np.testing.assert_allclose, atol=1e-5)
  seen = {"dense": [0, 1, 2, 3, 4], "routed": [0, 3, 4]}[case]
  for entry in entries:
    k, frequency = entry["top_k"], entry["frequency"]
    assert entry["candidates"] == seen
    each = np.array(frequency["layer_head"])
    assert each.shape == (2, 2, FRAMES - 1)
    assert not each[:, :, [j for j in range(5) if j not in seen]].any()
    close(each.sum(-1), k)
    close(each.mean((0, 1)), frequency["mean"])
    by_chunk = np.array(entry["by_chunk"], float)
    assert np.flatnonzero(~np.isnan(by_chunk[-1])).tolist() == seen
    sums = np.nansum(by_chunk, 1)
    close(sums, [min(k, chunk) for chunk in range(GIVEN, FRAMES)])
    mass = {
      part: np.array(x["layer_head"]) for part, x in entry["mass"].items()
    }
    close(mass["own"] + mass["chosen"] + mass["dropped"], 1)
    close(np.array(entry["mass_by_chunk"]["layer_head"]).sum(-1), 1)
    assert (mass["best"] >= mass["chosen"] - 1e-5).all()
    assert (mass["best"] >= mass["recent"] - 1e-5).all()
    by_chunk = np.array(entry["mass_by_chunk"]["layer_head"])
    close(mass["recent"], by_chunk[:, :, seen[-k:]].sum(-1))


def test_distances_are_averages_over_chunks_with_a_choice():
  entry = next(e for e in numbers_of("dense") if e["top_k"] == 2)
  past, by_chunk = entry["by_distance"], np.array(entry["by_chunk"], float)
  # Chunk 2 has two chunks of history: nothing to choose.
  assert past["chunks"] == [3, 4, 5]
  assert past["distance"] == [1, 2, 3, 4]
  for distance, value, even in zip(
    past["distance"], past["frequency"]["mean"], past["even"], strict=True
  ):
    rows = [c for c in (3, 4, 5) if c - distance > 0]
    mean = np.mean([by_chunk[c - GIVEN, c - distance] for c in rows])
    assert value == pytest.approx(mean, abs=2e-6)
    assert even == pytest.approx(np.mean([2 / c for c in rows]), abs=2e-6)
  first = past["first_chunk"]["mean"]
  assert first == pytest.approx(by_chunk[1:, 0].mean(), abs=2e-6)
  # Of chunk 3 and 4; chunk 5 has no peer.
  even = {c: by_chunk[c - GIVEN] * c / 2 for c in (3, 4, 5)}
  ours = even[3][0] + even[4][0]
  theirs = (even[4][1] + even[5][2]) / 2 + even[5][1]
  ratio = past["first_chunk"]["against_peers"]
  assert ratio == pytest.approx(ours / theirs, abs=1e-4)


# --- the program -------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A workdir of the dense model."""
  workdir, sampler = (
    tmp_path_factory.mktemp("runs") / "run",
    sampler_of("dense"),
  )
  checkpoints = checkpoint.Checkpoints(workdir)
  record = {"config": config_lib.to_json(sampler.config)}
  checkpoints.save(1, {"ema": sampler.params}, record)
  checkpoints.wait()
  checkpoints.close()
  return workdir


def test_it_is_written_down(run, tmp_path, capsys):
  """The default directory, all of history chosen, and a run told to route."""
  most = FRAMES - 1
  command = ["inspect", "routing", "--workdir", str(run), "--videos", "2"]
  assert cli.main([*command, "--top_k", str(most), "1", "1"]) == 0
  assert "rotated top-1" in capsys.readouterr().out
  assert {p.name for p in (run / "routing").iterdir()} == {
    "routing.json", "routing.png",
  }  # fmt: skip
  assert (run / "routing" / "routing.png").read_bytes()[:4] == b"\x89PNG"
  seen = json.loads((run / "routing" / "routing.json").read_text())
  told = f"--workdir {run} --top_k {most} 1 1 --videos 2 --seed 0"
  assert seen["command"] == f"avd inspect routing {told}"
  assert seen["run"] == "run"
  assert seen["attended"] == "all in sight"
  assert (seen["videos"], seen["chunks"], seen["given"]) == (2, FRAMES, GIVEN)
  assert (seen["top_k"], seen["descriptors"]) == ([1, most], [*DESCRIPTORS])
  assert len(seen["choices"]) == 8
  for entry in seen["choices"]:
    if entry["top_k"] == most:
      assert np.array_equal(
        entry["frequency"]["layer_head"], np.ones((2, 2, 5))
      )
      assert max(np.ravel(entry["mass"]["dropped"]["layer_head"])) < 1e-5

  out = ["--out", str(tmp_path / "a"), "--json", str(tmp_path / "n.json")]
  which = ["--top_k", str(most), "1", "--descriptor", "raw", "--apply"]
  assert cli.main([*command, *which, *out]) == 0
  assert [p.name for p in (tmp_path / "a").iterdir()] == ["routing.png"]
  applied = json.loads((tmp_path / "n.json").read_text())
  assert applied["attended"].startswith("what is chosen")
  assert applied["command"].endswith("--apply")
  index = {(e["descriptor"], e["top_k"], e["pass"]): e for e in seen["choices"]}
  far = {}
  for entry in applied["choices"]:
    k, name = entry["top_k"], entry["pass"]
    dense = index["raw", k, name]["mass_by_chunk"]["layer_head"]
    routed = entry["mass_by_chunk"]["layer_head"]
    far[k, name] = np.abs(np.subtract(dense, routed)).max()
  # To choose all is to attend densely; to choose one is not.
  assert max(far[most, name] for name in onlooker.PASSES) < 1e-4
  assert min(far[1, name] for name in onlooker.PASSES) > 1e-3


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (["--top_k", "0"], "--top_k 0: give 1 to 5"),
    (["--top_k", "1", "6"], "--top_k 6: give 1 to 5, the chunks of history"),
    (["--top_k", "5", "--frames", "5"], "--top_k 5: give 1 to 4"),
    (
      ["--descriptor", "mean"],
      "--descriptor 'mean' is not one of rotated, raw",
    ),
    (["--frames", "2"], "evaluation.frames 2"),
    (["--videos", "0"], "videos 0"),
    (["--config.model.dim=24"], "--config.model.dim: cannot change"),
  ],
)
def test_what_it_refuses(run, change, message, tmp_path, capsys):
  command = ["inspect", "routing", "--workdir", run, "--out", tmp_path / "x"]
  assert message in said(capsys, *command, *change)
  assert not list(tmp_path.iterdir())


def test_no_run_and_broken_chunks_are_refused(tmp_path, capsys):
  missing = said(capsys, "inspect", "routing", "--workdir", tmp_path / "none")
  assert "does not exist" in missing
  sampler = sampling.Sampler(tiny(chunk_frames=2), None)
  prompts = rollouts.held_out(tiny())
  odd = dataclasses.replace(
    prompts, truth=prompts.truth._replace(x=prompts.truth.x[:, :5])
  )
  with pytest.raises(UserError, match=r"5 frames in all .* chunks of 2"):
    routing_choice.roll_out(sampler, odd, (1,), ("raw",), "odd")


def test_defaults_fit_what_is_in_sight():
  sampler = sampler_of("routed")
  default = routing_choice.checked(sampler, FRAMES, None, [])
  assert default == ((1, 2, 3), ("raw",))
  again = routing_choice.checked(sampler, FRAMES, [2, 2, 1], ["rotated"] * 2)
  assert again == ((1, 2), ("rotated",))
  assert routing_choice.most(sampler.model.attention, FRAMES) == 3
  assert routing_choice.most(sampler.model.attention, 3) == 2
  assert routing_choice.most(attention.AttentionConfig(), 20) == 19
