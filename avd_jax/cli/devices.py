"""Devices: the one place that asks which there are.

Several processes form one training run where the environment says so: under
SLURM jax finds them itself; elsewhere AVD_COORDINATOR (host:port),
AVD_NUM_PROCESSES and AVD_PROCESS_ID name them (`launch/local.sh` sets these).
"""

import os
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from avd_jax import parallel
from avd_jax.errors import UserError

VARIABLES = ("AVD_COORDINATOR", "AVD_NUM_PROCESSES", "AVD_PROCESS_ID")
CACHE = Path("~/.cache/avd_jax/jax").expanduser()


def start(several: bool = False) -> None:
  """Joins the other processes, if any, and turns the compile cache on.

  Args:
    several: the program knows how to be one of several processes.

  Raises:
    UserError: only some of the AVD_ variables are set, or not to numbers; or
      they are, and the program works alone.
  """
  cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(CACHE))
  jax.config.update("jax_compilation_cache_dir", cache)
  given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
  if given and not several:
    raise UserError(
      "only `avd train` and `avd bagger` run as several processes; unset"
      f" {', '.join(given)}"
    )
  if not given:
    if several and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
      jax.distributed.initialize()
    return
  missing = [name for name in VARIABLES if name not in given]
  if missing:
    raise UserError(
      f"{', '.join(given)} set but not {', '.join(missing)}: a process of"
      " several needs all three"
    )
  try:
    count, index = (int(given[name]) for name in VARIABLES[1:])
  except ValueError as error:
    raise UserError(
      f"AVD_NUM_PROCESSES and AVD_PROCESS_ID must be numbers: {error}"
    ) from error
  jax.distributed.initialize(given["AVD_COORDINATOR"], count, index)


def mesh(config: ConfigDict) -> Mesh:
  """The config's mesh over all devices."""
  shape = [config.mesh[axis] for axis in parallel.AXES]
  return parallel.make_mesh(jax.devices(), shape)


def platform() -> str:
  """What this runs on: "cpu", "gpu" or "tpu"."""
  return jax.devices()[0].platform


def describe() -> str:
  """What this runs on, for reports."""
  devices = jax.devices()
  kind = devices[0].device_kind
  cores = f", {os.cpu_count()} cores" if kind == "cpu" else ""
  return f"{len(devices)} x {kind}{cores}, jax {jax.__version__}"
