"""The mesh, and the one table that says what is sharded over it."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avd_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")

# Logical axis of a parameter -> mesh axis. What is not here is replicated.
RULES = (
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("mlp", "tensor"),
)
# The batch of videos is split over every device that holds its own examples.
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(devices: Sequence[Any], shape: Sequence[int]) -> Mesh:
  """A mesh (data, fsdp, context, tensor) over `devices`.

  Args:
    devices: concrete or abstract devices.
    shape: the size of each axis; one -1 takes what is left.

  Raises:
    UserError: sizes that do not multiply to the number of devices.
  """
  sizes = list(shape)
  count = len(devices)
  if len(sizes) != len(AXES) or sizes.count(-1) > 1 or 0 in sizes:
    raise UserError(
      f"mesh {tuple(shape)}: give {len(AXES)} sizes {AXES}, at most one of"
      " them -1"
    )
  fixed = int(np.prod([s for s in sizes if s != -1]))
  if -1 in sizes and count % fixed == 0:
    sizes[sizes.index(-1)] = count // fixed
  if int(np.prod(sizes)) != count:
    raise UserError(
      f"mesh {tuple(shape)} over {AXES} does not fit {count} devices; change"
      " mesh.data, mesh.fsdp, mesh.context or mesh.tensor"
    )
  return Mesh(np.asarray(devices).reshape(sizes), AXES)


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
  """Refuses a batch that the mesh (or accumulation) does not divide.

  Raises:
    UserError: naming the sizes.
  """
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  if accumulation < 1 or batch_size % (accumulation * shards):
    raise UserError(
      f"data.batch_size {batch_size} is not divisible by accumulation"
      f" {accumulation} x {shards} devices along mesh axes data and fsdp"
    )


def state_shardings(abstract: Any, mesh: Mesh) -> Any:
  """Shardings of a tree whose leaves may be boxed with logical axes."""
  specs = nn.logical_to_mesh(nn.get_partition_spec(abstract), RULES)
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    specs,
    is_leaf=lambda s: isinstance(s, PartitionSpec),
  )


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, BATCH)


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """This process's share of a global batch, as global arrays."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )
