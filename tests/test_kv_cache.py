"""The KV cache: a window is its ring, at any length."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.ops import attention, kv_cache

CASES = [
  # chunks, window, sink, keep_all
  (7, None, 0, False),
  (12, 1, 0, False),
  (12, 3, 0, False),
  (12, 2, 1, False),
  (12, 1, 3, False),
  (12, 2, 2, True),
  (3, 4, 2, False),  # shorter than its window
  (2, 1, 2, False),  # all of it sink
  (1, 2, 5, False),
]


def held_and_visible(layout, chunks):
  """Tables [chunks, slots] of both, in one call."""
  index = jnp.arange(chunks)
  return (
    np.asarray(jax.vmap(layout.slot)(index)),
    np.asarray(jax.vmap(layout.held)(index)),
    np.asarray(jax.vmap(layout.visible)(index)),
  )


@pytest.mark.parametrize("case", CASES)
def test_a_video_played_through_the_slots(case):
  chunks, window, sink, keep_all = case
  layout = kv_cache.layout(chunks, window, sink, keep_all)
  slot, held, visible = held_and_visible(layout, chunks)
  contents = np.full(layout.slots, -1)
  for chunk in range(chunks):
    assert 0 <= slot[chunk] < layout.slots
    contents[slot[chunk]] = chunk
    np.testing.assert_array_equal(held[chunk], contents)
    seen = sorted(contents[visible[chunk]])
    wanted = [
      k
      for k in range(chunk + 1)
      if window is None or chunk - k <= window or k < sink
    ]
    assert seen == wanted  # everything in sight is there, and nothing else


def test_a_ring_never_grows():
  """A windowed cache's size is the window's, however long the video."""
  for window, sink in ((1, 0), (4, 2)):
    short, long = (
      kv_cache.layout(chunks, window, sink, False)
      for chunks in (window + sink + 1, 10**6)
    )
    assert short.slots == long.slots == window + sink + 1
  assert kv_cache.layout(10**6, 4, 2, True).slots == 10**6


def test_far_chunks_find_their_slots():
  layout = kv_cache.layout(10**9, 3, 2, False)
  chunk = jnp.int32(10**9 - 1)
  held = set(np.asarray(layout.held(chunk)).tolist())
  assert held == {0, 1, *range(10**9 - 4, 10**9)}
  assert np.asarray(layout.visible(chunk)).all()


def test_write_changes_one_slot_and_casts():
  rng = np.random.default_rng(0)
  buffer = jnp.asarray(rng.normal(size=(2, 3, 2, 1, 4)), jnp.bfloat16)
  new = jnp.asarray(rng.normal(size=(2, 1, 2, 1, 4)), jnp.float32)
  written = jax.jit(kv_cache.write)(buffer, new, jnp.int32(1))
  expected = np.array(buffer)
  expected[:, 1:2] = np.asarray(new.astype(jnp.bfloat16))
  assert written.dtype == jnp.bfloat16
  np.testing.assert_array_equal(written, expected)


def test_init_has_a_buffer_per_layer():
  cache = kv_cache.init(3, 4, (2, 2, 1, 4), "bfloat16", routed=True)
  assert len(cache.k) == len(cache.v) == len(cache.mean) == 3
  assert all(z.shape == (2, 4, 2, 1, 4) for z in (*cache.k, *cache.v))
  assert all(z.shape == (2, 4, 1, 4) for z in cache.mean)
  assert {z.dtype.name for z in cache.mean} == {"float32"}
  every = (*cache.k, *cache.v, *cache.mean)
  buffers = {z.unsafe_buffer_pointer() for z in every}
  assert len(buffers) == 9  # not aliases: each is donated and written
  assert kv_cache.init(3, 4, (2, 2, 1, 4), "float32").mean == ()


@pytest.mark.parametrize("case", CASES)
def test_a_layout_s_sight_is_what_it_says(case):
  chunks, window, sink, keep_all = case
  layout = kv_cache.layout(chunks, window, sink, keep_all)
  _, held, visible = held_and_visible(layout, chunks)
  for chunk in range(chunks):
    sight = layout.sight(jnp.int32(chunk), 5)
    np.testing.assert_array_equal(sight.sees[0], visible[chunk])
    assert held[chunk][int(sight.own[0])] == chunk
    assert sight.own.dtype == jnp.int32
    if sight.count is None:  # a buffer with more than what is in sight
      assert keep_all
    else:
      np.testing.assert_array_equal(
        visible[chunk], np.arange(layout.slots) < int(sight.count)
      )
    if layout.in_order:
      filled = held[chunk] >= 0
      np.testing.assert_array_equal(
        held[chunk][filled], np.arange(layout.slots)[filled]
      )


def test_solver_steps_copy_no_cache():
  """Written in place, and read where it lies, however much room it has."""
  layout, shape = kv_cache.Layout(40), (1, 8, 2, 16)
  cache = kv_cache.init(2, layout.slots, shape, "float32")

  def step(chunk, carry, _):
    x, layers = carry
    after = []
    for k, v in layers:
      k, v = (kv_cache.write(z, x, layout.slot(chunk)) for z in (k, v))
      x, _ = attention.attend(
        x, k, v, layout.sight(chunk, 8), implementation="xla"
      )
      after.append((k, v))
    return (x, after), None

  @functools.partial(jax.jit, donate_argnums=1)
  def solve(x, layers, chunk):
    return jax.lax.scan(functools.partial(step, chunk), (x, layers), length=3)[
      0
    ]

  x = jax.ShapeDtypeStruct((1, 1, *shape[1:]), "float32")
  layers = list(zip(cache.k, cache.v, strict=True))
  text = solve.lower(x, layers, jnp.int32(3)).compile().as_text()
  whole = r"f32\[1,(40,8|320),2,16\]\S* "
  assert re.search(whole + "dynamic-update-slice|" + whole + "fusion", text)
  assert not re.findall(rf"= {whole}copy\(.*", text)
