"""The front door: every CPU path is one softmax over the same keys."""

import dataclasses
import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax import parallel
from avd_jax.errors import UserError
from avd_jax.ops import (
  attention,
  chunked,
  kv_cache,
  masked,
  masks,
  per_device,
  routing,
)
from avd_jax.ops.problem import Problem, describe
from avd_jax.ops.reference import EMPTY, reference, without_gradient

B, A, D, T, N = 2, 2, 8, 5, 6
CLOSE = functools.partial(np.testing.assert_allclose, atol=2e-6, rtol=2e-5)


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


def qkv(rows, columns):
  keys = [normal(B, columns * T, A, D, seed=s) for s in (1, 2)]
  return (2 * normal(B, rows * T, A, D, seed=3), *keys)


def passes():
  """Sights of passes over whole videos, by name."""
  see = lambda streams, window=None, sink=0, rows=None: masks.sight(
    masks.history_mask(streams, window, sink), N, streams, T, rows, sink
  )
  return {
    "two streams": see(2),
    "one stream": see(1),
    "noisy rows": see(2, rows=N),
    "window": see(2, 2),
    "window and sink": see(2, 2, 1),
    "noisy rows, window and sink": see(2, 1, 2, N),
  }


def by_hand(q, k, v, sight, chosen=None, q_sink=None):
  """Row by row in float64: out, lse, and nothing shared with the library."""
  q, k, v = (np.asarray(z, np.float64) for z in (q, k, v))
  out, lse = np.zeros(q.shape), np.zeros(q.shape[:3])
  for b, i, a in np.ndindex(q.shape[:3]):
    row = i // sight.tokens
    columns = list(np.flatnonzero(np.asarray(sight.sees[row])))
    if chosen is not None:
      columns = [int(sight.own[row])]
      columns += [int(c) for c in chosen[b, i, a] if c >= 0]
    logits, values = [], []
    for column in columns:
      at = slice(column * sight.tokens, (column + 1) * sight.tokens)
      mine = q if q_sink is None or column >= sight.sink else q_sink
      logits.append(k[b, at, a] @ np.asarray(mine[b, i, a], np.float64))
      values.append(v[b, at, a])
    logits = np.concatenate(logits) / np.sqrt(q.shape[-1])
    lse[b, i, a] = np.log(np.exp(logits).sum())
    out[b, i, a] = np.exp(logits - lse[b, i, a]) @ np.concatenate(values)
  return out, lse


def routed(sight, k, top_k):
  means = routing.descriptors(k[:, : sight.history * T], T)
  return routing.Routing(top_k, means)


def brute_force(q, k, sight, top_k, q_sink=None):
  """The choice, token by token."""
  means = np.asarray(k, np.float64).reshape(B, -1, T, A, D).mean(2)
  chosen = np.full((*q.shape[:3], top_k), routing.NONE)
  for b, i, a in np.ndindex(q.shape[:3]):
    may = np.flatnonzero(np.asarray(sight.candidates())[i // T])
    score = {}
    for c in may:
      mine = q if q_sink is None or c >= sight.sink else q_sink
      score[c] = float(np.asarray(mine[b, i, a], np.float64) @ means[b, c, a])
    best = sorted(may, key=lambda c: (-score[c], c))[:top_k]
    chosen[b, i, a, : len(best)] = best
  return chosen


@pytest.mark.parametrize("name", passes())
@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_masked_attention_is_the_softmax_by_hand(name, top_k):
  sight = passes()[name]
  q, k, v = qkv(*sight.sees.shape)
  q_sink = normal(*q.shape, seed=4) if sight.sink else None
  chosen, rule = None, None
  if top_k:
    rule = routed(sight, k, top_k)
    chosen = brute_force(q, k, sight, top_k, q_sink)
    picked = jax.jit(lambda q, s: routing.choose(q, sight, rule, s))(q, q_sink)
    np.testing.assert_array_equal(picked, chosen)
  out, lse = masked.attend(q, k, v, sight, routing=rule, q_sink=q_sink)
  want = by_hand(q, k, v, sight, chosen, q_sink)
  CLOSE(out, want[0])
  CLOSE(lse, want[1])
  chex.assert_shape(lse, q.shape[:3])


@pytest.mark.parametrize("name", passes())
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_product_per_chunk_is_the_masked_one(name, top_k):
  """Forward, and backward through out and lse."""
  sight = passes()[name]
  q, k, v = qkv(*sight.sees.shape)
  q_sink = normal(*q.shape, seed=4) if sight.sink else None
  rule = routed(sight, k, top_k) if top_k else None
  weight = normal(*q.shape, seed=5)

  def both(attend, q, k, v, q_sink):
    out, lse = attend(q, k, v, sight, routing=rule, q_sink=q_sink)
    return jnp.sum(out * weight) + jnp.sum(jnp.sin(lse)), (out, lse)

  results = [
    jax.jit(
      jax.value_and_grad(
        functools.partial(both, attend),
        (0, 1, 2) if q_sink is None else (0, 1, 2, 3),
        has_aux=True,
      )
    )(q, k, v, q_sink)
    for attend in (chunked.attend, masked.attend)
  ]
  jax.tree.map(lambda a, b: CLOSE(a, b, atol=2e-5), *results)
  assert all(np.abs(g).max() > 0.05 for g in results[0][1])


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("sink", [0, 1])
@pytest.mark.parametrize("chunk", [0, 3, 9])
def test_a_cache_is_read_as_the_masked_product_says(top_k, sink, chunk):
  layout = kv_cache.layout(12, 3, sink, keep_all=False)
  q, k, v = qkv(1, layout.slots)
  q_sink = normal(*q.shape, seed=4) if sink else None

  def score(attend, q, k, v, chunk):
    sight, rule = layout.sight(chunk, T), None
    if top_k:
      means = routing.descriptors(k, T)
      rule = routing.Routing(top_k, means, order=layout.held(chunk))
    out, lse = attend(q, k, v, sight, routing=rule, q_sink=q_sink)
    return jnp.sum(out**2) + jnp.sum(lse), (out, lse)

  loop, product = (
    jax.jit(
      jax.value_and_grad(
        functools.partial(score, attend), (0, 1, 2), has_aux=True
      )
    )(q, k, v, jnp.int32(chunk))
    for attend in (chunked.attend, masked.attend)
  )
  jax.tree.map(lambda a, b: CLOSE(a, b, atol=2e-5), loop, product)


def test_attention_to_everything_in_blocks(monkeypatch):
  q, k, v = qkv(3, 2)

  def score(q, k, v):
    return jnp.sum(attention.attend_all(q, k, v, "cpu") ** 2)

  whole = jax.value_and_grad(score, (0, 1, 2))(q, k, v)
  monkeypatch.setattr(
    attention, "BLOCK", 4
  )  # 15 queries: four of 4, one padded
  blocks = jax.value_and_grad(score, (0, 1, 2))(q, k, v)
  jax.tree.map(lambda a, b: CLOSE(a, b, atol=1e-5), whole, blocks)
  text = jax.jit(score).lower(q, k, v).as_text()
  assert "tensor<2x2x4x10xf32>" in text  # the logits of one block
  assert "tensor<2x2x15x10xf32>" not in text


# --- routing -----------------------------------------------------------------


def test_ties_go_to_the_lowest_chunk_wherever_it_is_held():
  sight = masks.sight(masks.history_mask(2, None, 0), N, 2, T)
  same = jnp.ones((B, N, A, D))
  q = normal(B, 2 * N * T, A, D)
  chosen = np.asarray(routing.choose(q, sight, routing.Routing(2, same)))
  last = chosen[:, -T:]
  np.testing.assert_array_equal(last[..., 0], 0 * last[..., 0])
  np.testing.assert_array_equal(last[..., 1], 0 * last[..., 1] + 1)
  # A ring holds chunks 8 5 6 7; 8 is one's own, 5 the lowest of the others.
  layout = kv_cache.layout(12, 3, 0, keep_all=False)
  held = layout.held(jnp.int32(8))
  np.testing.assert_array_equal(held, [8, 5, 6, 7])
  rule = routing.Routing(2, same[:, :4], order=held)
  chosen = routing.choose(q[:, :T], layout.sight(jnp.int32(8), T), rule)
  np.testing.assert_array_equal(np.unique(chosen[..., 0]), [1])
  np.testing.assert_array_equal(np.unique(chosen[..., 1]), [2])


def test_fewer_chunks_than_k_are_all_chosen_and_k_of_all_is_dense():
  sight = passes()["two streams"]
  q, k, v = qkv(*sight.sees.shape)
  chosen = routing.choose(q, sight, routed(sight, k, N))
  count = np.asarray((chosen >= 0).sum(-1))[0, ::T, 0]
  np.testing.assert_array_equal(count, 2 * list(range(N)))
  dense = masked.attend(q, k, v, sight)
  every = masked.attend(q, k, v, sight, routing=routed(sight, k, N))
  jax.tree.map(CLOSE, dense, every)


def test_no_gradient_passes_through_the_choice():
  sight = passes()["one stream"]
  q, k, v = qkv(*sight.sees.shape)

  def out(means):
    rule = routing.Routing(2, means)
    return jnp.sum(masked.attend(q, k, v, sight, routing=rule)[0] ** 2)

  means = routing.descriptors(k, T)
  assert not np.any(jax.grad(out)(means))
  assert abs(out(means) - out(-means)) > 1e-2  # and yet it chooses


def test_chunks_that_nobody_chose_have_no_gradient():
  sight = passes()["noisy rows"]
  q, k, v = qkv(*sight.sees.shape)
  # One chunk is liked by every query, one by none.
  q = jnp.abs(q)
  lift = jnp.repeat(jnp.asarray([0, 4, 0, -4, 0, 0] + 6 * [0.0]), T)
  k = k + lift[None, :, None, None]

  def out(k, v):
    rule = routed(sight, k, 1)
    return jnp.sum(masked.attend(q, k, v, sight, routing=rule)[0] ** 2)

  chunks = lambda g: np.abs(g).reshape(B, -1, T * A * D).max((0, 2))
  dk, dv = (chunks(g) for g in jax.grad(out, (0, 1))(k, v))
  assert dk[1] > 1e-4
  assert dv[1] > 1e-4
  assert dk[3] == dv[3] == 0


def test_tokens_of_a_chunk_may_stand_in_any_order():
  sight = passes()["two streams"]
  q, k, v = qkv(*sight.sees.shape)
  rule = routed(sight, k, 2)
  shuffle = np.random.default_rng(0).permutation(T)
  order = np.arange(2 * N * T).reshape(-1, T)
  order[3] = order[3][shuffle]
  order = order.reshape(-1)
  one = masked.attend(q, k, v, sight, routing=rule)
  other = masked.attend(*(z[:, order] for z in (q, k, v)), sight, routing=rule)
  jax.tree.map(lambda a, b: CLOSE(a[:, order], b), one, other)


# --- the choice of an implementation -----------------------------------------

WAN = Problem(
  platform="gpu",
  batch=1,
  rows=42,
  columns=42,
  tokens=1560,
  heads=12,
  head_dim=128,
  dtype="bfloat16",
  runs=2,
  pairs=462,
)
TINY = dataclasses.replace(
  WAN, platform="cpu", tokens=4, rows=20, columns=20, dtype="float32"
)
CHOICES = {
  "reference": TINY,
  "xla": dataclasses.replace(WAN, platform="cpu"),
  "cudnn": dataclasses.replace(WAN, rows=14, columns=14, pairs=56),
  "splash": dataclasses.replace(WAN, platform="tpu"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_chosen_and_why(name):
  choice = attention.choose(CHOICES[name])
  assert choice.name == name
  assert len(choice.reason) > 20
  lines = dict(attention.explain(CHOICES[name]))
  assert set(lines) == set(attention.IMPLEMENTATIONS)
  assert [n for n, line in lines.items() if line.startswith("chosen")] == [name]


@pytest.mark.parametrize(
  ("changes", "name"),
  [
    (dict(pairs=3660), "triton"),  # copies for the backward pass: too many
    (dict(top_k=5), "triton"),
    (dict(sink_queries=True), "triton"),
    (dict(platform="tpu", top_k=5), "tpu"),
    (dict(platform="tpu", sink_queries=True), "tpu"),
    (dict(platform="tpu", static=False, sink_queries=True), "splash"),
    (dict(platform="tpu", static=False, prefix=True), "splash"),
    (dict(capability=8.9), "cudnn"),
    (dict(capability=7.5, top_k=5), "xla"),
    (dict(platform="rocm"), "xla"),
    (dict(platform="tpu", tokens=4, head_dim=24), "reference"),
    (dict(static=False, prefix=True), "cudnn"),
    (dict(static=False, prefix=False), "triton"),
    (dict(static=False, prefix=True, sink_queries=True), "triton"),
    (dict(dtype="float32", head_dim=24, static=False), "xla"),
  ],
)
def test_what_is_chosen_at_wan_s_size(changes, name):
  choice = attention.choose(dataclasses.replace(WAN, **changes))
  assert choice.name == name, choice


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("cudnn", dict(platform="cpu"), "runs on a GPU, not on cpu"),
    ("cudnn", dict(dtype="float32"), "not float32 .model.dtype."),
    ("cudnn", dict(head_dim=20), "multiples of 8 up to 128, not 20"),
    ("cudnn", dict(top_k=2), "cannot route .model.attention.routing_top_k"),
    ("cudnn", dict(sink_queries=True), "model.attention.sink"),
    ("cudnn", dict(static=False), "prefix"),
    ("triton", dict(platform="cpu"), "cpu"),
    ("triton", dict(head_dim=24), "24"),
    ("splash", dict(platform="gpu"), "gpu|GPU"),
    ("splash", dict(platform="tpu", top_k=2), "routing_top_k"),
    ("tpu", dict(top_k=2), "gpu|GPU"),
    ("flash3", dict(), "not one of auto, reference, xla"),
  ],
)
def test_what_cannot_be_is_refused_by_name(name, changes, message):
  problem = dataclasses.replace(WAN, **changes)
  with pytest.raises(UserError, match=message) as error:
    attention.choose(problem, name)
  assert f"model.attention.implementation '{name}'" in str(error.value)
  assert "\n" not in str(error.value)


def test_attend_asks_for_what_it_describes():
  sight = passes()["window and sink"]
  q, k, v = qkv(*sight.sees.shape)
  rule = routed(sight, k, 2)
  problem = describe("cuda", q, k, sight, 2, True)
  assert problem == Problem(
    "gpu", B, 12, 12, T, A, D, "float32", 2, True, False, 3,
    int(sight.sees.sum()), True,
  )  # fmt: skip
  one = attention.attend(q, k, v, sight, routing=rule, q_sink=q)
  other = attention.attend(
    q, k, v, sight, routing=rule, q_sink=q, implementation="xla"
  )
  jax.tree.map(CLOSE, one, other)
  with pytest.raises(UserError, match="it runs on a GPU"):
    attention.attend(q, k, v, sight, implementation="cudnn", place="cpu")


@pytest.mark.parametrize("name", ["two streams", "window and sink", "cache"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_kernels_run_on_each_device_s_videos_and_heads(name, top_k):
  """The same numbers and gradients as one device, with nothing gathered."""
  mesh = parallel.make_mesh(jax.devices()[:4], (2, 1, 1, 2))

  def score(where, q, k, v, q_sink):
    if name == "cache":
      layout = kv_cache.layout(6, 2, 1, keep_all=True)
      sight = layout.sight(jnp.int32(4), T)
    else:
      sight = passes()[name]
    rule = routed(sight, k, top_k) if top_k else None
    if rule and name == "cache":
      rule = rule._replace(order=layout.held(jnp.int32(4)), q=q)
    given = q_sink if sight.sink else None
    arguments = (q, k, v, sight, rule, given)
    if where is None:
      out, lse = masked.attend(*arguments[:4], routing=rule, q_sink=given)
    else:
      out, lse = per_device.attend(masked.attend, where, *arguments)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse)), out

  rows, columns = (1, 6) if name == "cache" else passes()[name].sees.shape
  arrays = (*qkv(rows, columns), normal(B, rows * T, A, D, seed=4))
  results = []
  for where in (None, mesh):
    step = jax.jit(
      jax.value_and_grad(
        functools.partial(score, where), (0, 1, 2, 3), has_aux=True
      )
    )
    results.append(step(*arrays))
    if where is not None:
      split = jax.NamedSharding(mesh, parallel.BATCH)
      placed = jax.device_put(arrays, split)
      text = step.lower(*placed).compile().as_text()
      assert "all-to-all" not in text
      assert "all-gather" not in text
  jax.tree.map(lambda a, b: CLOSE(a, b, atol=1e-5), *results)
  odd = [z[:1] for z in arrays]
  with pytest.raises(UserError, match=r"1 videos, .* 2 heads is not divisible"):
    score(mesh, *odd)


def test_grouped_queries_stay_on_their_device(monkeypatch):
  """Plain JAX, but XLA would gather every device's queries to group them."""
  monkeypatch.setattr(attention, "GROUPED", 1)
  mesh = parallel.make_mesh(jax.devices()[:4], (2, 1, 1, 2))
  sight = passes()["window and sink"]
  q, k, v = qkv(*sight.sees.shape)

  def score(place, q, k, v):
    out, lse = attention.attend(
      q,
      k,
      v,
      sight,
      routing=routed(sight, k, 2),
      q_sink=q,
      implementation="xla",
      place=place,
    )
    return jnp.sum(jnp.sin(out)) + jnp.sum(lse)

  one, many = (
    jax.jit(jax.value_and_grad(functools.partial(score, place), (0, 1, 2)))
    for place in ("cpu", mesh)
  )
  jax.tree.map(lambda a, b: CLOSE(a, b, atol=1e-5), one(q, k, v), many(q, k, v))
  split = jax.NamedSharding(mesh, parallel.BATCH)
  placed = jax.device_put((q, k, v), split)
  assert "all-gather" not in many.lower(*placed).compile().as_text()


def test_an_accelerator_without_a_kernel_is_told():
  """Never silently slow."""
  sight = masks.sight(masks.history_mask(2, None, 0), 3, 2, 100)
  shape = jax.ShapeDtypeStruct((1, 600, 2, 24), jnp.float32)
  call = lambda place: jax.eval_shape(
    lambda q: attention.attend(q, q, q, sight, place=place), shape
  )
  with pytest.warns(UserWarning, match="falls back to plain JAX.*head_dim 16"):
    call("gpu")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    call("cpu")


def test_a_device_s_share_decides_on_a_mesh():
  """Copies of keys are counted for a device, not for the whole batch."""
  mesh = parallel.make_mesh(jax.devices(), (4, 1, 1, 2))
  big = dataclasses.replace(WAN, rows=14, columns=14, pairs=56, batch=32)
  assert attention.choose(big).name == "triton"
  share = attention.share(big, mesh)
  assert (share.batch, share.heads) == (8, 6)
  assert attention.choose(share).name == "cudnn"


@pytest.mark.parametrize("name", ["two streams", "window and sink", "cache"])
def test_choosing_everything_is_dense(name):
  """Kernels that route do what others refuse: with every chunk chosen."""
  if name == "cache":
    layout = kv_cache.layout(6, 2, 1, keep_all=True)
    sight = layout.sight(jnp.int32(4), T)
  else:
    sight = passes()[name]
  q, k, v = qkv(*sight.sees.shape)
  q_sink = normal(*q.shape, seed=4) if sight.sink else None
  every = routing.everything(q, sight)
  dense = masked.attend(q, k, v, sight, q_sink=q_sink)
  other = masked.attend(q, k, v, sight, routing=every, q_sink=q_sink)
  jax.tree.map(CLOSE, dense, other)
  # And a k that leaves nothing out is not routing at all.
  most = routing.most_candidates(sight)
  rule = routed(sight, k, most)
  text = str(
    jax.make_jaxpr(
      lambda q: attention.attend(q, k, v, sight, routing=rule, place="cpu")
    )(q)
  )
  assert "argmax" not in text
  rule = routed(sight, k, most - 1)
  text = str(
    jax.make_jaxpr(
      lambda q: attention.attend(q, k, v, sight, routing=rule, place="cpu")
    )(q)
  )
  assert "argmax" in text


def test_a_mask_that_hides_a_chunk_from_itself_is_refused():
  @dataclasses.dataclass(frozen=True)
  class Strict:
    def visible(self, q_stream, q_chunk, k_stream, k_chunk):
      del q_stream, k_stream
      return k_chunk < q_chunk

  with pytest.raises(UserError, match=r"Strict.*chunk 0 of 4 does not see"):
    masks.sight(Strict(), 4, 1, T)


def test_an_lse_without_gradient_says_so():
  q, k, v = qkv(1, 1)

  def score(q, use):
    out, lse = reference(q, k, v)
    lse = without_gradient(lse, "this")
    return jnp.sum(out) + (jnp.sum(lse) if use else 0)

  jax.grad(score)(q, False)
  with pytest.raises(NotImplementedError, match="this has no gradient"):
    jax.grad(score)(q, True)
  assert EMPTY < -1e20
