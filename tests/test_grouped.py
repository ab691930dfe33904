"""Routed attention by groups, both engines, against the dense reference."""

import dataclasses
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from avd_jax.errors import UserError
from avd_jax.ops import masks, problem, routing
from avd_jax.ops.kernels import grouped, grouped_plan, tpu_routed
from avd_jax.ops.masks import Sight
from avd_jax.ops.reference import EMPTY, reference

HEADS, DIM = 2, 16


class Case(NamedTuple):
  """An attention call, and everything that it takes."""

  q: jax.Array
  q_sink: jax.Array | None
  k: jax.Array
  v: jax.Array
  sight: Sight
  routing: routing.Routing


def dense(q, q_sink, k, v, sight, chosen):
  """Routed attention as the definition has it: every logit, one mask."""
  keys = sight.sink * sight.tokens if q_sink is not None else 0
  product = functools.partial(jnp.einsum, "bqad,bkad->bqak")
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  logits = product(q, k[:, keys:])
  if keys:
    sinks = product(q_sink.astype(jnp.float32), k[:, :keys])
    logits = jnp.concatenate([sinks, logits], -1)
  mask = routing.chosen_columns(chosen, sight)
  mask = jnp.repeat(mask, sight.tokens, -1)
  logits = jnp.where(mask, logits * q.shape[-1] ** -0.5, EMPTY)
  weight = jax.nn.softmax(logits, -1)
  out = jnp.einsum("bqak,bkad->bqad", weight, v)
  return out, jax.nn.logsumexp(logits, -1)


def make(
  sight,
  top_k=2,
  batch=1,
  dtype="float32",
  sinks=False,
  columns=None,
  order=None,
):
  """A case with random arrays; columns of keys as many as the sight has."""
  rows, columns = sight.sees.shape
  draw = np.random.default_rng(7).normal
  array = lambda n: jnp.asarray(draw(size=(batch, n, HEADS, DIM)), dtype)
  length = rows * sight.tokens
  q, k, v = (
    array(length),
    array(columns * sight.tokens),
    array(columns * sight.tokens),
  )
  q_sink = array(length) if sinks else None
  described = routing.descriptors(
    k[:, : sight.history * sight.tokens], sight.tokens
  )
  # Means of random keys are alike: spread them, so that choices differ.
  described = described * jnp.sqrt(jnp.float32(sight.tokens))
  asked = routing.Routing(top_k, described, None, order)
  return Case(2 * q, q_sink, k, v, sight, asked)


def train(tokens, chunks=3, rows=None, window=None, sink=0):
  mask = masks.history_mask(2, window, sink)
  return masks.sight(mask, chunks, 2, tokens, rows, sink)


def decode(tokens, columns, own, order=None, sees=None, sink=0):
  sees = np.arange(columns) <= own if sees is None else np.asarray(sees)
  return Sight(
    jnp.asarray(sees)[None], jnp.asarray([own]), tokens, columns, sink
  )


def cases():
  tied = make(train(8))
  tied = tied._replace(
    routing=tied.routing._replace(
      descriptors=jnp.ones_like(tied.routing.descriptors)
    )
  )
  ring = jnp.asarray([0, 5, 6, 3, 4])  # chunks in the slots of a ring
  return {
    "two streams": make(train(24, 4), batch=2),
    "two streams with tails": make(train(17)),
    "noisy rows only": make(train(8, 4, rows=4)),
    "more choices than chunks": make(train(8, 4), top_k=5),
    "decode": make(decode(12, 5, 3)),
    "decode from a ring": make(
      decode(12, 5, 2, sees=[True] * 5), top_k=3, order=ring
    ),
    "window and sink": make(
      train(8, 5, window=1, sink=1), top_k=3, batch=2, sinks=True
    ),
    "decode with sink": make(decode(8, 4, 3, sink=2), sinks=True),
    "empty history": make(decode(12, 4, 0)),
    "ties": tied,
    "bfloat16": make(train(16), dtype="bfloat16"),
  }


NAMES = tuple(cases())
KERNEL = (
  "two streams with tails",
  "decode from a ring",
  "window and sink",
  "empty history",
  "bfloat16",
)


@functools.cache
def case(name):
  return cases()[name]


def results(attention, case):
  """Out, lse and the gradients of a loss in both."""
  length = case.q.shape[:3]
  draw = np.random.default_rng(3).normal
  to_out = jnp.asarray(draw(size=(*length, DIM)), jnp.float32)
  to_lse = jnp.asarray(draw(size=length), jnp.float32)

  def loss(arrays):
    out, lse = attention(*arrays)
    total = jnp.sum(out.astype(jnp.float32) * to_out) + jnp.sum(lse * to_lse)
    return total, (out, lse)

  arrays = case.q, case.q_sink, case.k, case.v
  grads, (out, lse) = jax.jit(jax.grad(loss, has_aux=True))(arrays)
  names = ("q", "q_sink", "k", "v")
  return {"out": out, "lse": lse, **dict(zip(names, grads, strict=True))}


@functools.cache
def expected(name):
  one = case(name)
  chosen = routing.choose(one.q, one.sight, one.routing, one.q_sink)
  attention = lambda q, q_sink, k, v: dense(q, q_sink, k, v, one.sight, chosen)
  return results(attention, one)


def run(name, attend, **options):
  one = case(name)

  def attention(q, q_sink, k, v):
    return attend(
      q, k, v, one.sight, routing=one.routing, q_sink=q_sink, **options
    )

  return results(attention, one)


def check(got, want, bfloat16):
  for name, x in want.items():
    if x is None:
      assert got[name] is None
      continue
    x = np.asarray(x, np.float32)
    tolerance = (3e-2 if bfloat16 else 2e-5) * max(1, np.abs(x).max())
    y = np.asarray(got[name], np.float32)
    np.testing.assert_allclose(y, x, atol=tolerance, rtol=0, err_msg=name)


@functools.cache
def by_loop(name):
  return run(name, grouped.attend, block=8)


@functools.cache
def by_kernel(name):
  return run(name, tpu_routed.attend, block=8, interpret=True)


@pytest.mark.parametrize("name", NAMES)
def test_loop(name):
  check(by_loop(name), expected(name), name == "bfloat16")


@pytest.mark.parametrize("name", KERNEL)
def test_kernel(name):
  check(by_kernel(name), expected(name), name == "bfloat16")


def test_kernel_in_the_simulator():
  simulator = pltpu.InterpretParams()
  got = run("decode with sink", tpu_routed.attend, block=8, interpret=simulator)
  check(got, expected("decode with sink"), False)


def test_a_chunk_in_pieces(monkeypatch):
  monkeypatch.setattr(tpu_routed, "PIECE", 8)  # 17 tokens: 8, 8 and 1
  name = "two streams with tails"
  got = run(name, tpu_routed.attend, block=16, interpret=True)
  check(got, expected(name), False)


def test_heads_and_videos_in_turns():
  name = "window and sink"  # 35 tiles for each of two heads of two videos
  assert grouped._turns(2, 2, 35, 140) == (1, 1)
  assert grouped._turns(2, 2, 35, 70) == (1, 2)
  assert grouped._turns(2, 2, 35, 40) == (2, 2)
  engine = grouped.LOOP._replace(tiles=40)
  got = run(name, grouped.attend, block=8, engine=engine)
  check(got, expected(name), False)


def test_more_choices_than_chunks_is_dense():
  one = case("more choices than chunks")
  table = masks.dense(one.sight.sees, one.sight.tokens, one.sight.tokens)
  want, want_lse = reference(one.q, one.k, one.v, table)
  got = by_loop("more choices than chunks")
  np.testing.assert_allclose(got["out"], want, atol=1e-5)
  np.testing.assert_allclose(got["lse"], want_lse, atol=1e-5)


@pytest.mark.parametrize(("queries", "scan"), [(40, 1024), (53, 16)])
def test_plan(queries, scan, monkeypatch):
  """Every choice once, tiles of one column, ascending; nothing else."""
  monkeypatch.setattr(grouped_plan, "SCAN", scan)
  columns, block, top_k = 7, 4, 3
  draw = np.random.default_rng(0)
  order = draw.random((2, queries, 3, columns)).argsort(-1)
  chosen = np.where(draw.random(order.shape) < 0.7, order, -1)[..., :top_k]
  chosen[0, :, 0] = -1  # a head that chooses nothing
  chosen[..., 0] = np.where(chosen[..., 0] == 3, -1, chosen[..., 0])
  got = jax.jit(grouped.plan, static_argnums=(1, 2))(chosen, columns, block)
  query, place, column = map(np.asarray, got)
  tiles = queries * top_k // block + columns
  assert column.shape == (2, 3, tiles)
  assert query.shape == (2, 3, tiles * block)
  for b, a in np.ndindex(2, 3):
    real = column[b, a][column[b, a] >= 0]
    assert np.all(np.diff(real) >= 0)
    assert np.all(column[b, a][len(real) :] == -1)
    of_slot = np.repeat(column[b, a], block)
    want = {
      (q, chosen[b, q, a, t])
      for q, t in np.ndindex(queries, top_k)
      if chosen[b, q, a, t] >= 0
    }
    used = np.flatnonzero(query[b, a] >= 0)
    have = [(query[b, a, s], of_slot[s]) for s in used]
    assert len(have) == len(want)
    assert set(have) == want
    for t, q in np.ndindex(top_k, queries):
      slot = place[b, a, t, q]
      if chosen[b, q, a, t] < 0:
        assert slot == -1
      else:
        assert query[b, a, slot] == q
        assert of_slot[slot] == chosen[b, q, a, t]


@pytest.mark.parametrize("results_of", [by_loop, by_kernel])
def test_keys_nobody_chose_get_exactly_nothing(results_of):
  got = results_of("empty history")
  for name in ("k", "v"):
    gradient = np.asarray(got[name][0]).reshape(4, -1)
    assert gradient[0].all()
    assert not gradient[1:].any()


def test_order_within_a_chunk_does_not_matter():
  one = case("two streams with tails")
  tokens = one.sight.tokens
  shuffle = np.random.default_rng(5).permutation(tokens)

  def shuffled(x):
    b, _, a, d = x.shape
    return x.reshape(b, -1, tokens, a, d)[:, :, shuffle].reshape(x.shape)

  attend = jax.jit(
    lambda q, k, v: grouped.attend(
      q, k, v, one.sight, routing=one.routing, block=8
    )[0]
  )
  want = shuffled(attend(one.q, one.k, one.v))
  got = attend(*map(shuffled, (one.q, one.k, one.v)))
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_one_trace_for_every_chunk_of_a_rollout():
  one = case("decode")

  @jax.jit
  @chex.assert_max_traces(n=1)
  def attend(chunk):
    sight = Sight(
      (jnp.arange(5) <= chunk)[None],
      chunk[None],
      one.sight.tokens,
      5,
    )
    return grouped.attend(
      one.q, one.k, one.v, sight, routing=one.routing, block=8
    )

  outs = [attend(jnp.int32(chunk))[0] for chunk in range(5)]
  np.testing.assert_allclose(outs[3], expected("decode")["out"], atol=2e-5)
  assert not np.allclose(outs[3], outs[4])


def test_grouped_needs_a_routing():
  one = case("decode")
  with pytest.raises(UserError, match="without routing"):
    grouped.attend(one.q, one.k, one.v, one.sight)
  asked = problem.describe("cpu", one.q, one.k, one.sight)
  assert "needs routing" in grouped.refuses(asked)
  asked = dataclasses.replace(asked, top_k=2)
  assert grouped.refuses(asked) is None


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({}, None),
    ({"platform": "gpu"}, "TPUs only"),
    ({"top_k": None}, "is for routed history"),
    ({"top_k": None, "sink_queries": True}, None),
    ({"head_dim": 64}, "multiple of 128"),
    ({"dtype": "float16"}, "bfloat16"),
    ({"tokens": 30_000}, "VMEM"),
  ],
)
def test_kernel_refuses(change, reason):
  asked = problem.Problem(
    platform="tpu",
    batch=1,
    rows=14,
    columns=14,
    tokens=4680,
    heads=12,
    head_dim=128,
    dtype="bfloat16",
    top_k=5,
  )
  said = tpu_routed.refuses(dataclasses.replace(asked, **change))
  assert said is None if reason is None else reason in said
