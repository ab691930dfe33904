"""The Triton kernels against the definition, run by Pallas' interpreter."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax import parallel
from avd_jax.ops import masks, per_device, problem, reference
from avd_jax.ops import routing as routing_lib
from avd_jax.ops.kernels import (
  compat,
  triton_plan,
  triton_ranges,
  triton_routed,
)
from avd_jax.ops.kernels.triton_blocks import Tile
from avd_jax.ops.routing import Routing

HEADS = 2
RANGES = triton_ranges.Blocks(
  forward=Tile(32, 16, 4, 1), dq=Tile(16, 32, 4, 1), dkv=Tile(32, 16, 4, 1)
)
ROUTED = triton_routed.Blocks(
  chosen=Tile(32, 16, 4, 1),
  own=Tile(16, 32, 4, 1),
  chosen_dq=Tile(32, 16, 4, 1),
  own_dq=Tile(16, 16, 4, 1),
  dkv=Tile(16, 32, 4, 1),
  plan=16,
)
TWO_STREAMS = masks.sight(masks.HistoryNoisy(), 3, 2, 40)
LAST_NOISY = masks.sight(masks.HistoryNoisy(), 4, 2, 17, rows=1)
SINKS = masks.sight(
  masks.HistoryNoisy() & masks.Window(1, 1), 4, 2, 24, rows=5, sink=1
)


def tensors(sight, head_dim, dtype=jnp.float32, seed=0):
  """q, k, v, q_sink, dout, dlse."""
  rows, columns = sight.sees.shape
  keys = jax.random.split(jax.random.key(seed), 6)
  shape = lambda n: (2, n * sight.tokens, HEADS, head_dim)
  normal = lambda i, n: jax.random.normal(keys[i], shape(n), dtype)
  q, k, v = normal(0, rows), normal(1, columns), normal(2, columns)
  dlse = jax.random.normal(keys[5], shape(rows)[:-1])
  return q, k, v, normal(3, rows), normal(4, rows), dlse


def history(k, sight):
  return routing_lib.descriptors(
    k[:, : sight.history * sight.tokens], sight.tokens
  )


def with_gradients(attend):
  """(q, k, v, q_sink, dout, dlse, *more) -> ((out, lse), gradients)."""

  @jax.jit
  def run(q, k, v, q_sink, dout, dlse, *more):
    of = lambda *x: attend(*x, *more)
    result, pull = jax.vjp(of, q, k, v, q_sink)
    return result, pull((dout.astype(result[0].dtype), dlse))

  return run


def definition(sight, top_k=None, sinks=False):
  """The dense reference with float32 everywhere but in the choice."""

  def attend(q, k, v, q_sink, described=None):
    mask = jnp.repeat(jnp.asarray(sight.sees), sight.tokens, 0)[:, None]
    if top_k is not None:
      described = history(k, sight) if described is None else described
      mask = routing_lib.chosen_columns(
        routing_lib.choose(
          q, sight, Routing(top_k, described), q_sink if sinks else None
        ),
        sight,
      )
    mask = jnp.repeat(mask, sight.tokens, -1)
    mask = jnp.swapaxes(mask, -3, -2)  # [b a q k]
    q, k, v, q_sink = (x.astype(jnp.float32) for x in (q, k, v, q_sink))
    if not sinks:
      return reference.reference(q, k, v, mask)
    of_sink = jnp.arange(k.shape[1]) < sight.sink * sight.tokens
    return reference.merge(
      reference.reference(q, k, v, mask & ~of_sink),
      reference.reference(q_sink, k, v, mask & of_sink),
    )

  return with_gradients(attend)


def ranges(sight, sinks=False):
  return with_gradients(
    lambda q, k, v, q_sink: triton_ranges.attend(
      q,
      k,
      v,
      sight,
      q_sink=q_sink if sinks else None,
      interpret=True,
      blocks=RANGES,
    )
  )


def routed(sight, top_k, sinks=False):
  def attend(q, k, v, q_sink, described=None):
    described = history(k, sight) if described is None else described
    return triton_routed.attend(
      q,
      k,
      v,
      sight,
      routing=Routing(top_k, described),
      q_sink=q_sink if sinks else None,
      interpret=True,
      blocks=ROUTED,
    )

  return with_gradients(attend)


def assert_same(got, want, tolerance=1e-5):
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    y = np.asarray(y, np.float32)
    np.testing.assert_allclose(
      np.asarray(x, np.float32), y, atol=tolerance * max(1, np.abs(y).max())
    )


@functools.cache
def dense_two_streams():
  args = tensors(TWO_STREAMS, 16)
  return args, ranges(TWO_STREAMS)(*args)


@functools.cache
def last_noisy():
  return routed(LAST_NOISY, 2)


def test_ranges_match_the_definition_with_tails():
  args, got = dense_two_streams()
  (out, lse), _ = got
  chex.assert_shape(out, args[0].shape)
  chex.assert_shape(lse, args[0].shape[:-1])
  assert_same(got, definition(TWO_STREAMS)(*args))


def test_ranges_meet_sinks_with_other_queries():
  args = tensors(SINKS, 16)
  got = ranges(SINKS, sinks=True)(*args)
  assert_same(got, definition(SINKS, sinks=True)(*args))
  assert np.abs(got[1][3]).max() > 0


def test_routed_matches_the_definition_with_tails():
  args = tensors(TWO_STREAMS, 16)
  got = routed(TWO_STREAMS, 1)(*args)
  assert_same(got, definition(TWO_STREAMS, 1)(*args))


def test_choosing_everything_is_dense_attention():
  args, (want, _) = dense_two_streams()
  got = triton_routed.attend(
    *args[:3],
    TWO_STREAMS,
    routing=Routing(7, history(args[1], TWO_STREAMS)),
    interpret=True,
    blocks=ROUTED,
  )
  assert_same(got, want)


def test_routed_meets_sinks_with_other_queries():
  args = tensors(SINKS, 16)
  got = routed(SINKS, 1, sinks=True)(*args)
  assert_same(got, definition(SINKS, 1, sinks=True)(*args))
  assert np.abs(got[1][3]).max() > 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_noisy_rows_alone(dtype):
  args = tensors(LAST_NOISY, 32, dtype)
  args = (*args, history(args[1], LAST_NOISY))
  got = last_noisy()(*args)
  chex.assert_type(got[0], [dtype, jnp.float32])
  tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
  assert_same(got, definition(LAST_NOISY, 2)(*args), tolerance)


def test_what_is_not_chosen_does_not_matter():
  q, k, v, *rest = tensors(LAST_NOISY, 32)
  described = jnp.ones((1, 4, HEADS, 32)).at[:, 0].set(-1.0)
  args = (jnp.abs(q), k, v, *rest, described)
  out, (_, dk, dv, _) = last_noisy()(*args)
  first = slice(0, LAST_NOISY.tokens)
  np.testing.assert_array_equal(dk[:, first], 0)
  np.testing.assert_array_equal(dv[:, first], 0)
  other = (args[0], k.at[:, first].add(1), v.at[:, first].add(1), *args[3:])
  assert_same(last_noisy()(*other)[0], out, 0)


def test_order_inside_a_chunk_is_free():
  q, k, v, *rest = tensors(LAST_NOISY, 32)
  described = history(k, LAST_NOISY)
  turn = lambda x: jnp.roll(x.reshape(1, -1, 17, HEADS, 32), 5, 2).reshape(
    x.shape
  )
  args = (q, k, v, *rest, described)
  (out, lse), _ = last_noisy()(*args)
  (turned, turned_lse), _ = last_noisy()(
    turn(q), turn(k), turn(v), *rest, described
  )
  assert_same(turned, turn(out))
  assert_same(turned_lse, jnp.roll(lse, 5, 1))


def cache_sight(chunk, xp=jnp):
  """A chunk's sight of a cache of three; numpy's is not traced."""
  sees = (xp.arange(3) <= chunk)[None]
  count = None if xp is np else chunk + 1
  return masks.Sight(sees, xp.full((1,), chunk), 24, 3, 1, count)


@with_gradients
@chex.assert_max_traces(n=1)
def dense_step(q, k, v, q_sink, chunk):
  sight = cache_sight(chunk)
  return triton_ranges.attend(
    q, k, v, sight, q_sink=q_sink, interpret=True, blocks=RANGES
  )


@with_gradients
@chex.assert_max_traces(n=1)
def routed_step(q, k, v, q_sink, chunk):
  sight = cache_sight(chunk)
  routing = Routing(1, history(k, sight))
  return triton_routed.attend(
    q,
    k,
    v,
    sight,
    routing=routing,
    q_sink=q_sink,
    interpret=True,
    blocks=ROUTED,
  )


@pytest.mark.parametrize(
  ("step", "top_k"),
  [(dense_step, None), (routed_step, 1)],
  ids=["dense", "routed"],
)
def test_a_chunk_against_a_cache(step, top_k):
  for chunk in (0, 2):  # traced once
    known = cache_sight(chunk, np)
    args = tensors(known, 16)
    assert_same(step(*args, chunk), definition(known, top_k, True)(*args))


def test_without_history_a_chunk_sees_itself():
  sight = masks.sight(masks.BlockCausal(), 1, 1, 24)
  q, k, v, *_ = tensors(sight, 16)
  got = triton_routed.attend(
    q,
    k,
    v,
    sight,
    routing=Routing(5, history(k, sight)),
    interpret=True,
    blocks=ROUTED,
  )
  assert_same(got, reference.reference(q, k, v))


@functools.partial(jax.jit, static_argnums=2)
def plan_and_choice(q, described, top_k):
  """Where other queries choose than those that attend."""
  routing = Routing(top_k, described, q)
  attending = jnp.zeros_like(q)
  return (
    triton_plan.plan(attending, TWO_STREAMS, routing, None, 16, 32, True),
    routing_lib.choose(attending, TWO_STREAMS, routing),
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_choice_has_one_slot(dtype):
  q, k, *_ = tensors(TWO_STREAMS, 16, dtype)
  # The first head must look closely; the second cannot tell the chunks apart,
  # and takes the first ones.
  described = 1 + 1e-3 * history(k, TWO_STREAMS)
  described = described.at[:, :, 1].set(1.0)
  plan, chosen = jax.tree.map(np.asarray, plan_and_choice(q, described, 1))
  assert (chosen[:, :, 1].max(), chosen[:, :, 0].max()) == (0, 1)
  for head in range(HEADS):
    slot_of, query_of = plan.slot_of[0, head, 0], plan.query_of[0, head]
    want = chosen[0, :, head, 0]
    some = want >= 0
    np.testing.assert_array_equal(slot_of >= 0, some)
    np.testing.assert_array_equal(query_of[slot_of[some]], np.flatnonzero(some))
    assert (query_of >= 0).sum() == some.sum()
    column_of = plan.column_of[0, head]
    np.testing.assert_array_equal(column_of[slot_of[some] // 32], want[some])
    for column in range(6):
      first, last = plan.first[0, head, column], plan.last[0, head, column]
      np.testing.assert_array_equal(
        np.flatnonzero(column_of == column), np.arange(first, last)
      )


def test_shuffled_columns_choose_by_chunk():
  sight = masks.Sight(np.ones((1, 4), bool), np.array([3]), 17, 4)
  args = tensors(sight, 16)
  routing = Routing(
    2, jnp.ones((2, 4, HEADS, 16)), order=jnp.array([2, 0, 1, 3])
  )
  plan = jax.jit(
    lambda q: triton_plan.plan(q, sight, routing, None, 16, 32, True)
  )(args[0])
  used = np.asarray(plan.last - plan.first)
  np.testing.assert_array_equal(used, [[[0, 1, 1, 0]] * HEADS] * 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kernels_lower_for_a_gpu_that_is_not_there(dtype):
  args = tensors(SINKS, 64, dtype)
  described = history(args[1], SINKS)
  for attend in (
    lambda q, k, v, q_sink: triton_ranges.attend(q, k, v, SINKS, q_sink=q_sink),
    lambda q, k, v, q_sink: triton_routed.attend(
      q, k, v, SINKS, routing=Routing(2, described), q_sink=q_sink
    ),
  ):
    with compat.abstract_gpu():
      lowered = with_gradients(attend).trace(*args)
      text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("gpu.triton") >= 5


def _problem(**changes):
  facts = {
    "platform": "gpu",
    "batch": 1,
    "rows": 6,
    "columns": 6,
    "tokens": 40,
    "heads": 2,
    "head_dim": 64,
    "dtype": "bfloat16",
  }
  return problem.Problem(**(facts | changes))


@pytest.mark.parametrize(
  ("module", "changes", "word"),
  [
    (triton_ranges, {"platform": "cpu"}, "cpu"),
    (triton_ranges, {"head_dim": 96}, "head_dim"),
    (triton_ranges, {"dtype": "float64"}, "float64"),
    (triton_ranges, {"top_k": 2}, "routing"),
    (triton_ranges, {"static": False}, "prefix"),
    (triton_routed, {"top_k": None}, "routing"),
    (triton_routed, {"top_k": 2, "platform": "tpu"}, "tpu"),
  ],
)
def test_refusals_say_why(module, changes, word):
  assert word in module.refuses(_problem(**changes))


def test_what_is_not_refused():
  assert triton_ranges.refuses(_problem()) is None
  assert triton_ranges.refuses(_problem(static=False, prefix=True)) is None
  assert triton_routed.refuses(_problem(top_k=2, static=False)) is None


def test_slots_must_fill_tiles_of_the_backward_pass():
  with pytest.raises(ValueError, match="chosen_dq"):
    triton_routed.Blocks(*[Tile(32, 16, 4, 1)] * 4, Tile(64, 16, 4, 1), 16)


@pytest.mark.parametrize("top_k", [None, 2])
def test_kernels_run_on_each_device_of_a_mesh(top_k):
  """Videos and heads are split; the numbers are one device's."""
  mesh = parallel.make_mesh(jax.devices()[:4], (2, 1, 1, 2))
  sight = LAST_NOISY
  q, k, v, _, dout, dlse = tensors(sight, 16)
  rule = top_k and routing_lib.Routing(top_k, history(k, sight))
  module = triton_routed if top_k else triton_ranges
  kernel = functools.partial(
    module.attend, interpret=True, blocks=ROUTED if top_k else RANGES
  )

  def run(call):
    of = lambda *x: call(*x, sight)
    result, pull = jax.vjp(of, q, k, v)
    return result, pull((dout, dlse))

  alone = functools.partial(kernel, routing=rule) if top_k else kernel
  one = run(alone)
  many = run(
    lambda *x: per_device.attend(kernel, mesh, *x, routing=rule or None)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), many, one
  )
