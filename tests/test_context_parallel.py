"""Tokens of a chunk cut over mesh axis context: the numbers of one device."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax import parallel
from avd_jax.errors import UserError
from avd_jax.ops import attention, kv_cache, masks, per_device, routing
from avd_jax.ops.kernels import splash, triton_ranges, triton_routed
from avd_jax.ops.routing import Routing

B, N, T, A, D = 2, 4, 8, 2, 12
CLOSE = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def normal(*shape, seed):
  return jnp.asarray(
    np.random.default_rng(seed).normal(size=shape), jnp.float32
  )


def sight_of(case):
  """(sight, order of its columns) of a training pass or of a decoded chunk."""
  if case == "cache":
    layout = kv_cache.layout(N + 2, 2, 1, keep_all=False)
    chunk = jnp.int32(N + 1)
    return layout.sight(chunk, T), layout.held(chunk)
  window, sink = (2, 1) if case == "sink" else (None, 0)
  mask = masks.history_mask(2, window, sink)
  return masks.sight(mask, N, 2, T, sink=sink), None


def arrays_of(case, head_dim=D):
  rows, columns = sight_of(case)[0].sees.shape
  q, k, v = (
    normal(B, n, T, A, head_dim, seed=seed)
    for seed, n in enumerate((rows, columns, columns))
  )
  far = normal(B, rows, T, A, head_dim, seed=3)
  return q, k, v, far


def score(call, case, top_k, raw, q, k, v, far):
  sight, order = sight_of(case)
  rule = None
  if top_k:
    means = routing.descriptors(k[:, : sight.history], T)
    rule = Routing(top_k, means, far if raw else None, order)
  out, lse = call(
    q, k, v, sight, routing=rule, q_sink=far if sight.sink else None
  )
  return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse)), (out, lse)


def graded(call, case, top_k, raw, arrays):
  of = functools.partial(score, call, case, top_k, raw)
  return jax.jit(jax.value_and_grad(of, (0, 1, 2, 3), has_aux=True))(*arrays)


@pytest.mark.parametrize(
  ("implementation", "case", "top_k", "shape"),
  [
    ("reference", "whole", None, (1, 1, 4, 1)),
    ("reference", "sink", "raw", (1, 1, 2, 1)),
    ("xla", "sink", None, (1, 2, 2, 2)),
    ("xla", "whole", None, (1, 1, 4, 1)),
    ("xla", "whole", 2, (1, 1, 2, 1)),
    ("xla", "cache", None, (1, 1, 4, 1)),
    ("xla", "cache", "raw", (1, 2, 2, 2)),
  ],
)
def test_parts_are_one_softmax(implementation, case, top_k, shape):
  """Out, lse and gradients, routed by means of whole chunks."""
  raw, top_k = top_k == "raw", 2 if top_k else None
  arrays = arrays_of(case)
  call = functools.partial(attention.attend, implementation=implementation)
  one = graded(call, case, top_k, raw, arrays)
  mesh = parallel.make_mesh(jax.devices()[: int(np.prod(shape))], shape)
  cut = jax.NamedSharding(mesh, parallel.spec(parallel.HEADS))
  placed = jax.device_put(arrays, cut)
  call = functools.partial(call, place=mesh)
  jax.tree.map(CLOSE, graded(call, case, top_k, raw, placed), one)


@pytest.mark.parametrize("top_k", [None, 2])
def test_kernels_are_merged_by_their_lse(top_k):
  """The GPU kernels, interpreted: merging takes gradients through the lse."""
  arrays = arrays_of("whole", head_dim=16)
  mesh = parallel.make_mesh(jax.devices()[:2], (1, 1, 2, 1))
  module = triton_routed if top_k else triton_ranges
  kernel = functools.partial(module.attend, interpret=True)

  def ring(q, k, v, sight, routing, q_sink):
    return per_device.attend(kernel, mesh, q, k, v, sight, routing, q_sink)

  plain = functools.partial(attention.attend, implementation="reference")
  one = graded(plain, "whole", top_k, False, arrays)
  many = graded(ring, "whole", top_k, False, arrays)
  jax.tree.map(CLOSE, many, one)


def test_keys_stay_where_they_are():
  """A decoded chunk moves queries, not the cache."""
  mesh = parallel.make_mesh(jax.devices()[:4], (1, 1, 4, 1))
  sight, order = sight_of("cache")
  q, k, v, far = arrays_of("cache")
  cut = jax.NamedSharding(mesh, parallel.spec(parallel.HEADS))
  call = jax.jit(
    lambda q, k, v, far: attention.attend(
      q, k, v, sight, q_sink=far, implementation="reference", place=mesh
    )
  )
  text = call.lower(*jax.device_put((q, k, v, far), cut)).compile().as_text()
  assert "collective-permute" in text
  assert "all-gather" not in text
  assert "all-to-all" not in text
  del order


def test_attention_to_text_stays_where_its_queries_are():
  mesh = parallel.make_mesh(jax.devices(), (2, 1, 2, 2))
  q, text = normal(B, N, T, A, D, seed=0), normal(B, 5, A, D, seed=1)
  one = attention.attend_all(q, text, text)
  flat = attention.attend_all(q.reshape(B, -1, A, D), text, text)
  chex.assert_trees_all_equal(flat.reshape(q.shape), one)
  many = jax.jit(functools.partial(attention.attend_all, place=mesh))
  CLOSE(many(q, text, text), one)


def test_what_context_does_not_divide_is_refused():
  mesh = parallel.make_mesh(jax.devices()[:3], (1, 1, 3, 1))
  q, k, v, _ = arrays_of("whole")
  with pytest.raises(UserError, match=r"8 tokens a chunk.*context = 3"):
    attention.attend(q, k, v, sight_of("whole")[0], place=mesh)
  with pytest.raises(UserError, match=r"8 tokens .* mesh.context = 3; change"):
    parallel.constrain(q, mesh, parallel.HEADS)


@pytest.mark.parametrize("case", ["whole", "sink"])
def test_a_kernel_without_lse_gradient_sees_gathered_keys(case):
  """Splash, interpreted, on half of each chunk's queries."""
  arrays = arrays_of(case, head_dim=64)
  mesh = parallel.make_mesh(jax.devices()[:2], (1, 1, 2, 1))
  sight = sight_of(case)[0]
  kernel = functools.partial(splash.attend, interpret=True, block=128)

  def value(call, q, k, v):
    out, _ = call(q, k, v, sight)
    return jnp.sum(jnp.sin(out)), out

  graded = lambda call: jax.jit(
    jax.value_and_grad(functools.partial(value, call), (0, 1, 2), has_aux=True)
  )(*arrays[:3])
  one = graded(functools.partial(attention.attend, implementation="reference"))
  many = graded(functools.partial(per_device.attend, kernel, mesh))
  jax.tree.map(CLOSE, many, one)


def test_dense_kernels_take_a_part_of_each_chunk():
  sight, _ = sight_of("whole")
  q = jax.ShapeDtypeStruct((B, 2 * N * T, A, 64), jnp.bfloat16)
  mesh = parallel.make_mesh(jax.devices()[:2], (1, 1, 2, 1))
  for platform, name in (("tpu", "splash"), ("gpu", "cudnn")):
    problem = attention.describe(platform, q, q, sight)
    part = attention.share(problem, mesh)
    assert part.tokens == T // 2
    assert part.columns == 2 * problem.columns
    assert attention.choose(part).name == name


def test_more_parts_are_not_more_chunks():
  """Splash counts the chunks of keys, whoever holds a part of the queries."""
  mask = masks.history_mask(2, None, 0)
  long = masks.sight(mask, 40, 2, 8)
  q = jax.ShapeDtypeStruct((B, 80 * 8, A, 64), jnp.bfloat16)
  mesh = parallel.make_mesh(jax.devices(), (1, 1, 8, 1))
  part = attention.share(attention.describe("tpu", q, q, long), mesh)
  assert part.columns == 8 * 80 > splash.MOST
  assert attention.choose(part).name == "splash"
  whole = [splash._bounds(long, row) for row in range(80)]
  assert [splash._bounds(long.cut(8), row) for row in range(80)] == whole
