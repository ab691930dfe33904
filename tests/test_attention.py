"""Attention: the reference against float64, and the exact merge."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.ops import reference as attention


def oracle(q, k, v, mask):
  """Dense softmax attention in float64, row by row."""
  q, k, v = (np.asarray(z, np.float64) for z in (q, k, v))
  b, m, a, d = q.shape
  mask = np.broadcast_to(mask, (b, a, m, k.shape[1]))
  out, lse = np.zeros(q.shape), np.full((b, m, a), attention.EMPTY)
  for i, j, h in np.ndindex(b, m, a):
    seen = mask[i, h, j]
    if seen.any():
      logits = k[i, seen, h] @ q[i, j, h] / np.sqrt(d)
      top = logits.max()
      lse[i, j, h] = top + np.log(np.exp(logits - top).sum())
      out[i, j, h] = np.exp(logits - lse[i, j, h]) @ v[i, seen, h]
  return out, lse


@pytest.fixture(scope="module")
def inputs():
  rng = np.random.default_rng(0)
  shapes = ((2, 5, 3, 6), (2, 7, 3, 6), (2, 7, 3, 6))
  q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
  return 2 * q, k, v


@pytest.fixture(scope="module")
def mask():
  mask = np.random.default_rng(1).random((5, 7)) < 0.5
  mask[2] = False  # a row without keys
  mask[3] = False
  mask[3, 6] = True
  return mask


reference = jax.jit(attention.reference)


@pytest.mark.parametrize("rank", [2, 4])
def test_reference_against_float64(inputs, mask, rank):
  if rank == 4:
    mask = np.random.default_rng(2).random((2, 3, 5, 7)) < 0.6
  out, lse = reference(*inputs, mask)
  want_out, want_lse = oracle(*inputs, mask)
  np.testing.assert_allclose(out, want_out, atol=2e-6)
  np.testing.assert_allclose(lse, want_lse, rtol=1e-6, atol=2e-6)


def test_no_mask_sees_everything(inputs):
  out, lse = attention.reference(*inputs)
  want_out, want_lse = oracle(*inputs, True)
  np.testing.assert_allclose(out, want_out, atol=2e-6)
  np.testing.assert_allclose(lse, want_lse, atol=2e-6)


def test_rows_without_keys_are_zero_and_pass_no_nan_back(inputs, mask):
  def total(q, k, v):
    out, lse = attention.reference(q, k, v, mask)
    return jnp.sum(out**2) + jnp.sum(jnp.where(lse > attention.EMPTY, lse, 0))

  out, lse = reference(*inputs, mask)
  assert not np.any(out[:, 2])
  assert np.all(lse[:, 2] == np.float32(attention.EMPTY))
  grads = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*inputs)
  for grad in grads:
    assert np.isfinite(grad).all()
  assert not np.any(grads[0][:, 2])
  assert np.any(grads[0][:, 0])


def test_a_branch_may_have_no_keys_at_all(inputs):
  q, k, v = inputs
  none = attention.reference(
    q, k[:, :0], v[:, :0], np.zeros((q.shape[1], 0), bool)
  )
  assert not np.any(none[0])
  every = attention.reference(q, k, v)
  merged = attention.merge(every, none)
  np.testing.assert_allclose(merged[0], every[0], atol=1e-6)
  np.testing.assert_allclose(merged[1], every[1], atol=1e-6)


def test_large_logits_do_not_overflow(inputs, mask):
  q, k, v = inputs
  out, lse = reference(100 * q, k, v, mask)
  want_out, want_lse = oracle(100 * q, k, v, mask)
  np.testing.assert_allclose(out, want_out, atol=2e-4)
  np.testing.assert_allclose(lse, want_lse, rtol=1e-5)


def test_bfloat16_in_bfloat16_out_with_float32_sums(inputs):
  rounded = [z.astype(jnp.bfloat16) for z in inputs]
  out, lse = reference(*rounded)
  want_out, want_lse = oracle(*rounded, mask=True)
  assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
  np.testing.assert_allclose(lse, want_lse, atol=1e-5)
  np.testing.assert_allclose(np.asarray(out, np.float32), want_out, atol=2e-2)


def branches(q, k, v, mask, cuts):
  edges = [0, *cuts, k.shape[1]]
  return attention.merge(
    *(
      attention.reference(q, k[:, a:b], v[:, a:b], mask[:, a:b])
      for a, b in itertools.pairwise(edges)
    )
  )


# The cut at 6 leaves rows that see keys in one branch only; row 2 sees none.
@pytest.mark.parametrize("cuts", [(3,), (6,), (2, 5)])
def test_merge_is_one_softmax(inputs, mask, cuts):
  merged = branches(*inputs, mask, cuts)
  whole = reference(*inputs, mask)
  np.testing.assert_allclose(merged[0], whole[0], atol=2e-6)
  np.testing.assert_allclose(merged[1], whole[1], rtol=1e-6, atol=2e-6)


def test_merge_has_the_gradient_of_one_softmax(inputs, mask):
  weight = np.random.default_rng(3).normal(size=(2, 5, 3, 6))
  weight = weight.astype(np.float32)

  def score(attend, *qkv):
    out, lse = attend(*qkv)
    return jnp.sum(out * weight) + jnp.sum(
      jnp.where(lse > attention.EMPTY / 2, jnp.sin(lse), 0)
    )

  grads = [
    jax.jit(jax.grad(functools.partial(score, attend), argnums=(0, 1, 2)))(
      *inputs
    )
    for attend in (
      lambda *qkv: branches(*qkv, mask, (3, 5)),
      lambda *qkv: attention.reference(*qkv, mask),
    )
  ]
  for merged, whole in zip(*grads, strict=True):
    np.testing.assert_allclose(merged, whole, atol=5e-6)
    assert np.abs(whole).max() > 0.1
