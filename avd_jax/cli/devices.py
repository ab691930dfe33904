"""Devices: the one place that asks which there are.

Several processes form one training run where the environment says so:

  AVD_COORDINATOR, AVD_NUM_PROCESSES, AVD_PROCESS_ID
      host:port of process 0, how many there are, and which this one is
      (`launch/local.sh` and others of launch/ set these)
  AVD_COORDINATOR=auto
      jax finds all three itself: on TPU slices, from their metadata
  SLURM_NTASKS, where it is more than 1
      the same, from what srun tells each task

AVD_TIMEOUT is how many seconds they wait for each other, 300 if not set.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax._src import distributed  # its store has no public name
from jax.sharding import Mesh
from ml_collections import ConfigDict

from avd_jax import config as config_lib
from avd_jax import parallel
from avd_jax.errors import UserError

VARIABLES = ("AVD_COORDINATOR", "AVD_NUM_PROCESSES", "AVD_PROCESS_ID")
CACHE = Path("~/.cache/avd_jax/jax").expanduser()
# Seconds in which a network's disk shows what another machine has written: NFS
# looks again into a directory after 60, unless told otherwise.
PATIENCE = 60


def start(several: bool = False) -> None:
  """Joins the other processes, if any, and turns the compile cache on.

  Args:
    several: the program knows how to be one of several processes.

  Raises:
    UserError: only some of the AVD_ variables are set, or to nonsense; or they
      are, and the program works alone; or the others cannot be reached.
  """
  cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(CACHE))
  jax.config.update("jax_compilation_cache_dir", cache)
  given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
  if given and not several:
    raise UserError(
      "only `avd train` and `avd bagger` run as several processes; unset"
      f" {', '.join(given)}"
    )
  if not several:
    return
  if given == {"AVD_COORDINATOR": "auto"}:
    _join(local_device_ids=slurm_devices())
  elif given:
    address, count, index = _place(given)
    # Whatever else this machine belongs to: these are the processes.
    _join(address, count, index, cluster_detection_method="deactivate")
  elif int(os.environ.get("SLURM_NTASKS", "1")) > 1:
    _join(local_device_ids=slurm_devices())


def _place(given: dict[str, str]) -> tuple[str, int, int]:
  """The coordinator, how many processes, and which this is."""
  if given.get("AVD_COORDINATOR") == "auto":
    raise UserError(
      "AVD_COORDINATOR=auto finds the others itself; unset"
      f" {', '.join(VARIABLES[1:])}"
    )
  missing = [name for name in VARIABLES if name not in given]
  if missing:
    raise UserError(
      f"{', '.join(given)} set but not {', '.join(missing)}: a process of"
      " several needs all three"
    )
  address = given["AVD_COORDINATOR"]
  if not re.fullmatch(r".+:\d+", address):
    raise UserError(f"AVD_COORDINATOR={address} is not host:port")
  try:
    count, index = (int(given[name]) for name in VARIABLES[1:])
  except ValueError as error:
    raise UserError(
      f"AVD_NUM_PROCESSES and AVD_PROCESS_ID must be numbers: {error}"
    ) from error
  if not 0 <= index < count:
    raise UserError(
      f"AVD_PROCESS_ID={index} is not one of AVD_NUM_PROCESSES={count}:"
      " they count from 0"
    )
  if index == 0:
    try:
      socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except (OSError, OverflowError) as error:
      raise UserError(
        f"process 0 cannot listen at AVD_COORDINATOR={address} ({error});"
        " is another process 0 running here?"
      ) from error
  return address, count, index


def slurm_devices() -> list[int] | None:
  """This SLURM task's GPUs, where jax would take others.

  jax gives the n-th task of a node the n-th GPU in sight. But the only task of
  a node drives them all, and one that SLURM has bound to a GPU sees no other.

  Returns:
    Their numbers among those in sight; None where jax is right.
  """
  visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
  if not visible or "JAX_LOCAL_DEVICE_IDS" in os.environ:
    return None
  count = len(visible.split(","))
  # As "1(x4)" or "8(x2),4".
  tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
  alone = set(re.sub(r"\(x\d+\)", "", tasks).split(",")) == {"1"}
  return list(range(count)) if alone or count == 1 else None


def _seconds() -> int:
  text = os.environ.get("AVD_TIMEOUT", "300")
  if not re.fullmatch(r"[1-9]\d*", text):
    raise UserError(f"AVD_TIMEOUT={text} is not a number of seconds above 0")
  return int(text)


def _join(*place, **options) -> None:
  """jax.distributed.initialize, with an error where jax ends the program."""
  seconds = _seconds()
  # It would swallow each SIGTERM until training has a handler of its own.
  jax.config.update("jax_enable_preemption_service", False)
  failures = []

  def initialize():
    try:
      # Later than we give up: jax would kill the process.
      jax.distributed.initialize(
        *place, **options, initialization_timeout=seconds + 60
      )
    except Exception as error:
      failures.append(error)

  joining = threading.Thread(target=initialize, daemon=True)
  joining.start()
  joining.join(seconds)
  if failures:
    raise UserError(
      f"jax finds no other processes from here ({failures[0]}); under SLURM"
      " start it with srun, on a TPU slice on all of its hosts, elsewhere set"
      f" {', '.join(VARIABLES)}"
    ) from failures[0]
  if joining.is_alive():
    raise UserError(_who_is_missing(seconds))


def _who_is_missing(seconds: int) -> str:
  state = distributed.global_state
  address, count = state.coordinator_address, state.num_processes
  if address is None:
    return f"no coordinator was found within {seconds} s (AVD_TIMEOUT)"
  this = f"process {state.process_id} of {count}"
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
  except socket.gaierror as error:
    return (
      f"{this}: {host} of {address} is no name that this machine knows, not"
      f" within {seconds} s (AVD_TIMEOUT) either ({error})"
    )
  except OSError:
    return (
      f"{this}: nothing answered at {address} within {seconds} s"
      " (AVD_TIMEOUT); is process 0 running there, and may this machine reach"
      " that port?"
    )
  return (
    f"{this}: not all {count} processes came to {address} within {seconds} s"
    " (AVD_TIMEOUT); did all of them start, and is each told that they are"
    f" {count} (AVD_NUM_PROCESSES), and an AVD_PROCESS_ID of its own?"
  )


@dataclasses.dataclass(frozen=True)
class Group:
  """Processes that tell each other small things through the coordinator.

  Attributes:
    client: jax's, of the coordinator's store.
    index: this process.
    wait: milliseconds in which the others come.
  """

  client: Any
  index: int
  wait: int

  def first(self, name: str, value: Any) -> Any:
    """Process 0's value, in all of them."""
    with self._answered():
      if self.index == 0:
        self.client.key_value_set(f"avd/{name}", json.dumps(value))
      text = self.client.blocking_key_value_get(f"avd/{name}", self.wait)
    return json.loads(text)

  def complaints(self, name: str, complaint: str) -> str:
    """What all of them complain of, in a line; empty if none does."""
    directory = f"avd/{name}_complaints/"
    with self._answered():
      self.client.key_value_set(f"{directory}{self.index}", complaint)
      self.client.wait_at_barrier(f"avd/{name}", self.wait)
      found = dict(self.client.key_value_dir_get(directory))
    texts = [
      f"process {key.rpartition('/')[2]}: {text}"
      for key, text in sorted(found.items())
      if text
    ]
    return " | ".join(texts[:5])

  @contextlib.contextmanager
  def _answered(self) -> Iterator[None]:
    """The others, or an error that says so."""
    try:
      yield
    except jax.errors.JaxRuntimeError as error:
      first = str(error).strip().partition("\n")[0]
      late = f" within {self.wait // 1000} s (AVD_TIMEOUT)"
      raise UserError(
        f"process {self.index}: not all of the others answered"
        f"{late if 'DEADLINE' in first else ''}; did one of them end? ({first})"
      ) from error


def agree(config: ConfigDict, workdir: str | Path) -> None:
  """Makes sure that all processes are told the same, before any compiles.

  Otherwise they would wait for each other in different programs, or at the
  first checkpoint, for good.

  Raises:
    UserError: in every process, naming those that differ from process 0: in
      which fields of the config, in how many they are, or in the workdir; or
      some of them did not answer in time.
  """
  if not jax.distributed.is_initialized():
    return
  state = distributed.global_state
  group = Group(state.client, state.process_id, _seconds() * 1000)
  mine = {
    "jax": jax.__version__,
    "AVD_NUM_PROCESSES": state.num_processes,
    "config": config_lib.to_json(config),
  }
  first = group.first("config", mine)
  lines = config_lib.differences(first, mine, free=())
  differing = group.complaints("config", "; ".join(lines[:5]))
  if differing:
    raise UserError(
      "all processes must run the same command, but these differ from process"
      f" 0 ({differing})"
    )
  share_workdir(group, Path(workdir).absolute())


def share_workdir(group: Group, workdir: Path) -> None:
  """Makes sure that all processes see one workdir, which process 0 makes.

  Raises:
    UserError: in every process, naming those that see another directory than
      process 0, or other checkpoints in it; or some did not answer in time.
  """
  place = f"{socket.gethostname()}:{workdir}"
  mark, first, complaint = None, {}, ""
  if group.index == 0:
    mark = workdir / f".shared-{uuid.uuid4().hex}"
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      mark.touch()
      for old in workdir.glob(".shared-" + 32 * "[0-9a-f]"):
        if old != mark:  # of a start that was killed
          with contextlib.suppress(OSError):
            old.unlink()
      first = {"place": place, "mark": mark.name, "steps": _newest(workdir)}
    except OSError as error:
      complaint = f"cannot write into {place} ({error})"
  try:
    first = group.first("workdir", first)
    if first and group.index:
      # The others wait for this one's answer meanwhile.
      patience = min(PATIENCE, group.wait / 2000)
      complaint = _not_the_same(workdir, place, first, patience)
    complaints = group.complaints("workdir", complaint)
  finally:
    if mark is not None:
      with contextlib.suppress(OSError):
        mark.unlink()
  if complaints:
    raise UserError(
      f"the workdir must be one shared directory, but {complaints}"
    )


def _not_the_same(
  workdir: Path, place: str, first: dict[str, Any], patience: float
) -> str:
  """What a workdir lacks of process 0's; empty if nothing, soon enough."""
  end = time.monotonic() + patience
  while True:
    try:
      seen = (workdir / first["mark"]).exists()
      steps = config_lib.differences(first["steps"], _newest(workdir), free=())
    except OSError as error:
      return f"cannot read {place} ({error})"
    if seen and not steps:
      return ""
    if time.monotonic() > end:
      break
    time.sleep(0.2)
  if not seen:
    return f"{place} is not process 0's {first['place']}"
  return (
    f"{place} shows other checkpoints than process 0's ({'; '.join(steps)})"
  )


def _newest(workdir: Path) -> dict[str, int]:
  """The newest whole checkpoint of each training in a workdir."""
  newest = {}
  for pattern in ("", "base/", "round_*/train/"):
    for path in workdir.glob(f"{pattern}checkpoints"):
      steps = [int(step.name) for step in path.iterdir() if step.name.isdigit()]
      if steps:
        newest[str(path.relative_to(workdir))] = max(steps)
  return newest


def some(config: ConfigDict) -> Mesh | None:
  """The config's mesh over the first devices of this process, as many as it
  names; None where that is one.

  Raises:
    UserError: fewer devices than it names.
  """
  shape = [config.mesh[axis] for axis in parallel.AXES]
  count = math.prod(shape)
  if count == 1:
    return None
  return parallel.make_mesh(jax.local_devices()[:count], shape)


def memory() -> int:
  """Bytes that a device may use; a CPU's are the machine's."""
  limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
  return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def mesh(config: ConfigDict) -> Mesh:
  """The config's mesh over all devices.

  Raises:
    UserError: sizes that do not fit; one host of several, started alone.
  """
  devices = jax.devices()
  if jax.process_count() > 1 and not jax.distributed.is_initialized():
    raise UserError(
      f"this is one of {jax.process_count()} hosts of a TPU slice: set"
      " AVD_COORDINATOR=auto on all of them"
    )
  shape = [config.mesh[axis] for axis in parallel.AXES]
  return parallel.make_mesh(devices, shape)


def platform() -> str:
  """What this runs on: "cpu", "gpu" or "tpu"."""
  return jax.devices()[0].platform


def describe() -> str:
  """What this runs on, for reports."""
  devices = jax.devices()
  kind = devices[0].device_kind
  cores = f", {os.cpu_count()} cores" if kind == "cpu" else ""
  return f"{len(devices)} x {kind}{cores}, jax {jax.__version__}"
