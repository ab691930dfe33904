"""CausalDiT: two faces of one function, and nothing seen before its time."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.diffusion import guidance
from avd_jax.errors import UserError
from avd_jax.models import denoiser as denoiser_lib
from avd_jax.models import layers
from avd_jax.models.attention import AttentionConfig
from avd_jax.models.dit_config import DiTConfig
from avd_jax.ops import attention, masks
from avd_jax.typing import History

BASE = DiTConfig(
  dim=24,
  ffn_dim=16,
  num_heads=2,
  num_layers=2,
  patch=2,
  channels=2,
  text="none",
  text_dim=8,
  text_tokens=2,
  freq_dim=8,
  chunk_frames=1,
  remat="none",
)
BYTES = dataclasses.replace(BASE, text="bytes", num_layers=1)
CHUNKS = 6
TIGHT = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)


@dataclasses.dataclass
class Inputs:
  """Random weights (none of them at a telling zero), videos, levels, text."""

  cfg: DiTConfig
  chunks: int = CHUNKS
  text_length: int = 5

  def __post_init__(self):
    cfg, rng = self.cfg, np.random.default_rng(0)
    normal = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
    video = (2, self.chunks * cfg.chunk_frames, 4, 2, cfg.channels)
    self.x, self.z = normal(*video), normal(*video)
    self.t, self.told = (
      jnp.asarray(rng.uniform(0.1, 1, (2, self.chunks)), jnp.float32)
      for _ in range(2)
    )
    ids = rng.integers(0, 257, (2, self.text_length))
    self.text = (
      normal(2, 3, cfg.text_dim)
      if cfg.text == "embeddings"
      else jnp.asarray(ids, jnp.int32)
    )
    shapes = denoiser_lib.abstract_params(cfg, self.x, self.text)
    self.params = jax.tree.map(
      lambda s: 1.5 * normal(*s.shape) / max(s.shape[-1], 4) ** 0.5, shapes
    )
    self.denoiser = denoiser_lib.make(cfg)


@functools.partial(jax.jit, static_argnums=0)
def parallel(cfg, *args):
  return denoiser_lib.make(cfg).parallel(*args)


def play(inputs, text, passes, keep_all, params=None, denoiser=None):
  """Chunk after chunk through the cache.

  Args:
    inputs: weights and levels.
    text: the condition.
    passes: (video, levels) pairs: what each chunk's turns at the cache are.
    keep_all: whether the cache may forget.
    params: other weights.
    denoiser: another model.

  Returns:
    (the first pass's velocities, the cache).
  """
  params = inputs.params if params is None else params
  denoiser = denoiser or inputs.denoiser
  frames = inputs.cfg.chunk_frames
  cut = lambda x: jnp.moveaxis(
    x.reshape(2, inputs.chunks, frames, *x.shape[2:]), 1, 0
  )

  def turn(cache, chunk):
    index, *turns = chunk
    out = []
    for x, t in turns:
      v, cache = denoiser.cached(params, x, t, text, cache, index)
      out.append(v)
    return cache, out[0]

  cache = denoiser.init_cache(passes[0][0][:, :frames], inputs.chunks, keep_all)
  turns = [(cut(x), t.T) for x, t in passes]
  cache, v = jax.lax.scan(turn, cache, (jnp.arange(inputs.chunks), *turns))
  return jnp.moveaxis(v, 0, 1).reshape(passes[0][0].shape), cache


def see(**what):
  return {"attention": AttentionConfig(**what)}


VARIANTS = {
  ("dense", 1): {"text": "bytes"},
  ("dense", 2): {"prediction": "x0"},
  ("window", 1): see(window=2) | {"prediction": "x0"},
  ("window", 2): see(window=1),
  ("sink", 1): see(window=1, sink=2),
  ("sink", 2): see(window=1, sink=3),
  ("window+sink", 1): see(window=2, sink=1) | {"text": "embeddings"},
  ("window+sink", 2): see(window=2, sink=1) | {"spatial_embedding": (2, 1)},
  ("routed", 1): see(routing_top_k=2),
  ("routed", 2): see(routing_top_k=1, descriptor="raw"),
  ("routed window", 1): see(window=3, routing_top_k=1),
  ("routed window+sink", 1): see(window=2, sink=2, routing_top_k=2),
  ("routed window+sink", 2): see(
    window=2, sink=1, routing_top_k=2, descriptor="raw"
  ),
}


every_variant = pytest.mark.parametrize(
  "variant", VARIANTS, ids=lambda p: f"{p[0]}-{p[1]}"
)


@functools.cache
def faces(variant):
  """Velocities of every face of one model, from one compiled program."""
  cfg = dataclasses.replace(BASE, chunk_frames=variant[1], **VARIANTS[variant])
  i = Inputs(cfg)

  @jax.jit
  def run(params, x, z, t, told, text):
    noisy, clean = (z, t), (x, told)
    parallel = functools.partial(i.denoiser.parallel, params, z, t, text)
    go = functools.partial(play, i, text, params=params)
    ring, small = go([noisy, clean], False)
    kept, cache = go([noisy, clean], True)
    out = {
      "parallel": parallel(History(x, told)),
      "ring": ring,
      "keep_all": kept,
      "detached": parallel(History(x, told, cache)),
      "slots": (small.kv.k[0].shape[1], cache.kv.k[0].shape[1]),
    }
    if cfg.chunk_frames == 1:  # enough for a form that differs in its mask
      out["one stream"] = parallel(None)
      out["one stream, cached"] = go([noisy], False)[0]
    return out

  return cfg, run(i.params, i.x, i.z, i.t, i.told, i.text)


@every_variant
@pytest.mark.parametrize("face", ["ring", "keep_all", "detached"])
def test_every_face_is_the_parallel_one(variant, face):
  _, v = faces(variant)
  TIGHT(v[face], v["parallel"])
  assert np.abs(v["parallel"]).max() > 0.3


@pytest.mark.parametrize(
  "name", ["dense", "window", "sink", "window+sink", "routed"]
)
def test_one_stream_is_the_cache_filled_with_noisy_chunks(name):
  _, v = faces((name, 1))
  TIGHT(v["one stream, cached"], v["one stream"])
  assert np.abs(v["one stream"] - v["parallel"]).max() > 1e-3


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
  "variant", [("routed window+sink", 1), ("routed window+sink", 2)]
)
def test_plain_jax_is_the_reference_in_every_face(
  variant, grouped, monkeypatch
):
  """What a larger model gets on a CPU: fetched choices, or grouped ones."""
  _, wanted = faces(variant)
  monkeypatch.setattr(attention, "GROUPED", 1 if grouped else 10**6)
  monkeypatch.setattr(attention, "FETCHED", 0)
  view = dataclasses.replace(
    VARIANTS[variant]["attention"], implementation="xla"
  )
  monkeypatch.setitem(VARIANTS, variant, {"attention": view})
  _, found = faces.__wrapped__(variant)
  for face in ("parallel", "ring", "keep_all", "detached"):
    TIGHT(found[face], wanted["parallel"])


@every_variant
def test_a_windowed_cache_is_its_ring(variant):
  cfg, v = faces(variant)
  ring, kept = v["slots"]
  assert kept == CHUNKS
  view = cfg.attention
  window = CHUNKS if view.window is None else view.sink + view.window + 1
  assert ring == window


# --- causality, by gradient --------------------------------------------------


def influence(cfg, one_stream=False):
  """Tables [n, n] of whether output chunk i has a gradient to input chunk j."""
  i = Inputs(cfg, chunks=5)
  chunks = lambda z: z.reshape(2, 5, -1)

  def velocity(z, t, x, told):
    history = None if one_stream else History(x, told)
    return i.denoiser.parallel(i.params, z, t, i.text, history)

  @jax.jit
  def gradients(*args):
    v, pull = jax.vjp(velocity, *args)
    weight = chunks(jax.random.normal(jax.random.key(0), v.shape))
    pick = lambda n: pull(
      jnp.where(jnp.arange(5)[:, None] == n, weight, 0).reshape(v.shape)
    )[:]
    return jax.vmap(pick)(jnp.arange(5))

  names = ("noisy", "level", "history", "told")
  return {
    name: np.abs(np.asarray(g).reshape(5, 2, 5, -1)).max((1, 3)) > 0
    for name, g in zip(names, gradients(i.z, i.t, i.x, i.told), strict=True)
  }


SELF = np.eye(5, dtype=bool)
EARLIER = np.tri(5, k=-1, dtype=bool)


@pytest.mark.parametrize("frames", [1, 2])
def test_nothing_is_seen_before_its_time(frames):
  """Two layers, dense: exactly the past, all of it, and one's own noise."""
  seen = influence(dataclasses.replace(BASE, chunk_frames=frames))
  np.testing.assert_array_equal(seen["noisy"], SELF)
  np.testing.assert_array_equal(seen["level"], SELF)
  np.testing.assert_array_equal(seen["history"], EARLIER)
  np.testing.assert_array_equal(seen["told"], EARLIER)


def test_one_stream_is_block_causal():
  seen = influence(BASE, one_stream=True)
  np.testing.assert_array_equal(seen["noisy"], SELF | EARLIER)
  np.testing.assert_array_equal(seen["level"], SELF | EARLIER)
  assert not seen["history"].any()


def test_one_layer_sees_exactly_its_mask():
  cfg = dataclasses.replace(BASE, num_layers=1, **see(window=1, sink=1))
  table = masks.chunk_table(masks.history_mask(2, 1, 1), 5, 2)[5:]
  seen = influence(cfg)
  np.testing.assert_array_equal(seen["history"], table[:, :5])
  np.testing.assert_array_equal(seen["noisy"], table[:, 5:])


@pytest.mark.parametrize(("window", "sink"), [(2, 0), (2, 1), (1, 2)])
def test_a_windowed_chunk_is_the_same_wherever_it_stands(window, sink):
  """Far beyond training's length: the window and the sink slide along."""
  view = see(window=window, sink=sink)
  cfg = dataclasses.replace(BASE, num_layers=1, **view)
  i = Inputs(cfg)

  @jax.jit
  def at(place):
    cache = i.denoiser.init_cache(i.x[:, :1], 10**6)
    clean = jnp.zeros(2)
    for n in range(sink):
      x = i.x[:, n : n + 1]
      _, cache = i.denoiser.cached(
        i.params, x, clean, i.text, cache, jnp.int32(n)
      )
    for n in range(window):
      x = i.x[:, sink + n : sink + n + 1]
      _, cache = i.denoiser.cached(
        i.params, x, clean, i.text, cache, place - window + n
      )
    return i.denoiser.cached(
      i.params, i.z[:, :1], i.t[:, 0], i.text, cache, place
    )[0]

  near = at(jnp.int32(sink + window))
  for place in (sink + window + 1, 1000, 99_999):
    TIGHT(at(jnp.int32(place)), near, atol=5e-5 if place > 10**4 else 1e-5)


# --- the network -------------------------------------------------------------


def parts(cfg):
  """Abstract parameters, boxed with their logical axes."""
  x = jax.ShapeDtypeStruct((1, cfg.chunk_frames, 4, 2, cfg.channels), "float32")
  text = jax.ShapeDtypeStruct(
    (1, 3, cfg.text_dim) if cfg.text == "embeddings" else (1, 3),
    "float32" if cfg.text == "embeddings" else "int32",
  )
  return jax.eval_shape(
    lambda k: denoiser_lib.init(cfg, k, x, text), jax.random.key(0)
  )


@pytest.mark.parametrize("text", ["bytes", "embeddings", "none"])
def test_every_parameter_names_its_axes(text):
  cfg = dataclasses.replace(BASE, text=text, spatial_embedding=(2, 1))
  boxed = jax.tree_util.tree_leaves_with_path(
    parts(cfg), is_leaf=lambda p: isinstance(p, nn.meta.AxisMetadata)
  )
  known = {"embed", "heads", "mlp", "layers", None}
  for path, leaf in boxed:
    place = jax.tree_util.keystr(path)
    assert isinstance(leaf, nn.LogicallyPartitioned), place
    assert len(leaf.names) == leaf.value.ndim, place
    assert set(leaf.names) <= known, place
    named = [name for name in leaf.names if name]
    assert len(set(named)) == len(named), place
    assert ("layers" in leaf.names) == ("blocks" in place), place
    if "kernel" in place and leaf.value.size > 1000:
      assert named, place


def test_the_defaults_are_wan_s():
  leaves = jax.tree.leaves(nn.meta.unbox(parts(DiTConfig())))
  assert sum(leaf.size for leaf in leaves) == 1_418_996_800


def test_remat_and_unrolling_change_nothing():
  i = Inputs(BASE, chunks=2)

  def loss(cfg, params):
    v = denoiser_lib.make(cfg).parallel(
      params, i.z, i.t, i.text, History(i.x, i.told)
    )
    return jnp.sum(v**2)

  found, products, offloaded = {}, {}, {}
  for remat, unroll in (("none", 1), ("block", 2), ("dots", 1), ("offload", 1)):
    cfg = dataclasses.replace(BASE, remat=remat, scan_unroll=unroll)
    step = jax.value_and_grad(functools.partial(loss, cfg))
    found[remat] = jax.jit(step)(i.params)
    plan = str(jax.make_jaxpr(step)(i.params))
    products[remat] = plan.count("dot_general")
    offloaded[remat] = "host" in plan
  scale = max(np.abs(g).max() for g in jax.tree.leaves(found["none"][1]))
  for remat in ("block", "dots", "offload"):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-4, atol=1e-5 * scale
      ),
      found["none"],
      found[remat],
    )
  # Each recomputes what it says.
  assert products["none"] < products["dots"] < products["block"]
  assert products["offload"] == products["block"]
  assert [remat for remat, host in offloaded.items() if host] == ["offload"]


def test_text_conditions_where_there_is_any():
  for text, matters in (("bytes", True), ("none", False)):
    i = Inputs(dataclasses.replace(BYTES, text=text), chunks=2)
    run = jax.jit(functools.partial(i.denoiser.parallel, i.params, i.z, i.t))
    v, other, empty = (
      run(ids, History(i.x, i.told))
      for ids in (i.text, i.text[:, ::-1], 0 * i.text)
    )
    assert (np.abs(v - other).max() > 1e-3) == matters
    assert (np.abs(v - empty).max() > 1e-3) == matters


def test_x0_output_is_the_velocity_towards_it():
  """With v = (x_t - x0) / max(t, min_t), one Euler step from t lands on x0."""
  cfg = dataclasses.replace(BASE, prediction="x0", num_layers=1)
  i = Inputs(cfg, chunks=3)
  t = jnp.array([[0.02, 0.5, 1.0]] * 2)
  v, raw = (
    parallel(c, i.params, i.z, t, i.text, History(i.x, i.told))
    for c in (cfg, dataclasses.replace(cfg, prediction="v"))
  )
  spread = jnp.maximum(t, cfg.min_t)[..., None, None, None]
  TIGHT(v, (i.z - raw) / spread)


def test_bfloat16_stays_near_float32():
  i = Inputs(dataclasses.replace(BASE, num_layers=1), chunks=3)
  full, half = (
    parallel(
      dataclasses.replace(i.cfg, dtype=dtype),
      i.params,
      i.z,
      i.t,
      i.text,
      History(i.x, i.told),
    )
    for dtype in ("float32", "bfloat16")
  )
  assert half.dtype == jnp.float32
  error = np.abs(full - half).max() / np.abs(full).max()
  assert 1e-5 < error < 0.1  # coarser, hence really bfloat16; and not lost


def test_sinusoids_are_wan_s():
  t = jnp.array([0.0, 0.25, 0.999])
  half = (
    1000 * np.asarray(t, np.float64)[:, None] * 10_000.0 ** (-np.arange(4) / 4)
  )
  expected = np.concatenate([np.cos(half), np.sin(half)], -1)
  np.testing.assert_allclose(layers.sinusoid(t, 8), expected, atol=1e-4)


def test_a_fresh_network_says_zero():
  """Wan's zero head: a first step starts from v = 0, whatever the input."""
  i = Inputs(BASE, chunks=2)

  @jax.jit
  def first(key):
    fresh = nn.meta.unbox(denoiser_lib.init(BASE, key, i.x, i.text))
    history = History(i.x, i.told)
    return fresh, i.denoiser.parallel(fresh, i.z, i.t, i.text, history)

  fresh, v = first(jax.random.key(0))
  assert not np.any(v)
  assert all(np.isfinite(p).all() for p in jax.tree.leaves(fresh))


# --- guidance over the real network ------------------------------------------


def test_guided_faces_are_two_separate_passes():
  i = Inputs(dataclasses.replace(BYTES, **see(window=2)), chunks=4)
  null = jnp.zeros(i.text_length, jnp.int32)
  guided = guidance.classifier_free(i.denoiser, 3.0, null)
  nulls = jnp.zeros_like(i.text)
  mix = lambda a, b: b + 3.0 * (a - b)

  @jax.jit
  def run(x, z, t, told):
    passes, history = [(z, t), (x, told)], History(x, told)
    cached, cache = play(i, i.text, passes, True, denoiser=guided)
    each = [play(i, text, passes, False)[0] for text in (i.text, nulls)]
    call = functools.partial(guided.parallel, i.params, z, t, i.text)
    return {
      "cached": cached,
      "parallel": call(history),
      "detached": call(history._replace(cache=cache)),
    }, each

  out, each = run(i.x, i.z, i.t, i.told)
  for face, v in out.items():
    TIGHT(v, mix(*each), err_msg=face)
  assert np.abs(each[0] - each[1]).max() > 1e-2


# --- what is refused ---------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_heads": 5}, "dim 24 is not divisible by model.num_heads 5"),
    ({"num_heads": 6}, "head dim 4"),
    ({"num_heads": 0}, "num_heads 0"),
    ({"patch": 0}, "patch 0"),
    ({"chunk_frames": 0}, "chunk_frames 0"),
    ({"freq_dim": 7}, "freq_dim 7"),
    ({"min_t": 0.0}, "min_t 0.0"),
    ({"prediction": "eps"}, "prediction 'eps'"),
    ({"text": "clip"}, "text 'clip'"),
    ({"remat": "all"}, "remat 'all'"),
    ({"dtype": "float16"}, "dtype 'float16'"),
  ],
)
def test_impossible_networks_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(BASE, **changes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"window": 0}, "window 0"),
    ({"window": 2, "sink": -1}, "sink -1"),
    ({"sink": 1}, "sink needs model.attention.window"),
    ({"routing_top_k": 0}, "routing_top_k 0: at least 1"),
    (
      {"window": 2, "sink": 1, "routing_top_k": 4},
      "routing_top_k 4: its window and sink hold 3 .* give 1 to 3",
    ),
    ({"descriptor": "max"}, "descriptor 'max' is not one of rotated, raw"),
    ({"implementation": "flash"}, "'flash' is not one of auto, reference"),
    (
      {"implementation": "cudnn", "routing_top_k": 2},
      "'cudnn' lacks model.attention.routing_top_k: use triton, tpu, xla",
    ),
    ({"implementation": "tpu"}, "'tpu' is for routed history and sinks"),
    (
      {"implementation": "splash", "window": 2, "sink": 1},
      "'splash' lacks model.attention.sink: use triton, xla",
    ),
  ],
)
def test_impossible_attention_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    AttentionConfig(**changes)


def test_frames_that_do_not_fit_are_refused():
  with pytest.raises(UserError, match="5x2 are not divisible"):
    BASE.grid(5, 2)
  cfg = dataclasses.replace(BASE, spatial_embedding=(3, 3))
  with pytest.raises(UserError, match=r"\(3, 3\) does not fit .* 2x1 tokens"):
    parts(cfg)
