"""Ways to sample long videos, each against the plain loop of test_sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampling import CLOSE, by_hand, inputs, tiny, weights

from avd_jax import config as config_lib
from avd_jax import sampling
from avd_jax.errors import UserError
from avd_jax.models import denoiser as denoiser_lib


@pytest.fixture(scope="module")
def sampler():
  """Every chunk is seen: what a cache holds shows."""
  config = tiny()
  return sampling.Sampler(config, weights(config))


def changed(sampler, **sampling_options):
  """The same weights, sampled in another way."""
  config = config_lib.from_json(config_lib.to_json(sampler.config))
  config.sampling.update(sampling_options)
  config_lib.check(config)
  return sampling.Sampler(config, sampler.params)


@pytest.mark.parametrize("told", [None, 0.1])
def test_noised_context_is_the_plain_loop_s(sampler, told):
  """And no more than the rest does it depend on how a video is cut."""
  noised = changed(sampler, context_noise=0.4, context_told=told)
  start, text = inputs(1)
  video = noised.extend(start, text, 7, seed=4)
  CLOSE(video, by_hand(noised, start, text, 7, seed=4))
  whole = changed(noised, segment=6)
  CLOSE(whole.extend(start, text, 7, seed=4), video)
  plain = sampler.extend(start, text, 7, seed=4)
  CLOSE(video[:, :2], plain[:, :2])  # what is given is not noised
  assert np.abs(video - plain)[:, 2:].max() > 1e-2


@pytest.mark.parametrize(
  ("window", "keep", "segment", "given", "frames"),
  [(4, 2, 8, 1, 2), (4, 1, 2, 0, 1), (3, 2, 1, 2, 1), (4, 3, 2, 2, 1)],
)
def test_a_recomputed_cache_is_the_plain_loop_s(
  sampler, window, keep, segment, given, frames
):
  """Every window starts anew from the last chunks; noise goes on."""
  options = dict(
    recompute=window,
    recompute_keep=keep,
    segment=segment,
    context_noise=0.3 * (frames == 1),
  )
  config = tiny(chunk_frames=frames)
  plain = sampling.Sampler(config, sampler.params)
  sampler = changed(plain, **options)
  start, text = inputs(given * frames)
  video = sampler.extend(start, text, 8 * frames, seed=5)
  assert video.shape == (2, 8 * frames, 12, 12, 3)
  CLOSE(video, by_hand(sampler, start, text, 8 * frames, seed=5))
  # Whatever the length: one program makes chunks, and one fills caches.
  assert sampler.segment._cache_size() == 1
  assert sampler._prefill._cache_size() == 1
  if frames == 1:
    never = changed(plain, context_noise=0.3).extend(start, text, 8, seed=5)
    CLOSE(video[:, :window], never[:, :window])
    assert np.abs(video - never)[:, window:].max() > 1e-3


def test_a_recomputed_stream_ends_where_it_should(sampler):
  """Segments that a window or the video's end cuts short."""
  sampler = changed(sampler, recompute=6, recompute_keep=2, segment=3)
  start, text = inputs(1)
  parts = list(sampler.stream(start, text, 13, seed=5))
  # 1 given, 5 to the window's end, 4 in the next window, and 3 to the end.
  assert [p.shape[1] for p in parts] == [3, 2, 3, 1, 3]
  video = changed(sampler, segment=1).extend(start, text, 13, seed=5)
  CLOSE(np.concatenate(parts, 1), video[:, 1:])
  CLOSE(sampler.extend(start, text, 4, seed=5), video[:, :4])


def test_recomputing_with_nothing_left_to_make_is_refused(sampler):
  sampler = changed(sampler, recompute=3)
  start, text = inputs(3)
  message = r"3 given chunks fill sampling.recompute 3"
  with pytest.raises(UserError, match=message):
    sampler.extend(start, text, 6)


def test_both_guidances_share_a_noised_past():
  """Four caches: with text and without, over the same two pasts."""
  config = tiny(text="bytes")
  config.sampling.update(
    guidance=3.0, history_guidance=2.0, history_level=0.5, steps=1
  )
  sampler = sampling.Sampler(config, weights(config))
  start, text = inputs(1)
  video = sampler.extend(start, text, 3, seed=0)
  call = jax.jit(
    functools.partial(denoiser_lib.make(sampler.model).cached, sampler.params)
  )
  like = jax.ShapeDtypeStruct(start.shape, jnp.float32)
  empty = denoiser_lib.make(sampler.model).init_cache(like, 3)
  texts, caches = (text, np.zeros_like(text)), [[empty] * 2, [empty] * 2]

  def each(past, x, level, chunk):
    """The velocity guided by text, over one of the pasts."""
    both, t = [], jnp.full(2, level, jnp.float32)
    for i, said in enumerate(texts):
      v, caches[past][i] = call(x, t, said, caches[past][i], jnp.int32(chunk))
      both.append(v)
    return both[1] + 3.0 * (both[0] - both[1])

  x = jnp.asarray(start)
  for chunk in range(3):
    key = jax.random.fold_in(jax.random.key(0), chunk)
    if chunk:
      x = jax.random.normal(key, start.shape)
      full, null = (each(past, x, 1.0, chunk) for past in (0, 1))
      x = x - (null + 2.0 * (full - null))
    CLOSE(video[:, chunk : chunk + 1], x, atol=1e-3)
    noise = jax.random.normal(jax.random.fold_in(key, 2), x.shape)
    each(0, x, 0.0, chunk)
    each(1, (x + noise) / 2, 0.5, chunk)
