"""The mesh, and the one table that says what is sharded over it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avd_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")

# Logical axis -> mesh axes: all that is sharded. What is not here is whole on
# every device. The optimizer's state and the EMA follow their parameters.
RULES = (
  # Parameters.
  ("embed", "fsdp"),  # the model's width, where it is a parameter's
  ("heads", "tensor"),  # the width seen as heads; and heads themselves
  ("mlp", "tensor"),  # the feed-forward's width
  ("vocab", "tensor"),
  # Activations, and the KV cache.
  ("batch", ("data", "fsdp")),  # videos
  ("tokens", "context"),  # of every chunk
)
# What activations look like, by logical axes.
TOKENS = ("batch", None, "tokens", None)  # [b n s e]
HEADS = ("batch", None, "tokens", "heads", None)  # [b n s a d]
MEANS = ("batch", None, "heads", None)  # [b n a d]
TEXT = ("batch", None, None)  # [b m e]


def spec(names: Sequence[str | None]) -> PartitionSpec:
  """Logical axes as mesh axes."""
  rules = dict(RULES)
  return PartitionSpec(*(rules.get(name) for name in names))


SIZES = {  # what they are called, and where they come from
  "batch": ("videos", "data.batch_size"),
  "tokens": (
    "tokens of a chunk",
    "data.height, data.width or model.chunk_frames",
  ),
  "heads": ("attention heads", "model.num_heads"),
}
# The batch of videos is split over every device that holds its own examples.
BATCH = spec(("batch",))


def check_divides(mesh: Mesh, **sizes: int) -> None:
  """Refuses sizes, by logical axis, that a mesh does not cut evenly.

  Raises:
    UserError: naming the size, the mesh axes and what to change.
  """
  for name, size in sizes.items():
    axes = dict(RULES)[name]
    axes = (axes,) if isinstance(axes, str) else axes
    parts = int(np.prod([mesh.shape[axis] for axis in axes]))
    if size % parts:
      what, change = SIZES[name]
      raise UserError(
        f"{size} {what} are not divisible by mesh.{' x mesh.'.join(axes)} ="
        f" {parts}; change mesh, or {change}"
      )


def constrain(
  x: jax.Array, place: Any, names: Sequence[str | None]
) -> jax.Array:
  """Cuts an activation over a mesh by its logical axes; elsewhere, nothing.

  Without this XLA keeps whole batches on every device wherever that saves it a
  collective.

  Raises:
    UserError: a mesh that does not divide an axis.
  """
  if not isinstance(place, Mesh) or place.size == 1:
    return x
  sizes = zip(names, x.shape, strict=True)
  check_divides(place, **{name: size for name, size in sizes if name})
  sharding = NamedSharding(place, spec(names))
  return jax.lax.with_sharding_constraint(x, sharding)


def make_mesh(devices: Sequence[Any], shape: Sequence[int]) -> Mesh:
  """A mesh (data, fsdp, context, tensor) over `devices`.

  Args:
    devices: concrete or abstract devices.
    shape: the size of each axis; one -1 takes what is left.

  Raises:
    UserError: sizes that cannot be, or do not multiply to the number of
      devices.
  """
  sizes = list(shape)
  count = len(devices)
  known = all(size >= 1 or size == -1 for size in sizes)
  if len(sizes) != len(AXES) or sizes.count(-1) > 1 or not known:
    raise UserError(
      f"mesh {tuple(shape)}: give {len(AXES)} sizes {AXES}, each at least 1, or"
      " one of them -1 for what is left"
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
  """Shardings of a tree whose leaves may be boxed with logical axes.

  Raises:
    UserError: a leaf that the mesh does not cut evenly.
  """

  def sharding(leaf):
    if not isinstance(leaf, nn.LogicallyPartitioned):
      return replicated(mesh)
    if not jax.tree.leaves(leaf.value):
      return leaf.value  # where an optimizer masks a parameter out
    axes = nn.logical_to_mesh_axes(leaf.names, RULES)
    sharding = NamedSharding(mesh, axes)
    try:
      sharding.shard_shape(leaf.value.shape)
    except ValueError as error:
      raise UserError(
        f"mesh {tuple(mesh.shape.values())} over {AXES} cannot cut parameters"
        f" of shape {leaf.value.shape} along {axes}; change mesh.fsdp or"
        " mesh.tensor, or the model's widths"
      ) from error
    return sharding

  boxed = lambda x: isinstance(x, nn.LogicallyPartitioned)
  return jax.tree.map(sharding, abstract, is_leaf=boxed)


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds all of it."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Every device holds its own examples."""
  return NamedSharding(mesh, BATCH)


def batch_share(mesh: Mesh) -> tuple[int, int]:
  """(index, count): the share of each batch that this process reads.

  Processes that a context or tensor axis runs across hold the same examples,
  and read the same share.

  Raises:
    UserError: processes whose examples overlap only in part.
  """
  rows = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
  me = jax.process_index()
  mine = [
    i for i, row in enumerate(rows) if any(d.process_index == me for d in row)
  ]
  index, past = divmod(mine[0], len(mine))
  whole = mine == list(range(mine[0], mine[0] + len(mine)))
  if past or not whole or len(rows) % len(mine):
    raise UserError(
      f"mesh {tuple(mesh.shape.values())} over {AXES} cuts process {me}'s"
      " examples apart; make context x tensor divide its devices, or be a"
      " multiple of them"
    )
  return index, len(rows) // len(mine)


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """This process's share of a global batch, as global arrays."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )


def any_process(mine: bool, mesh: Mesh) -> jax.Array | bool:
  """Whether any process says so; every process must ask at the same step.

  Several processes get a scalar that is still on its way: who reads it late
  waits for nobody.
  """
  if not mesh.is_multi_process:
    return mine
  sharding = NamedSharding(mesh, PartitionSpec(AXES))
  votes = jax.make_array_from_process_local_data(
    sharding, np.full(mesh.local_mesh.size, mine), (mesh.size,)
  )
  return _any(mesh)(votes)


@functools.cache
def _any(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(jnp.any, out_shardings=replicated(mesh))
