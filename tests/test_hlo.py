"""Reading compiled programs: traffic, loops and products known on paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from avd_jax.aot import hlo
from avd_jax.aot.hlo import Collective


def compiled(function, *shapes, mesh, spec):
  """A function of one device's shares, compiled over a mesh."""
  specs = (spec,) * len(shapes)
  share = jax.shard_map(
    function, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False
  )
  place = NamedSharding(mesh, spec)
  arrays = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in shapes
  ]
  return jax.jit(share).lower(*arrays).compile()


def reading(function, *shapes, spec=P("x")):
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("y", "x"))
  return hlo.read(compiled(function, *shapes, mesh=mesh, spec=spec).as_text())


def test_a_sum_sends_twice_its_bytes_round_the_ring():
  both = P(("y", "x"))
  found = reading(lambda x: jax.lax.psum(x, ("y", "x")), (8, 1000), spec=both)
  (one,) = found.collectives
  assert (one.kind, one.times, one.bytes) == ("all-reduce", 1, 4000)
  assert one.sent == 2 * 4000 * 7 // 8
  assert one.group == tuple(range(8))
  (part,) = reading(lambda x: jax.lax.psum(x, "y"), (4, 1000)).collectives
  assert (part.bytes, part.sent, part.group) == (4000, 4000, (0, 4))


def test_a_gather_brings_together_what_the_group_holds():
  gather = lambda x: jax.lax.all_gather(x, "x", tiled=True).sum() + x
  (one,) = reading(gather, (4, 128)).collectives
  assert (one.kind, one.bytes, one.sent) == ("all-gather", 2048, 1536)
  assert one.group == (0, 1, 2, 3)


def test_what_stands_in_loops_counts_as_often_as_they_run():
  onward = [(i, (i + 1) % 4) for i in range(4)]

  def inner(x, _):
    return jnp.sin(jax.lax.ppermute(x, "x", onward)), None

  def outer(x, w):
    x, _ = jax.lax.scan(inner, x, length=3)
    return x @ w, None

  def function(x, w):
    return jax.lax.scan(outer, x, jnp.stack([w] * 5))[0]

  found = reading(function, (4 * 16, 16), (4 * 16, 16))
  moves = [c for c in found.collectives if c.kind == "collective-permute"]
  assert sum(c.times for c in moves) == 15
  assert {c.bytes for c in moves} == {16 * 16 * 4}
  assert {c.sent for c in moves} == {16 * 16 * 4}
  assert found.flops == 5 * 2 * 16**3
  assert not found.unknown_loops


def test_a_loop_of_unknown_length_counts_once_and_is_named():
  def function(x):
    body = lambda x: jax.lax.psum(x, "x") / 3
    return jax.lax.while_loop(lambda x: x.max() > 1, body, x)

  found = reading(function, (4, 64))
  (loop,) = found.unknown_loops
  assert "while" in loop
  assert [c.times for c in found.collectives if c.bytes == 256] == [1]


def test_memory_traffic_of_a_slice_is_the_slice():
  def function(x):
    total = lambda carry, i: (
      carry + jax.lax.dynamic_slice_in_dim(x, i, 1),
      None,
    )
    return jax.lax.scan(total, jnp.zeros((1, 1024)), jnp.arange(1000))[0]

  traffic = hlo.read(
    jax.jit(function).lower(jnp.zeros((1000, 1024))).compile().as_text()
  ).traffic
  row = 4 * 1024
  assert 3 * 1000 * row <= traffic <= 12 * 1000 * row  # not 1000 x 1000 rows


@pytest.mark.parametrize(
  ("text", "group"),
  [
    ("replica_groups={{0,1},{2,3}}", (0, 1)),
    ("replica_groups={}", (0, 1, 2, 3)),
    ("replica_groups=[2,2]<=[4]", (0, 1)),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", (0, 2)),
    ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a'}", (0, 2)),
    ("replica_groups=mesh['a'=2,'b'=2] {'b','a'}", (0, 1, 2, 3)),
    (
      "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}",
      (0, 2),
    ),
    ("replica_groups=mesh['a'=4] {'a':(1)2}", (0, 2)),
    ("replica_groups=mesh['a'=4] {'a':(2)2}", (0, 1)),
    ("source_target_pairs={{0,1},{1,0}}", (0, 1, 1, 0)),
  ],
)
def test_groups_of_devices_are_read_in_every_spelling(text, group):
  assert hlo.groups(text, 4) == group


# As a TPU's compiler writes it: one gather spread over three fusions, a sum
# fused with the slice that follows, a loop that only its condition bounds, a
# batched product as a convolution, arrays in on-chip memory (S(1)).
TPU = """
HloModule step, is_scheduled=true, num_partitions=4

%start (p.1: f32[8]) -> f32[32] {
  %p.1 = f32[8]{0:T(128)} parameter(0)
  %g.1 = f32[32]{0:T(128)} all-gather(%p.1), channel_id=7, replica_groups=mesh['a'=4] {'a'}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %c.1 = f32[32]{0:T(128)} custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%done (p.2: f32[8]) -> f32[32] {
  %p.2 = f32[8]{0:T(128)} parameter(0)
  %g.2 = f32[32]{0:T(128)} all-gather(%p.2), channel_id=7, replica_groups=mesh['a'=4] {'a'}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"15"}}
  ROOT %c.2 = f32[32]{0:T(128)} custom-call(%g.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.3 (p.3: f32[32]) -> f32[8] {
  %p.3 = f32[32]{0} parameter(0)
  %r.3 = f32[32]{0} all-reduce(%p.3), channel_id=8, replica_groups=[1,4]<=[4], to_apply=%add
  %zero.3 = s32[]{:T(128)} constant(0)
  ROOT %s.3 = f32[8]{0} dynamic-slice(%r.3, %zero.3), dynamic_slice_sizes={8}
}

%body (t.4: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t.4 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %i.4 = s32[]{:T(128)} get-tuple-element(%t.4), index=0
  %one.4 = s32[]{:T(128)} constant(2)
  %next.4 = s32[]{:T(128)} add(%i.4, %one.4)
  %x.4 = f32[8]{0:T(128)S(1)} get-tuple-element(%t.4), index=1
  %f.4 = f32[32]{0:T(128)S(1)} fusion(%x.4), kind=kCustom, calls=%start
  %f.5 = f32[32]{0:T(128)S(1)} fusion(%x.4), kind=kCustom, calls=%done
  %f.6 = f32[8]{0:T(128)S(1)} fusion(%f.5), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %t.5 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) tuple(%next.4, %f.6)
}

%condition (t.6: (s32[], f32[8])) -> pred[] {
  %t.6 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %end.6 = s32[]{:T(128)} constant(11)
  %i.6 = s32[]{:T(128)} get-tuple-element(%t.6), index=0
  ROOT %less.6 = pred[]{:T(512)} compare(%i.6, %end.6), direction=LT
}

ENTRY %main (a: f32[8], b: f32[4,16,24], c: f32[4,24,5]) -> f32[4,16,5] {
  %a = f32[8]{0:T(128)} parameter(0)
  %b = f32[4,16,24]{2,1,0} parameter(1)
  %c = f32[4,24,5]{2,1,0} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %from = s32[]{:T(128)} copy(%zero)
  %in = f32[8]{0:T(128)S(1)} copy(%a)
  %start.0 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) tuple(%from, /*index=1*/%in)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) while(%start.0), condition=%condition, body=%body
  ROOT %product = f32[4,16,5]{2,1,0} convolution(%b, %c), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}
"""  # noqa: E501


def test_a_tpu_program_is_read_as_it_runs():
  found = hlo.read(TPU, on_chip=True)
  trips = 6  # 0, 2, ... 10
  gather, scatter = found.collectives
  assert gather == Collective("all-gather", trips, 128, 96, (0, 1, 2, 3))
  assert scatter == Collective("reduce-scatter", trips, 128, 96, (0, 1, 2, 3))
  assert not found.unknown_loops
  assert found.flops == 4 * 2 * 16 * 24 * 5
  product = 4 * 4 * (16 * 24 + 24 * 5 + 16 * 5)
  copies, counting = (
    2 * 4 + 8 * 4,
    3 * 4,
  )  # what stays on the chip is no traffic
  assert found.traffic == product + copies + trips * counting


# A fusion that reads a row of a stack through another, and writes a row of a
# stack in place.
NESTED = """
HloModule step, num_partitions=1

%row (s.1: f32[30,64], i.1: s32[]) -> f32[1,64] {
  %s.1 = f32[30,64]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  ROOT %r.1 = f32[1,64]{1,0} dynamic-slice(%s.1, %i.1, %zero.1), dynamic_slice_sizes={1,64}
}

%move (to.2: f32[30,64], s.2: f32[30,8,8], i.2: s32[]) -> f32[30,64] {
  %to.2 = f32[30,64]{1,0} parameter(0)
  %s.2 = f32[30,8,8]{2,1,0} parameter(1)
  %i.2 = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  %flat.2 = f32[30,64]{1,0} bitcast(%s.2)
  %r.2 = f32[1,64]{1,0} fusion(%flat.2, %i.2), kind=kLoop, calls=%row
  ROOT %w.2 = f32[30,64]{1,0} dynamic-update-slice(%to.2, %r.2, %i.2, %zero.2)
}

ENTRY %main (to: f32[30,64], s: f32[30,8,8], i: s32[]) -> f32[30,64] {
  %to = f32[30,64]{1,0} parameter(0)
  %s = f32[30,8,8]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %out = f32[30,64]{1,0} fusion(%to, %s, %i), kind=kLoop, calls=%move, frontend_attributes={note={
"text on a line of its own"
}}
}
"""  # noqa: E501


def test_a_row_read_and_a_row_written_are_not_the_whole_stack():
  row = 64 * 4
  assert hlo.read(NESTED).traffic == 2 * row + 4


# As a GPU's compiler hands a product [256, 56] x [56, 1536] to cuBLAS.
GPU = """
HloModule step, is_scheduled=true

ENTRY %main (a: f32[256,56], b: f32[56,1536]) -> f32[256,1536] {
  %a = f32[256,56]{1,0} parameter(0)
  %b = f32[56,1536]{1,0} parameter(1)
  %gemm = (f32[256,1536]{1,0}, s8[1024]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %out = f32[256,1536]{1,0} get-tuple-element(%gemm), index=0
  ROOT %seen = f32[256,1536]{1,0} custom-call(%out), custom_call_target="__cudnn$fmhaSoftmax"
}
"""  # noqa: E501


def test_products_of_cublas_are_counted_and_other_kernels_named():
  found = hlo.read(GPU)
  assert found.flops == 2 * 256 * 56 * 1536
  assert found.kernels == {"__cudnn$fmhaSoftmax": 1}
  a, b, out = 256 * 56, 56 * 1536, 256 * 1536
  assert found.traffic == 4 * (a + b + out + 2 * out)  # no scratch
