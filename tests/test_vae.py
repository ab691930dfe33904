"""The video VAE: whole and streamed are one, causal, named as Wan's files."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.errors import UserError
from avd_jax.models import vae
from avd_jax.models.vae_layers import CausalConv, Down, Norm, Up
from avd_jax.wan import vae_names

CFG = vae.VAEConfig(
  base_dim=4,
  z_dim=2,
  dim_mult=(1, 2, 2, 2),
  num_res_blocks=1,
  latents_mean=(0.3, -0.2),
  latents_std=(2.0, 0.5),
)
HEIGHT, WIDTH = 16, 24
FRAMES, LATENTS = 25, 7
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def noise(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


@functools.cache
def params():
  """Random in every leaf, also where training starts from zeros or ones."""
  shapes = jax.eval_shape(lambda: vae.init(CFG, jax.random.key(0)))
  leaves, tree = jax.tree.flatten(shapes)
  rng = np.random.default_rng(0)
  draw = lambda s: rng.normal(
    0, 1 / np.sqrt(max(s.size / s.shape[-1], 9)), s.shape
  )
  return tree.unflatten(jnp.asarray(draw(s), jnp.float32) for s in leaves)


@functools.cache
def video():
  return 0.5 * noise(1, 1, FRAMES, HEIGHT, WIDTH, 3)


@functools.cache
def latents():
  return noise(2, 1, LATENTS, *CFG.grid(HEIGHT, WIDTH), CFG.z_dim)


encode = jax.jit(vae.encode, static_argnames=("cfg", "chunk"))
decode = jax.jit(vae.decode, static_argnames=("cfg", "chunk", "clamp"))


@functools.cache
def encoded():
  return encode(CFG, params(), video(), chunk=None)


@functools.cache
def decoded():
  return decode(CFG, params(), latents(), chunk=None, clamp=False)


def test_sizes():
  assert (vae.VAEConfig().spatial_factor, CFG.temporal_factor) == (8, 4)
  assert encoded().shape == latents().shape
  assert decoded().shape == video().shape
  assert CFG.latent_frames(81) == 21
  assert CFG.frames(21) == 81
  assert CFG.latent_frames(1) == CFG.frames(1) == 1
  # Everything random, so that nothing below holds because all is zero.
  assert float(jnp.std(encoded())) > 0.05
  assert float(jnp.std(decoded())) > 0.05


def test_a_scan_over_chunks_equals_whole():
  """Of four latent frames, after the first: the last one is not full."""
  found = encode(CFG, params(), video(), chunk=4)
  np.testing.assert_allclose(found, encoded(), **CLOSE)
  found = decode(CFG, params(), latents(), chunk=4)
  np.testing.assert_allclose(found, jnp.clip(decoded(), -1, 1), **CLOSE)


def stream(step, cache, x, size):
  """All of x, `size` frames at a time after the first, through `step`."""
  y, cache = step(CFG, params(), x[:, :1], cache, first=True)
  out, shapes = [y], jax.tree.map(jnp.shape, cache)
  for start in range(1, x.shape[1], size):
    given = cache
    y, cache = step(CFG, params(), x[:, start : start + size], given)
    out.append(y)
    assert jax.tree.map(jnp.shape, cache) == shapes
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
  return jnp.concatenate(out, 1)


def test_a_stream_of_latents_equals_whole():
  step = jax.jit(
    vae.decode_step,
    static_argnames=("cfg", "first", "clamp"),
    donate_argnames="cache",
  )
  for size in (1, 2, 3):
    cache = vae.decoder_cache(CFG, 1, HEIGHT, WIDTH)
    found = stream(step, cache, latents(), size)
    np.testing.assert_allclose(found, jnp.clip(decoded(), -1, 1), **CLOSE)
    # One program for every first chunk, one for all later ones of a size.
    assert step._cache_size() == 1 + size


def test_a_stream_of_frames_equals_whole():
  step = jax.jit(
    vae.encode_step, static_argnames=("cfg", "first"), donate_argnames="cache"
  )
  for size in (1, 2, 3):
    cache = vae.encoder_cache(CFG, 1, HEIGHT, WIDTH)
    found = stream(step, cache, video(), 4 * size)
    np.testing.assert_allclose(found, encoded(), **CLOSE)
    assert step._cache_size() == 1 + size


def test_a_prefix_gives_the_prefix():
  found = encode(CFG, params(), video()[:, :9], chunk=None)
  np.testing.assert_allclose(found, encoded()[:, :3], **CLOSE)


def test_no_latent_frame_depends_on_later_frames():
  for f in range(LATENTS):
    last = 4 * f
    changed = lambda frames: encode(
      CFG, params(), video().at[:, frames].multiply(-1), chunk=None
    )
    later = changed(slice(last + 1, None))
    np.testing.assert_array_equal(later[:, : f + 1], encoded()[:, : f + 1])
    assert jnp.abs(changed(last) - encoded())[:, f].max() > 1e-3


def test_no_frame_depends_on_later_latents():
  for f in range(LATENTS):
    changed = lambda frames: decode(
      CFG,
      params(),
      latents().at[:, frames].multiply(-1),
      chunk=None,
      clamp=False,
    )
    frames = CFG.frames(f + 1)
    later = changed(slice(f + 1, None))
    np.testing.assert_array_equal(later[:, :frames], decoded()[:, :frames])
    difference = jnp.abs(changed(f) - decoded())
    assert (
      difference.max((0, 2, 3, 4))[max(0, frames - 4) : frames] > 1e-3
    ).all()


def fresh(layer, x):
  """Parameters of a layer, and it applied to the start of a video."""
  weights = jax.jit(lambda: layer.init(jax.random.key(0), x, True))()
  return weights["params"], jax.jit(lambda x: layer.apply(weights, x, True))


def convolved(x, conv, stride=1):
  """A convolution over space, without padding, of every frame."""
  conv = jax.tree.map(np.asarray, conv)
  size, (h, w) = len(conv["kernel"]), x.shape[2:4]
  taps = (
    x[:, :, i : h - size + i + 1 : stride, j : w - size + j + 1 : stride]
    @ conv["kernel"][i, j]
    for i, j in np.ndindex(size, size)
  )
  return sum(taps) + conv["bias"]


def test_the_first_frame_goes_around_the_upsampling_of_time():
  x = noise(4, 1, 4, 2, 3, 4)
  weights, apply = fresh(Up(True, "float32"), x)
  # Behind two frames of zeros, not behind the first frame, which is no
  # context; channels come out as those of two frames, one after the other.
  kernel = np.asarray(weights["time"]["kernel"][:, 0, 0])
  padded = np.pad(x[:, 1:], ((0, 0), (2, 0), (0, 0), (0, 0), (0, 0)))
  y = sum(padded[:, i : i + 3] @ kernel[i] for i in range(3))
  pairs = y.reshape(1, 3, 2, 3, 2, 4).transpose(0, 1, 4, 2, 3, 5)
  frames = np.concatenate([x[:, :1], pairs.reshape(1, 6, 2, 3, 4)], 1)
  large = frames.repeat(2, 2).repeat(2, 3)
  large = np.pad(large, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
  np.testing.assert_allclose(
    apply(x), convolved(large, weights["space"]), **CLOSE
  )


def test_the_first_frame_goes_around_the_downsampling_of_time():
  x = noise(5, 1, 5, 4, 6, 3)
  weights, apply = fresh(Down(True, "float32"), x)
  # Zeros below and to the right only.
  padded = np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)))
  frames = convolved(padded, weights["space"], 2)
  kernel = np.asarray(weights["time"]["kernel"][:, 0, 0])
  later = sum(frames[:, i : i + 3 : 2] @ kernel[i] for i in range(3))
  wanted = np.concatenate([frames[:, :1], later + weights["time"]["bias"]], 1)
  np.testing.assert_allclose(apply(x), wanted, **CLOSE)


def test_a_causal_convolution_is_one_behind_zeros():
  x = noise(6, 1, 4, 3, 5, 2)
  conv = CausalConv(3, "float32")
  weights = jax.jit(lambda: conv.init(jax.random.key(0), x)["params"])()
  padded = np.pad(x, ((0, 0), (2, 0), (1, 1), (1, 1), (0, 0)))
  kernel = np.asarray(weights["kernel"])
  wanted = sum(
    padded[:, i : i + 4, j : j + 3, k : k + 5] @ kernel[i, j, k]
    for i, j, k in np.ndindex(3, 3, 3)
  )
  found = conv.apply({"params": weights}, x)
  np.testing.assert_allclose(found, wanted, **CLOSE)


def test_the_norm_and_its_gradient_at_zero():
  x = noise(7, 2, 5)
  scale = noise(8, 5)
  norm = jax.jit(lambda x: Norm().apply({"params": {"scale": scale}}, x))
  length = jnp.sqrt(jnp.sum(x**2, -1, keepdims=True))
  np.testing.assert_allclose(norm(x), x / length * 5**0.5 * scale, **CLOSE)
  gradient = jax.grad(lambda x: norm(x).sum())(jnp.zeros((2, 5)))
  assert jnp.isfinite(gradient).all()


def test_moments_and_units():
  mu, logvar = jax.jit(vae.moments, static_argnames=("cfg", "chunk"))(
    CFG, params(), video()
  )
  assert mu.shape == logvar.shape == latents().shape
  assert not np.allclose(mu, logvar)
  wanted = (np.asarray(mu) - [0.3, -0.2]) / [2.0, 0.5]
  np.testing.assert_allclose(encoded(), wanted, **CLOSE)
  back = vae.denormalize(CFG, vae.normalize(CFG, mu))
  np.testing.assert_allclose(back, mu, **CLOSE)


def test_bfloat16_keeps_its_memory_so_and_gives_float32():
  cfg = vae.VAEConfig(**{**vars(CFG), "dtype": "bfloat16"})
  cache = jax.eval_shape(lambda: vae.decoder_cache(cfg, 1, HEIGHT, WIDTH))
  step = functools.partial(vae.decode_step, cfg, first=True)
  frames, after = jax.eval_shape(step, params(), latents(), cache)
  assert frames.dtype == "float32"
  assert jax.tree.leaves(cache)[0].dtype == "bfloat16"
  assert after == cache


@pytest.mark.parametrize("layout", ["orig", "diff"])
def test_names_and_shapes_are_those_of_the_files(layout):
  path = Path(__file__).parent / "wan" / f"names_{layout}_vae.json"
  wanted = {n: tuple(s) for n, (s, _) in json.loads(path.read_text()).items()}
  name = {"orig": "original", "diff": "diffusers"}[layout]
  listed = vae_names.tensors(vae.VAEConfig())
  assert {getattr(t, name): t.shape for t in listed} == wanted
  assert len(listed) == len(wanted)


@pytest.mark.parametrize("cfg", [CFG, vae.VAEConfig()], ids=["tiny", "wan"])
def test_names_cover_every_parameter_once(cfg):
  tree = jax.eval_shape(lambda: vae.init(cfg, jax.random.key(0)))
  wanted = {
    "/".join(key.key for key in path): leaf.shape
    for path, leaf in jax.tree.leaves_with_path(tree)
  }
  listed = vae_names.tensors(cfg)
  assert len(listed) == len(wanted)
  empty = {t.path: np.broadcast_to(np.float32(0), t.shape) for t in listed}
  assert {t.path: t.ours(empty[t.path]).shape for t in listed} == wanted


def test_tensors_turn_there_and_back():
  for tensor in vae_names.tensors(CFG):
    x = np.random.default_rng(0).normal(size=tensor.shape)
    np.testing.assert_array_equal(tensor.theirs(tensor.ours(x)), x)


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"base_dim": 0}, "vae.base_dim 0"),
    ({"base_dim": 5}, "vae.base_dim 5: give an even"),
    ({"z_dim": -1}, "vae.z_dim -1"),
    ({"z_dim": 3}, "vae.latents_mean has 2 values"),
    ({"num_res_blocks": 0}, "vae.num_res_blocks"),
    ({"dim_mult": ()}, "vae.dim_mult"),
    ({"dim_mult": (1, 0, 1, 1)}, "vae.dim_mult"),
    ({"temporal_downsample": (True,)}, "vae.temporal_downsample has 1"),
    ({"latents_std": (1.0, 0.0)}, "vae.latents_std 0.0"),
    ({"latents_std": (1.0,)}, "vae.latents_std has 1"),
    ({"dtype": "float16"}, "vae.dtype 'float16'"),
  ],
)
def test_wrong_configs_are_refused_by_name(change, says):
  with pytest.raises(UserError, match=says):
    vae.VAEConfig(**{**vars(CFG), **change})


def test_wrong_sizes_are_refused():
  for frames, says in ((80, "77 or 81"), (0, "1 or 5"), (2, "1 or 5")):
    with pytest.raises(UserError, match=says):
      CFG.latent_frames(frames)
  with pytest.raises(UserError, match="at least 1"):
    CFG.frames(0)
  with pytest.raises(UserError, match="20x24: the VAE takes multiples of 8"):
    vae.decoder_cache(CFG, 1, 20, 24)
  with pytest.raises(UserError, match="16x20"):
    vae.encode(CFG, params(), video()[:, :, :, :20])
  with pytest.raises(UserError, match="21 or 25"):
    vae.encode(CFG, params(), video()[:, :24])
  with pytest.raises(UserError, match="chunks of 0"):
    vae.encode(CFG, params(), video(), chunk=0)
  with pytest.raises(UserError, match="chunks of 0"):
    vae.decode(CFG, params(), latents(), chunk=0)
  with pytest.raises(UserError, match="z_dim 2 channels"):
    vae.decode(CFG, params(), latents()[..., :1])
  cache = vae.encoder_cache(CFG, 1, HEIGHT, WIDTH)
  with pytest.raises(UserError, match="later chunk of 5"):
    vae.encode_step(CFG, params(), video()[:, :5], cache)
