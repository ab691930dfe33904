"""The one place that knows how jax versions differ for our kernels.

`pl.dot` left jax in 0.12 while the Triton module's own stayed; lowering for a
GPU that is not there needs an abstract one from 0.11 on. Kernels import from
here and name no version.
"""

import contextlib

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

load = plt.load
store = plt.store


def dot(a: jax.Array, b: jax.Array, trans_b: bool = False) -> jax.Array:
  """A tile's matrix product, summed in float32.

  float32 operands are multiplied as three bfloat16 each, which loses nothing
  that matters, where the default would be TF32: float32 is asked for where
  accuracy is, 16-bit types where speed is.
  """
  precision = None
  if a.dtype == b.dtype == "float32":
    precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6
  return plt.dot(a, b, trans_b=trans_b, precision=precision)


def triton_call(kernel, *, warps: int, stages: int, **kwargs):
  """`pl.pallas_call` through Triton; the rest as there."""
  params = plt.CompilerParams(num_warps=warps, num_stages=stages)
  return pl.pallas_call(kernel, compiler_params=params, **kwargs)


def abstract_gpu(
  kind: str = "NVIDIA H100 80GB HBM3", cores: int = 132
) -> contextlib.AbstractContextManager:
  """A context in which kernels lower for a GPU that this machine lacks."""
  device = AbstractDevice(device_kind=kind, num_cores=cores, platform="cuda")
  return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))
