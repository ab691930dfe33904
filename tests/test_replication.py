"""What a device's program holds: its share, and nothing whole by accident.

Attention is plain JAX's here: Pallas kernels run on shares of their own
(`ops/per_device.py`).
"""

import functools
import os

import pytest
from test_mesh import ONE, config_of, mesh_of

from avd_jax.aot import hlo_text, plan_compile
from avd_jax.models import denoiser
from avd_jax.training.program import Program

FSDP, CONTEXT, TENSOR = (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8)
MIXED = (2, 2, 2, 1)


def largest(text):
  """Bytes of the largest array in a compiled program."""
  return max(max(hlo_text.sizes(line), default=0) for line in text.splitlines())


def program_of(shape, top_k=None, data=(), **changes):
  config = config_of(top_k, **changes)
  config.data.update(dict(batch_size=8, height=16, width=16) | dict(data))
  config.evaluation.update(frames=128, given=2)  # caches outweigh the rest
  config.sampling.segment = 2
  config.model.attention.update(window=None, sink=0)
  # Whoever computes it: "auto" goes by size, and devices have shares.
  config.model.attention.implementation = "xla"
  return Program(config, mesh_of(shape))


@functools.cache
def compiled(what, shape, changes):
  """The program of a stage, or the rollout's, as `avd plan` compiles it."""
  program = program_of(shape, **dict(changes))
  if what == plan_compile.ROLLOUT:
    function, arguments, *_ = plan_compile.rollout_segment(program)
  else:
    function, arguments, _ = plan_compile.training_step(program, what)
  return function.lower(*arguments).compile()


def largest_of(what, shape, changes):
  changes = tuple(sorted(changes.items()))
  return largest(compiled(what, shape, changes).as_text())


# Over context dense attention gathers a layer's keys, which are as large as all
# its tokens; a ring of routed queries gathers nothing. There pixels, which are
# whole, must be few beside the tokens they become.
ROUTED = dict(top_k=2, dim=96)
# What weights are made of, each layer as large as an eighth of all; few tokens.
WEIGHTS = dict(
  dim=64, ffn_dim=512, num_layers=8, data=(("height", 4), ("width", 4))
)
# Between the blocks tokens are whole over tensor; what is cut is inside.
WIDE = dict(dim=64, ffn_dim=512, num_heads=8)
MANY = [
  ("teacher_forcing", FSDP, WEIGHTS),
  ("resampling", CONTEXT, ROUTED),
  ("resampling", MIXED, {}),
]


@pytest.mark.parametrize(
  ("stage", "shape", "changes"),
  [*MANY, ("resampling", FSDP, {}), ("teacher_forcing", TENSOR, WIDE)]
  if os.environ.get("AVD_TEST_ALL")
  else MANY,
)
def test_nothing_is_whole_in_a_training_step(stage, shape, changes):
  """No array is larger than a device's share of the largest.

  XLA would rather keep all videos everywhere than gather a weight; and gather
  the weights of all layers before their loop.
  """
  whole = largest_of(stage, ONE, changes)
  assert largest_of(stage, shape, changes) <= whole / 8 * 1.05


@pytest.mark.parametrize(
  ("shape", "changes"),
  [(FSDP, {}), (CONTEXT, {}), (CONTEXT, ROUTED), (TENSOR, WIDE), (MIXED, {})],
)
def test_nothing_is_whole_in_a_rollout(shape, changes):
  """Each share of the batch makes one video: the rest cuts its cache."""
  whole = largest_of(plan_compile.ROLLOUT, ONE, changes)
  parts = shape[2] * shape[3]
  share = largest_of(plan_compile.ROLLOUT, shape, changes)
  assert share <= whole / parts * 1.05


@pytest.mark.parametrize("shape", [ONE, MIXED])
def test_a_cache_is_kept_as_it_comes_on_tpus(shape, monkeypatch):
  """A loop that lays it out anew holds it twice.

  Asked of the whole array XLA would gather it: it is asked of each share.
  """

  def laid():
    program = program_of(shape)
    function, arguments, *_ = plan_compile.rollout_segment(program)
    traced = function.trace(*arguments)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    k = arguments[2].kv.k[0]
    share = "x".join(map(str, k.sharding.shard_shape(k.shape)))
    lines = [line for line in text.splitlines() if "@LayoutConstraint" in line]
    return [f"tensor<{share}xf32>" in line for line in lines]

  assert not laid()
  monkeypatch.setattr(denoiser, "platform_of", lambda place: "tpu")
  found = laid()  # of keys and of values, as they come and as they are left
  assert found
  assert all(found)
