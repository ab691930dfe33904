"""A run's programs, compiled for devices that are not there, and read.

The training step of a stage, and the sampler's segment, are lowered over a
mesh of described devices and compiled by the compiler that would compile them
there. What it allots is what a device would need; what its program says, with
loops counted as often as they run, is what a device would do.
"""

import dataclasses
import functools
import multiprocessing
import re
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from avd_jax import config as config_lib
from avd_jax import parallel
from avd_jax.aot import chips, hlo, plan_work, topologies
from avd_jax.errors import UserError
from avd_jax.models import denoiser as denoiser_lib
from avd_jax.sampling import Sampler
from avd_jax.training.program import Program
from avd_jax.training.step import Schedule

ROLLOUT = "rollout"  # stands among the stages for the sampler's segment
# Where there is no GPU to time tiles on, XLA takes some that its own Triton
# cannot compile; cuBLAS has no tiles to choose.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True)
class Job:
  """A program to compile; it can be sent to another process.

  Attributes:
    config: of the run, plain values.
    target: "v5p:4x4x4" and the like.
    what: a stage, or ROLLOUT.
    local: steps taken in the stage; see `Program.step`.
  """

  config: dict[str, Any]
  target: str
  what: str
  local: int = 0


class Exchange(NamedTuple):
  """What devices exchange in a step, of one kind along the same mesh axes.

  Attributes:
    kind: of collective, one of `hlo.KINDS`.
    axes: of the mesh, along which the devices of a group lie.
    times: how often.
    bytes: of the arrays that it is about; see `hlo.Collective`.
    sent: bytes that a device sends.
  """

  kind: str
  axes: tuple[str, ...]
  times: int
  bytes: int
  sent: int


@dataclasses.dataclass
class Figures:
  """What a program would take.

  Attributes:
    what: the stage, or ROLLOUT.
    parameters: of the model.
    flops: that all devices need for a step, whoever computes it: what MFU
      counts. Recomputing is not among them.
    done: those with the block's recomputing.
    memory: bytes of a device by part; "in all" is their sum.
    compiled_flops: of all devices, counted in the program, kernels excluded.
    xla_flops: of all devices, by XLA, which takes a loop's body once; None
      where it does not say.
    traffic: bytes that a device reads from memory and writes to it.
    collectives: what devices exchange.
    kernels: calls of kernels, by name.
    unknown_loops: loops that were counted once.
    seconds: at least, by what limits: "compute", "memory", "links"; empty
      where the chip's peaks are not known, or nothing was compiled.
    compile_seconds: that tracing and compiling took.
    videos: that a step works on at once.
    frames: of each that a step makes or trains.
    notes: what is said while lowering, such as a kernel that does not fit.
    refused: the compiler's words where a program needs too much memory.
  """

  what: str
  parameters: int
  flops: int
  done: int
  memory: dict[str, int]
  compiled_flops: int | None = None
  xla_flops: int | None = None
  traffic: int | None = None
  collectives: list[Exchange] = dataclasses.field(default_factory=list)
  kernels: dict[str, int] = dataclasses.field(default_factory=dict)
  unknown_loops: list[str] = dataclasses.field(default_factory=list)
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  compile_seconds: float = 0.0
  videos: int = 0
  frames: int = 0
  notes: list[str] = dataclasses.field(default_factory=list)
  refused: str | None = None

  @property
  def needed(self) -> int:
    """Bytes of a device."""
    return self.memory["in all"]

  @property
  def least(self) -> float | None:
    """Seconds that a step takes at least."""
    return max(self.seconds.values()) if self.seconds else None

  def fits(self, limit: int | None) -> bool:
    """Whether a device with `limit` bytes is enough; None is no limit."""
    return self.refused is None and (limit is None or self.needed <= limit)


def mesh_of(config: ConfigDict, target: str) -> Mesh:
  """The config's mesh over a target's devices.

  Raises:
    UserError: no such target, no compiler for it, or a mesh that does not
      multiply to its devices.
  """
  devices = topologies.devices(*topologies.named(target))
  shape = [config.mesh[axis] for axis in parallel.AXES]
  return parallel.make_mesh(devices, shape)


def _placed(tree: Any, sharding: NamedSharding) -> Any:
  shape = lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)
  return jax.tree.map(shape, tree)


def training_step(program: Program, name: str, local: int = 0):
  """A stage's step, and what it would be called with.

  Args:
    program: the run's.
    name: of the stage.
    local: steps taken in it; see `Program.step`.

  Returns:
    (function, its arguments, bytes of a device by part).
  """
  everywhere = parallel.replicated(program.mesh)
  scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
  state = program.abstract_state()
  batch = _placed(program.batch, parallel.batch_sharding(program.mesh))
  read = batch if program.model.text != "none" else batch._replace(text=())
  held = plan_work.state_bytes(state) | {"batch": plan_work.held(read)}
  arguments = (state, batch, Schedule(scalar, scalar))
  return program.step(name, local), arguments, held


def rollout_segment(program: Program):
  """The same of the sampler's segment, and (FLOPs of all, videos, frames).

  A video for each share of the batch; the last segment of
  `evaluation.frames`, which sees the longest history.

  Args:
    program: the run's.

  Returns:
    (function, its arguments, bytes of a device by part, work).
  """
  config, mesh = program.config, program.mesh
  sampler = Sampler(
    config, None, functools.partial(denoiser_lib.make, place=mesh)
  )
  size, data = program.model.chunk_frames, config.data
  total = config.evaluation.frames // size
  count, room = sampler.room(config.evaluation.given // size, total)
  shape = (
    mesh.shape["data"] * mesh.shape["fsdp"], size, data.height, data.width,
    program.model.channels,
  )  # fmt: skip
  like = jax.ShapeDtypeStruct(shape, jnp.float32)
  cache = jax.eval_shape(lambda: sampler.denoiser().init_cache(like, room))
  names = {5: parallel.HEADS, 4: parallel.MEANS}
  cache = jax.tree.map(
    lambda s: _placed(s, NamedSharding(mesh, parallel.spec(names[s.ndim]))),
    cache,
  )
  params = program.abstract_state().ema
  text = program.batch.text
  text = jax.ShapeDtypeStruct((shape[0], *text.shape[1:]), text.dtype)
  text = _placed(text, parallel.batch_sharding(mesh))
  everywhere = parallel.replicated(mesh)
  key = _placed(jax.eval_shape(jax.random.key, 0), everywhere)
  first = (_placed(jax.ShapeDtypeStruct((), "int32"), everywhere),) * 2
  null = None
  if program.model.text == "embeddings":
    null = jax.ShapeDtypeStruct(text.shape[1:], text.dtype, sharding=everywhere)
  arguments = (params, text, cache, key, first, shape, count, null)
  held = {"parameters": plan_work.held(params), "cache": plan_work.held(cache)}
  branches = cache.kv.k[0].shape[0]  # videos, and more where any is guided
  passes = config.sampling.steps * (1 + (config.sampling.solver == "heun")) + 1
  last = min(total, config.sampling.recompute or total)
  chunks = range(max(0, last - count), last)
  flops = (
    branches * passes * sum(plan_work.chunk_flops(config, i) for i in chunks)
  )
  return sampler.segment, arguments, held, (flops, shape[0], count * size)


def measure(job: Job) -> Figures:
  """Compiles a program and reads what it takes.

  Raises:
    UserError: what cannot be, see `Program.check`.
  """
  start = time.perf_counter()
  config = config_lib.from_json(job.config)
  name, _ = topologies.named(job.target)
  mesh = mesh_of(config, job.target)
  with topologies.lowering(name), warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always", UserWarning)
    program = Program(config, mesh)
    program.check()
    if job.what == ROLLOUT:
      function, arguments, held, work = rollout_segment(program)
      flops, videos, frames = work
      done = flops
    else:
      function, arguments, held = training_step(program, job.what, job.local)
      flops, done = plan_work.step_flops(config, job.what, job.local)
      videos, frames = config.data.batch_size, config.data.frames
    weights = plan_work.count(program.abstract_state().params)
    figures = Figures(job.what, weights, flops, done, held)
    figures.videos, figures.frames = videos, frames
    lowered = function.lower(*arguments)
    try:
      gpu = name != topologies.HOST and topologies.find(name).platform == "gpu"
      compiled = lowered.compile(_GPU_OPTIONS if gpu else None)
    except jax.errors.JaxRuntimeError as error:
      _too_much(figures, str(error))
      compiled = None
  if compiled is not None:
    _read(figures, compiled, config, name, mesh)
  notes = [str(w.message) for w in said if issubclass(w.category, UserWarning)]
  figures.notes = list(dict.fromkeys(notes))
  figures.compile_seconds = time.perf_counter() - start
  return figures


def _too_much(figures: Figures, words: str) -> None:
  """Takes what a TPU's compiler says it would have needed.

  Raises:
    RuntimeError: it says something else.
  """
  first = words.strip().partition("\n")[0]
  needs = re.search(r"(?:Used|\() ?([\d.]+)([KMGT])\b", first)
  if "RESOURCE_EXHAUSTED" not in first or not needs:
    raise RuntimeError(words)
  total = int(float(needs[1]) * 1024 ** (1 + "KMGT".index(needs[2])))
  held = sum(figures.memory.values())
  figures.memory["activations and temporaries"] = max(0, total - held)
  figures.memory["in all"] = max(total, held)
  figures.refused = first[:300]


def _read(figures, compiled, config, name: str, mesh: Mesh) -> None:
  figures.memory = memory(compiled.memory_analysis(), figures.memory)
  said = compiled.cost_analysis() or {}
  if "flops" in said:
    figures.xla_flops = int(said["flops"]) * mesh.size
  reading = hlo.read(compiled.as_text(), on_chip=name.startswith("v"))
  figures.compiled_flops = reading.flops * mesh.size
  figures.traffic = reading.traffic
  figures.unknown_loops = reading.unknown_loops
  figures.kernels = reading.kernels
  figures.collectives = exchanges(reading.collectives, mesh)
  chip = chips.find(name)
  if chip is not None:
    work = max(figures.done, figures.compiled_flops)
    hosts = [device.process_index for device in mesh.devices.flat]
    figures.seconds = {
      "compute": work / (mesh.size * chip.peak[config.model.dtype]),
      "memory": reading.traffic / chip.bandwidth,
      "links": chips.exchange(chip, reading.collectives, hosts),
    }


def exchanges(
  collectives: Sequence[hlo.Collective], mesh: Mesh
) -> list[Exchange]:
  """Collectives, summed by kind and by the axes that their groups lie along."""
  found: dict[tuple[str, tuple[str, ...]], np.ndarray] = {}
  for c in collectives:
    key = c.kind, _axes(c, mesh)
    row = c.times * np.array([1, c.bytes, c.sent])
    found[key] = found.get(key, 0) + row
  return [Exchange(*key, *map(int, found[key])) for key in sorted(found)]


def _axes(collective: hlo.Collective, mesh: Mesh) -> tuple[str, ...]:
  """Axes along which devices of a group lie apart."""
  group = collective.group or tuple(range(mesh.size))
  places = np.stack(np.unravel_index(group, mesh.devices.shape), -1)
  if collective.kind == "collective-permute":
    apart = (places[::2] != places[1::2]).any(0)
  else:
    apart = (places != places[0]).any(0)
  return tuple(np.array(mesh.axis_names)[apart].tolist())


def memory(stats: Any, held: dict[str, int]) -> dict[str, int]:
  """Bytes of a device by part, and "in all".

  Args:
    stats: a compiled program's `memory_analysis()`.
    held: what is known of its arguments.
  """
  left = stats.argument_size_in_bytes - sum(held.values())
  parts = held | {
    # Devices store arrays in tiles.
    "scalars and padding": left,
    "activations and temporaries": stats.temp_size_in_bytes,
    "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
    "program": stats.generated_code_size_in_bytes,
  }
  return parts | {"in all": sum(parts.values())}


def _send(pipe: Any, job: Job, trace: bool) -> None:
  try:
    pipe.send(measure(job))
  except Exception as error:
    known = isinstance(error, UserError)
    if trace and not known:
      traceback.print_exc()
    pipe.send(
      error if known else RuntimeError(f"{type(error).__name__}: {error}")
    )


def apart(
  job: Job,
  until: float | None = None,
  tick: Callable[[], Any] = lambda: None,
  trace: bool = True,
) -> Figures:
  """`measure` in a process of its own, which takes what it leaves with it.

  Args:
    job: what to compile.
    until: when to give up, by `time.monotonic()`.
    tick: called every second.
    trace: print where an error that nobody expects comes from.

  Raises:
    TimeoutError: it took too long.
    RuntimeError: it does not compile, or the compiler died.
    UserError: as `measure`.
  """
  spawn = multiprocessing.get_context("spawn")
  mine, theirs = spawn.Pipe(duplex=False)
  process = spawn.Process(target=_send, args=(theirs, job, trace), daemon=True)
  process.start()
  theirs.close()
  found = None
  try:
    while not mine.poll(1.0):
      tick()
      if until is not None and time.monotonic() > until:
        raise TimeoutError("no time left")
    found = mine.recv()
  except EOFError as error:
    raise RuntimeError("the compiler died; see what it said above") from error
  finally:
    if found is None:
      process.kill()
    process.join()
  if isinstance(found, Exception):
    raise found
  return found
