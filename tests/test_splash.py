"""Splash attention: its mask, and its results, against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.errors import UserError
from avd_jax.ops import kv_cache, masked, masks, problem, routing
from avd_jax.ops.kernels import splash
from avd_jax.ops.masks import Sight
from avd_jax.ops.reference import reference

BLOCK = 128


def sight(streams, chunks, tokens, window=None, sink=0, rows=None):
  mask = masks.history_mask(streams, window, sink)
  return masks.sight(mask, chunks, streams, tokens, rows, sink)


SIGHTS = {
  "block causal": sight(1, 5, 33),
  "two streams": sight(2, 4, 40),
  "two streams, one token": sight(2, 300 // 4, 4),
  "window": sight(2, 6, 24, window=2),
  "window and sink": sight(2, 6, 24, window=2, sink=1),
  "noisy rows only": sight(2, 5, 40, rows=5),
}


def sight_mask(one, lengths):
  padded = tuple(-(-n // BLOCK) * BLOCK for n in lengths)
  rows = tuple(splash._bounds(one, row) for row in range(len(one.sees)))
  return splash.SightMask(padded, rows, one.tokens, one.tokens)


@pytest.mark.parametrize("name", SIGHTS)
def test_mask_is_the_dense_table(name):
  one = SIGHTS[name]
  want = masks.dense(one.sees, one.tokens, one.tokens)
  mask = sight_mask(one, want.shape)
  got = mask.table()
  np.testing.assert_array_equal(got[: len(want), : want.shape[1]], want)
  assert not got[:, want.shape[1] :].any()  # padding keys
  assert got.any(1).all()  # padding queries see something
  for q in range(0, got.shape[0], BLOCK):
    for k in range(0, got.shape[1], BLOCK):
      at = slice(q, q + BLOCK), slice(k, k + BLOCK)
      assert mask[at].any() == got[at].any()
      if mask[at].all():
        assert got[at].all()


def test_blocks_in_full_are_known_as_such():
  """Otherwise splash is right, and slow."""
  one = sight(2, 4, 256)
  mask = sight_mask(one, (2048, 2048))
  table = mask.table()
  for q in range(0, 2048, BLOCK):
    for k in range(0, 2048, BLOCK):
      at = slice(q, q + BLOCK), slice(k, k + BLOCK)
      assert mask[at].all() == table[at].all()


@functools.cache
def inputs(name):
  one = SIGHTS[name]
  rows, columns = one.sees.shape
  draw = np.random.default_rng(0).normal
  array = lambda n: jnp.asarray(draw(size=(1, n * one.tokens, 1, 128)))
  arrays = array(rows), array(columns), array(columns)
  return tuple(x.astype(jnp.float32) for x in arrays)


def attend(name, q, k, v):
  return splash.attend(q, k, v, SIGHTS[name], block=BLOCK, interpret=True)


@pytest.mark.parametrize("name", ["window and sink", "noisy rows only"])
def test_out_lse_and_gradients(name):
  one = SIGHTS[name]
  table = masks.dense(one.sees, one.tokens, one.tokens)
  plain = lambda name, q, k, v: reference(q, k, v, table)

  @functools.partial(jax.jit, static_argnums=0)
  def results(attention, arrays):
    def loss(arrays):
      out, lse = attention(name, *arrays)
      return jnp.sum(jnp.sin(out)), (out, lse)

    return jax.grad(loss, has_aux=True)(arrays)

  got = results(attend, inputs(name))
  want = results(plain, inputs(name))
  close = functools.partial(np.testing.assert_allclose, atol=2e-5)
  jax.tree.map(close, got, want)


def test_the_lse_has_no_gradient():
  arrays = inputs("noisy rows only")
  loss = lambda arrays: jnp.sum(attend("noisy rows only", *arrays)[1])
  with pytest.raises(NotImplementedError, match="log-sum-exp"):
    jax.eval_shape(jax.grad(loss), arrays)
  stopped = lambda arrays: loss(jax.lax.stop_gradient(arrays))
  jax.eval_shape(jax.grad(stopped), arrays)


@pytest.mark.parametrize(
  ("sink", "chunk", "keep_all"), [(0, 1, False), (1, 4, False), (1, 5, True)]
)
def test_against_a_cache_it_sees_slot_after_slot(sink, chunk, keep_all):
  """Slots not yet filled, a ring that has wrapped, chunks out of a window's
  sight; sinks met by queries of their own; gradients."""
  layout = kv_cache.layout(6, 2, sink, keep_all)
  rng = np.random.default_rng(0)
  normal = lambda n: jnp.asarray(rng.normal(size=(2, n * 24, 2, 64)), "float32")
  arrays = normal(1), normal(layout.slots), normal(layout.slots), normal(1)

  def value(call, arrays, now):
    q, k, v, far = arrays
    one = layout.sight(now, 24)
    out, lse = call(q, k, v, one, q_sink=far if one.sink else None)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse)), (out, lse)

  kernel = functools.partial(splash.attend, block=128, interpret=True)
  grade = lambda call: jax.jit(
    jax.value_and_grad(functools.partial(value, call), has_aux=True)
  )(arrays, jnp.int32(chunk))
  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
  jax.tree.map(close, grade(kernel), grade(masked.attend))


def test_what_splash_does_not_take():
  one = SIGHTS["window and sink"]
  q, k, v = inputs("window and sink")
  asked = routing.Routing(1, routing.descriptors(k[:, : 6 * 24], 24))
  with pytest.raises(UserError, match="routing"):
    splash.attend(q, k, v, one, routing=asked)
  with pytest.raises(UserError, match="sinks"):
    splash.attend(q, k, v, one, q_sink=q)
  odd = np.array([[False, True, True, False, True, True]])
  with pytest.raises(UserError, match="one range"):
    splash.attend(
      q[:, :24],
      k[:, : 6 * 24],
      v[:, : 6 * 24],
      Sight(odd, np.array([5]), 24, 6),
    )


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({}, None),
    ({"platform": "cpu"}, "TPUs only"),
    ({"top_k": 5}, "no routing"),
    ({"static": False, "sink_queries": True, "columns": 256}, None),
    ({"sink_queries": True}, "one set of queries"),
    ({"runs": 4}, "at most 3"),
    ({"columns": 256}, "at most 255"),
    ({"head_dim": 64}, None),
    ({"head_dim": 96}, "multiple of 64"),
    ({"dtype": "float16"}, "bfloat16"),
  ],
)
def test_refuses(change, reason):
  asked = problem.Problem(
    platform="tpu",
    batch=1,
    rows=14,
    columns=14,
    tokens=4680,
    heads=12,
    head_dim=128,
    dtype="bfloat16",
  )
  said = splash.refuses(dataclasses.replace(asked, **change))
  assert said is None if reason is None else reason in said
