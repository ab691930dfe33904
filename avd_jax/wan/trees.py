"""Trees of parameters on disk, written and read a leaf at a time.

Orbax keeps a whole tree in memory while it saves one. Here a part of a leaf is
made when its turn comes and let go when it is written, so that a model of any
size passes through the memory of one layer's largest tensor. What is written is
an ordinary orbax checkpoint.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from avd_jax.errors import UserError
from avd_jax.typing import Params

# Of what is written, and read, in one piece.
_CHUNK_BYTES = 64 << 20


@runtime_checkable
class Leaf(Protocol):
  """A leaf that is somewhere else: `read` brings it, or a part, to memory.

  It has at least one axis.
  """

  shape: tuple[int, ...]
  dtype: np.dtype

  def read(self, index: tuple[slice, ...] = ()) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class _Later:
  """A leaf of a tree that is being saved."""

  leaf: Leaf


class _InParts(ocp.type_handlers.NumpyHandler):
  """Makes and writes leaves a few rows of their first axis at a time."""

  async def serialize(self, values, infos, args=None):
    args = args or [ocp.SaveArgs()] * len(values)
    batch, size = [], 0
    for later, info, arg in zip(values, infos, args, strict=True):
      leaf, rows = later.leaf, _rows(later.leaf)
      # Not waited for: small arrays are opened, and written, side by side.
      store = _opened(leaf, rows, info, arg)
      for first in range(0, leaf.shape[0], rows):
        batch.append((leaf, store, slice(first, first + rows)))
        size += rows * _row_bytes(leaf)
        if size > _CHUNK_BYTES:
          _write(batch)
          batch, size = [], 0
    _write(batch)
    return []


def _row_bytes(leaf: Leaf) -> int:
  return math.prod(leaf.shape[1:]) * leaf.dtype.itemsize


def _rows(leaf: Leaf) -> int:
  """Rows of the first axis that are written as one chunk."""
  return min(leaf.shape[0], max(1, _CHUNK_BYTES // _row_bytes(leaf)))


def _opened(
  leaf: Leaf, rows: int, info: Any, arg: Any
) -> tensorstore.Future[tensorstore.TensorStore]:
  """The array that a leaf becomes, empty."""
  spec = ocp.type_handlers.get_json_tspec_write(
    info,
    info.is_ocdbt_checkpoint,
    leaf.shape,
    leaf.shape,
    leaf.dtype,
    process_index=jax.process_index() if info.is_ocdbt_checkpoint else None,
    arg=arg,
  )
  # Orbax has no choice of its own that cuts the first axis and no other.
  spec["metadata"]["chunks"] = [rows, *leaf.shape[1:]]
  return tensorstore.open(
    tensorstore.Spec(spec), create=True, open=True, context=info.ts_context
  )


def _write(batch: list[tuple[Leaf, Any, slice]]) -> None:
  """Writes rows of leaves, and returns when they are on disk."""
  written = []
  for leaf, store, rows in batch:
    rows = slice(rows.start, min(rows.stop, leaf.shape[0]))
    x = leaf.read((rows,))
    written.append(
      store.result()[rows].write(x, can_reference_source_data_indefinitely=True)
    )
  for write in written:
    write.result()


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """{"a/b": x} as {"a": {"b": x}}."""
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *folders, name = path.split("/")
    place = tree
    for folder in folders:
      place = place.setdefault(folder, {})
    place[name] = leaf
  return tree


def flat(tree: Any) -> dict[str, Any]:
  """{"a": {"b": x}} as {"a/b": x}."""
  leaves, _ = jax.tree.flatten_with_path(tree)
  return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def handler() -> ocp.PyTreeCheckpointHandler:
  """An orbax handler that saves what `to_save` gives."""
  kinds = ((_Later, _InParts()), (jax.Array, ocp.type_handlers.ArrayHandler()))
  registry = ocp.type_handlers.create_type_handler_registry(*kinds)
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def to_save(name: str, leaves: Mapping[str, Leaf]) -> ocp.args.PyTreeSave:
  """Arguments that save leaves as the tree {name: ...}."""
  tree = nested({path: _Later(leaf) for path, leaf in leaves.items()})
  return ocp.args.PyTreeSave({name: tree})


def _alone() -> ocp.options.MultiprocessingOptions:
  """This process reads and writes for itself, and waits for no other."""
  me = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"own_{me}"
  )


def save(path: Path, name: str, leaves: Mapping[str, Leaf]) -> None:
  """Saves a tree of its own, at `path`, whole or not at all."""
  with ocp.Checkpointer(
    handler(), multiprocessing_options=_alone()
  ) as checkpointer:
    checkpointer.save(path.absolute(), args=to_save(name, leaves))


@dataclasses.dataclass(frozen=True)
class Saved:
  """A tree that was saved, here or by a training run.

  Attributes:
    path: its directory.
    name: what it was saved as.
    kinds: shape and type of each leaf.
  """

  path: Path
  name: str
  kinds: Mapping[str, jax.ShapeDtypeStruct]

  def each(self) -> Iterator[tuple[str, np.ndarray]]:
    """All leaves, a large one or a few small ones in memory at a time.

    Raises:
      UserError: a damaged file.
    """
    batch, size = [], 0
    for leaf, kind in self.kinds.items():
      batch.append(leaf)
      size += math.prod(kind.shape) * kind.dtype.itemsize
      if size > _CHUNK_BYTES:
        yield from self._read(batch)
        batch, size = [], 0
    if batch:
      yield from self._read(batch)

  def _read(self, leaves: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    wanted = {self.name: nested(dict.fromkeys(leaves, 0))}
    how = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted
    )
    args = ocp.args.PyTreeRestore(wanted, how, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      tree = _readable(self.path, checkpointer.restore, self.path, args=args)
    yield from flat(tree[self.name]).items()


def saved(path: Path, name: str) -> Saved:
  """A saved tree, none of it read.

  Raises:
    UserError: there is none, or it is damaged.
  """
  path = path.absolute()
  if not path.is_dir():
    raise UserError(f"{path} does not exist")
  tree = _readable(path, lambda: ocp.PyTreeCheckpointHandler().metadata(path))
  kinds = {
    leaf: jax.ShapeDtypeStruct(kind.shape, kind.dtype)
    for leaf, kind in flat(tree.tree[name]).items()
  }
  return Saved(path, name, kinds)


def restore(path: Path, name: str, target: Params) -> Params:
  """A saved tree, cast and placed as the leaves of `target` say.

  Raises:
    UserError: there is none, or it is damaged, or of another shape.
  """
  path = path.absolute()
  if not path.is_dir():
    raise UserError(f"{path} does not exist")
  here = jax.numpy.zeros(()).sharding
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=x.sharding or here
    ),
    target,
  )
  with ocp.StandardCheckpointer(
    multiprocessing_options=_alone()
  ) as checkpointer:
    return _readable(path, checkpointer.restore, path, {name: target})[name]


def _readable(path: Path, read: Callable[..., Any], *args, **kwargs) -> Any:
  try:
    return read(*args, **kwargs)
  except Exception as error:  # what a damaged file raises may be just that
    cause: BaseException = error
    while cause.__cause__ is not None:  # orbax wraps what tensorstore says
      cause = cause.__cause__
    reason = (str(cause).strip().splitlines() or [repr(cause)])[0]
    reason = reason.partition(" [tensorstore_spec")[0][:300]
    raise UserError(
      f"{path} cannot be read ({reason}); if it is damaged, import it again"
    ) from error
