"""Accelerators that are not there, for XLA to compile for.

A GPU is described to jax's CUDA plugin by a short text; TPUs are known to
libtpu by name. Both are ordinary pip packages and need no driver, but they are
large, so that they come with extras of this package. Nothing here asks for a
real device, and nothing keeps one from being used elsewhere in the process.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from avd_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Target:
  """An accelerator.

  Attributes:
    platform: "gpu" or "tpu".
    kind: what jax calls such a device.
    topology: the smallest that can be had: slices x hosts x GPUs of a host, or
      libtpu's name.
    extra: of this package, which installs the compiler.
    gib: memory of a device.
    bandwidth: of its memory, bytes a second (GPUs).
  """

  platform: str
  kind: str
  topology: str
  extra: str
  gib: int
  bandwidth: float = 0.0


_GPU, _TPU = "compile-check-gpu", "compile-check-tpu"
TARGETS = {
  "h100": Target("gpu", "NVIDIA H100 80GB HBM3", "1x1x1", _GPU, 79, 3.35e12),
  "h200": Target("gpu", "NVIDIA H200", "1x1x1", _GPU, 139, 4.8e12),
  "v5e": Target("tpu", "TPU v5 lite", "v5e:2x2", _TPU, 16),
  "v5p": Target("tpu", "TPU v5", "v5p:2x2x1", _TPU, 95),
  "v6e": Target("tpu", "TPU v6 lite", "v6e:2x2", _TPU, 32),
}

# A Hopper GPU as XLA describes one to itself (GpuTargetConfigProto); what is
# left open is what its products differ in. Sizes of 233472 and 232448 bytes
# are the shared memory of a multiprocessor and the most a block may have.
_HOPPER = """
gpu_device_info {{
  name: "{kind}"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability {{
    major: 9
    feature_extension: ACCELERATED_FEATURES
  }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_address_bits: 64
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  threads_per_warp: 32
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{kind}"
"""
_CUDNN = 91000
# Slices that Google lends (https://cloud.google.com/tpu/docs/v5e, v6e, v5p);
# of v5p also whole cubes of 4 x 4 x 4 chips in a row, a plane or a block.
_FLAT = ["1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"]
_SMALL = ["2x2x1", "2x2x2", "2x2x4", "2x4x4"]
_CUBES = ["4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16"]
_MOST_CHIPS = 6144  # of a v5p slice
_PER_HOST = 8  # GPUs
HOST = "cpu"  # this machine's cores, as so many devices
_CORES = {"gpu": 132, "tpu": 1}

# libtpu asks for these, and asks a cloud's metadata server where they are
# missing. They name a machine, not the target. The first lets it load where
# another process has it loaded: a TPU belongs to one, its compiler to all.
_LIBTPU = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
}


def find(name: str) -> Target:
  """The target of a name.

  Raises:
    UserError: there is none.
  """
  if name not in TARGETS:
    raise UserError(f"target {name!r} is not one of {', '.join(TARGETS)}")
  return TARGETS[name]


def named(target: str) -> tuple[str, str]:
  """(name, topology) of a target with its size, as `devices` takes them.

  Args:
    target: "v5p:4x4x4", "v5e:16x16", "h100:8" (GPUs; 8 to a host), "cpu:8".

  Raises:
    UserError: no such target, or a size that it does not come in.
  """
  name, _, size = target.partition(":")
  if name not in (HOST, *TARGETS):
    raise UserError(
      f"target {target!r}: {name!r} is not one of {', '.join(TARGETS)}, {HOST};"
      " give one with its size, such as v5p:4x4x4, h100:8 or cpu:8"
    )
  if name == HOST or find(name).platform == "gpu":
    if not size.isdigit() or not int(size):
      raise UserError(f"target {target!r}: give {name}:DEVICES, as {name}:8")
    count = int(size)
    if name == HOST:
      return name, size
    if count > _PER_HOST and count % _PER_HOST:
      raise UserError(
        f"target {target!r}: a host has {_PER_HOST} GPUs; give 1 to"
        f" {_PER_HOST}, or a multiple of {_PER_HOST}"
      )
    hosts = -(-count // _PER_HOST)
    return name, f"1x{hosts}x{count // hosts}"
  if name != "v5p":
    there_are, exists = ", ".join(_FLAT), size in _FLAT
  else:
    there_are = f"{', '.join(_SMALL)}, 4x4x4 and 4A x 4B x 4C, A <= B <= C"
    exists = size in _SMALL or _cubes(size)
  if not exists:
    raise UserError(
      f"target {target!r}: there is no such slice of {name}; there are"
      f" {there_are}"
    )
  return name, f"{name}:{size}"


def larger(target: str) -> list[str]:
  """Targets of the same devices, and more of them, smallest first."""
  name, _, size = target.partition(":")
  if name == HOST:
    return []
  if find(name).platform == "gpu":
    count = int(size)
    return [
      f"{name}:{max(_PER_HOST, count) * n}"
      for n in (1, 2, 4, 8, 16)
      if max(_PER_HOST, count) * n > count
    ]
  sizes = _FLAT if name != "v5p" else [*_SMALL, *_CUBES]
  chips = lambda size: math.prod(map(int, size.split("x")))
  return [f"{name}:{other}" for other in sizes if chips(other) > chips(size)]


def _cubes(size: str) -> bool:
  if not re.fullmatch(r"\d+x\d+x\d+", size):
    return False
  sides = [int(n) for n in size.split("x")]
  whole = all(side and side % 4 == 0 for side in sides)
  return whole and sides == sorted(sides) and math.prod(sides) <= _MOST_CHIPS


def installed(platform: str) -> bool:
  """Whether this environment has the compiler for "gpu" or "tpu"."""
  if platform == "tpu":
    return importlib.util.find_spec("libtpu") is not None
  return any(
    importlib.util.find_spec(f"jax_cuda{version}_plugin") is not None
    for version in (12, 13)
  )


def require(name: str) -> Target:
  """The target of a name, whose compiler is installed.

  Raises:
    UserError: no such target, or no compiler for it here.
  """
  target = find(name)
  if not installed(target.platform):
    package = "libtpu" if target.platform == "tpu" else "jax's CUDA plugin"
    raise UserError(
      f"target {name}: {package} is not installed; pip install"
      f" 'avd_jax[{target.extra}]', or name other targets"
    )
  return target


def devices(name: str, topology: str | None = None) -> list[Any]:
  """Devices of a target, to lower and compile for but not to run on.

  Args:
    name: of the target.
    topology: how many and in what shape ("1x2x8" for GPUs, "v5p:4x4x4" for
      TPUs, a number for HOST); None takes the smallest.

  Raises:
    UserError: no such target, no compiler for it here, or more devices than
      this process lets its host pretend to have.
  """
  if name == HOST:
    return _cores(int(topology or 1))
  target = require(name)
  shape = topology or target.topology
  if target.platform == "tpu":
    for variable, value in _LIBTPU.items():
      os.environ.setdefault(variable, value)
    alone = (
      {"chips_per_host_bounds": (1, 1, 1)} if shape.endswith(":1x1") else {}
    )
    return topologies.get_topology_desc(shape, "tpu", **alone).devices
  # The plugin asks the driver for its version otherwise.
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
  config = _HOPPER.format(
    kind=target.kind,
    memory=target.gib * 2**30,
    bandwidth=int(target.bandwidth),
  )
  described = topologies.get_topology_desc(
    platform="cuda", target_config=config, topology=shape
  )
  return described.devices


def _cores(count: int) -> list[Any]:
  found = topologies.get_attached_topology(HOST).devices
  if len(found) < count:
    raise UserError(
      f"target {HOST}:{count}: this process has {len(found)} host devices; set"
      f" JAX_NUM_CPU_DEVICES={count}"
    )
  return found[:count]


@contextlib.contextmanager
def lowering(name: str) -> Iterator[None]:
  """What is traced and lowered in here is for a target, or for HOST.

  Lowering asks for the device: kernels do so through the abstract mesh (jax
  0.11 and later), and jax's cuDNN calls ask the driver for the GPU's compute
  capability, past all of jax's own means to say what is lowered for. There is
  no public way around the latter, so three private functions are answered
  here, and nowhere else.
  """
  if name == HOST:
    yield
    return
  target = find(name)
  device = AbstractDevice(
    device_kind=target.kind,
    num_cores=_CORES[target.platform],
    platform="cuda" if target.platform == "gpu" else "tpu",
  )
  with contextlib.ExitStack() as stack:
    mesh = AbstractMesh((), (), abstract_device=device)
    stack.enter_context(use_abstract_mesh(mesh))
    if target.platform == "gpu":
      from jax._src.cudnn import fused_attention_stablehlo as cudnn

      answers = mock.patch.multiple(
        cudnn,
        check_cudnn_version=lambda: _CUDNN,
        check_compute_capability=lambda least: float(least) <= 9.0,
        is_cuda_compute_capability_equal=lambda exact: exact == "9.0",
      )
      stack.enter_context(answers)
    yield
