"""Checkpoints: any pytree plus a JSON record, saved asynchronously by orbax.

Saves are atomic: a directory without orbax's final rename does not count as a
checkpoint, so a run that dies while saving resumes from the one before.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from avd_jax.errors import UserError


class Checkpoints:
  """The checkpoints of one workdir, under `workdir/checkpoints`.

  Args:
    workdir: the run's directory.
    keep: newest checkpoints to keep.
  """

  def __init__(self, workdir: str | Path, keep: int = 2):
    self.path = Path(workdir).absolute() / "checkpoints"
    self._manager = ocp.CheckpointManager(
      self.path,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, enable_async_checkpointing=True
      ),
    )

  def latest(self) -> int | None:
    """The newest whole checkpoint's step, or None."""
    return self._manager.latest_step()

  def save(
    self, step: int, items: dict[str, Any], record: dict[str, Any]
  ) -> None:
    """Starts saving named pytrees; returns before the files are written."""
    if self._manager.latest_step() == step:
      return
    # In a dict of one: orbax refuses a tree that is a single array.
    trees = {
      name: ocp.args.StandardSave({name: tree})
      for name, tree in _held(items).items()
    }
    args = ocp.args.Composite(record=ocp.args.JsonSave(record), **trees)
    self._manager.save(step, args=args)

  def record(self, step: int) -> dict[str, Any]:
    """The JSON record saved beside the trees."""
    return self._restore(step, {"record": ocp.args.JsonRestore()})["record"]

  def restore(self, step: int, targets: dict[str, Any]) -> dict[str, Any]:
    """The named trees at `step`, into the shapes and shardings of `targets`.

    What has no sharding comes to the default device, wherever it was saved.

    Raises:
      UserError: a checkpoint that is torn, or of another shape.
    """
    here = jnp.zeros(()).sharding

    def placed(leaf):
      leaf = ocp.utils.to_shape_dtype_struct(leaf)
      sharding = leaf.sharding or here
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    args = {
      name: ocp.args.StandardRestore(jax.tree.map(placed, {name: target}))
      for name, target in _held(targets).items()
    }
    restored = self._restore(step, args)
    return targets | {name: restored[name][name] for name in args}

  def _restore(self, step: int, args: dict[str, Any]) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**args))
    except Exception as error:  # what a damaged file raises may be just that
      cause = error
      while cause.__cause__ is not None:
        cause = cause.__cause__
      reason = (str(cause).strip().splitlines() or [repr(cause)])[0][:200]
      raise UserError(
        f"checkpoint {self.path / str(step)} cannot be restored ({reason});"
        " if it is damaged, delete that directory to fall back to an older one"
      ) from error

  def wait(self) -> None:
    """Returns when every started save is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self.wait()
    self._manager.close()


def _held(items: dict[str, Any]) -> dict[str, Any]:
  """The trees that hold anything; orbax refuses an empty one."""
  return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def open_existing(workdir: str | Path) -> tuple[Checkpoints, int]:
  """The checkpoints of a trained run, and the newest step.

  Raises:
    UserError: no such directory, or nothing in it.
  """
  path = Path(workdir)
  if not path.exists():
    raise UserError(f"workdir {path} does not exist; train into it first")
  if not path.is_dir():
    raise UserError(f"workdir {path} is a file; give the directory of a run")
  if not (path / "checkpoints").is_dir():
    raise UserError(f"workdir {path} has no checkpoints; train into it first")
  checkpoints = Checkpoints(path)
  step = checkpoints.latest()
  if step is None:
    raise UserError(
      f"workdir {path} has no whole checkpoint; train into it first"
    )
  return checkpoints, step
