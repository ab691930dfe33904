"""Does everything still compile for the accelerators, in registers and memory?

Every attention kernel and one layer of Wan2.1-1.3B at its full size, forward
and backward, are compiled for targets that are not there, and what the
compiler says is held against what it said when it was last looked at: a GPU
kernel must not spill registers, and no program may need more temporary memory
than is on record. Nothing runs, so this says nothing about speed or numbers.
"""

import dataclasses
import functools
import importlib.metadata
import json
import multiprocessing
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from avd_jax.aot import cubin, topologies
from avd_jax.aot.cubin import Kernel
from avd_jax.errors import UserError
from avd_jax.models import denoiser as denoiser_lib
from avd_jax.models.attention import AttentionConfig
from avd_jax.models.dit_config import DiTConfig
from avd_jax.ops import attention, masks
from avd_jax.ops import routing as routing_lib
from avd_jax.typing import History

DEFAULT = ("h100", "v5e", "v5p", "v6e")
MIB = 2**20

# Wan2.1-1.3B at 480 x 832: latents of 60 x 104, chunks of 3 latent frames.
HEIGHT, WIDTH, TEXT = 60, 104, 512
LAYER = DiTConfig(num_layers=1, dtype="bfloat16")
TOKENS = LAYER.chunk_frames * (HEIGHT // 2) * (WIDTH // 2)
SHORT, LONG = 7, 21  # chunks: 5 s and 15 s
TOP_K = 5

# Temporary memory in MiB that the versions below needed: the most of them for
# GPUs, and of the first alone on TPUs, where whole layers have since come down
# to 7,100 to 7,800 (their bounds stay until the newer version was measured).
RECORDED = "2026-11-22, jax 0.10.2 and 0.12.0.1"
SLACK = 1.1
BOUNDS: dict[str, dict[str, float]] = {
  "attention cudnn, 7 chunks": {"h100": 1755, "h200": 1755},
  "attention triton, 7 chunks": {"h100": 6, "h200": 6},
  "attention triton, 5 routed of 21 chunks": {"h100": 2532, "h200": 2532},
  "attention splash, 7 chunks": {"v5e": 1920, "v5p": 1920, "v6e": 1920},
  "attention tpu, 5 routed of 7 chunks": {
    "v5e": 2651,
    "v5p": 2413,
    "v6e": 2914,
  },
  "layer, 7 chunks": {
    "h100": 9909,
    "h200": 9909,
    "v5e": 10525,
    "v5p": 10689,
    "v6e": 10429,
  },
  "decoding layer, 21 chunks": {
    "h100": 135,
    "h200": 135,
    "v5e": 337,
    "v5p": 464,
    "v6e": 350,
  },
  "layer, 5 routed of 7 chunks": {
    "h100": 8603,
    "h200": 8603,
    "v5e": 10127,
    "v5p": 10124,
    "v6e": 9842,
  },
  "decoding layer, 5 routed of 21 chunks": {
    "h100": 135,
    "h200": 135,
    "v5e": 1431,
    "v5p": 1143,
    "v6e": 1190,
  },
}


@dataclasses.dataclass(frozen=True)
class Check:
  """A program to compile.

  Attributes:
    what: its name.
    platforms: those that have it.
    build: `(platform, array) -> (function, arguments)`, where `array(shape,
      dtype)` is an argument on the device compiled for.
  """

  what: str
  platforms: tuple[str, ...]
  build: Callable[..., tuple[Callable[..., Any], tuple[Any, ...]]]


@dataclasses.dataclass
class Result:
  """What became of a check.

  Attributes:
    target: compiled for.
    what: the check.
    seconds: that XLA took.
    temp: bytes of temporary memory.
    bound: the most that it may be; None where none is on record.
    kernels: our own GPU kernels in it.
    failures: why this is not good, a line each.
  """

  target: str
  what: str
  seconds: float = 0.0
  temp: int = 0
  bound: int | None = None
  kernels: list[Kernel] = dataclasses.field(default_factory=list)
  failures: list[str] = dataclasses.field(default_factory=list)


def judge(result: Result) -> list[str]:
  """What is wrong with a compiled program; nothing, one hopes."""
  wrong = [
    f"kernel {kernel.name} spills: {kernel.stack} bytes a thread"
    for kernel in result.kernels
    if kernel.stack
  ]
  if result.bound is None:
    wrong.append(
      f"no bound on record; it needs {result.temp / MIB:.0f} MiB (BOUNDS in"
      " avd_jax/aot/compile_check.py)"
    )
  elif result.temp > result.bound:
    wrong.append(
      f"needs {result.temp / MIB:.0f} MiB of temporary memory, more than"
      f" {result.bound / MIB:.0f} MiB ({RECORDED}, and {SLACK - 1:.0%})"
    )
  return wrong


def bound(target: str, what: str) -> int | None:
  """Bytes of temporary memory that a check may need, slack included."""
  mib = BOUNDS.get(what, {}).get(target)
  return None if mib is None else int(mib * SLACK * MIB)


def _pass(platform, array, implementation: str, chunks: int, top_k=None):
  """Attention of a training pass over two streams, and its gradient."""
  sight = masks.sight(masks.HistoryNoisy(), chunks, 2, TOKENS)
  shape = (1, 2 * chunks * TOKENS, LAYER.num_heads, LAYER.head_dim)
  one = array(shape, LAYER.dtype)

  def attend(q, k, v):
    routing = None
    if top_k is not None:
      described = routing_lib.descriptors(k[:, : chunks * TOKENS], TOKENS)
      routing = routing_lib.Routing(top_k, described)
    out, _ = attention.attend(
      q,
      k,
      v,
      sight,
      routing=routing,
      implementation=implementation,
      place=platform,
    )
    return out

  def both(q, k, v, dout):
    out, back = jax.vjp(attend, q, k, v)
    return out, back(dout)

  return both, (one,) * 4


def _model(platform, array, top_k):
  see = AttentionConfig(routing_top_k=top_k)
  cfg = dataclasses.replace(LAYER, attention=see)
  frames = lambda chunks: array(
    (1, chunks * cfg.chunk_frames, HEIGHT, WIDTH, cfg.channels), "float32"
  )
  text = array((1, TEXT, cfg.text_dim), cfg.dtype)
  params = denoiser_lib.abstract_params(cfg, frames(1), text)
  params = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), params)
  return denoiser_lib.make(cfg, platform), params, frames, text


def _layer(platform, array, chunks: int, top_k=None):
  """One layer with embeddings and head, over two streams: its gradient."""
  denoiser, params, frames, text = _model(platform, array, top_k)
  x, t = frames(chunks), array((1, chunks), "float32")

  def loss(params, x, t, text, history):
    v = denoiser.parallel(params, x, t, text, history)
    return jnp.mean(jnp.square(v))

  return jax.value_and_grad(loss), (params, x, t, text, History(x, t))


def _decode(platform, array, chunks: int, top_k=None):
  """One layer, one chunk against a cache of `chunks`."""
  denoiser, params, frames, text = _model(platform, array, top_k)
  cache = jax.eval_shape(lambda: denoiser.init_cache(frames(1), chunks))
  cache = jax.tree.map(lambda leaf: array(leaf.shape, leaf.dtype), cache)
  t, chunk = array((1,), "float32"), array((), "int32")
  return denoiser.cached, (params, frames(1), t, text, cache, chunk)


def _every() -> Iterator[Check]:
  part = functools.partial
  gpu, tpu = ("gpu",), ("tpu",)
  for name, platforms, chunks, top_k in (
    ("cudnn", gpu, SHORT, None),
    ("triton", gpu, SHORT, None),
    ("triton", gpu, LONG, TOP_K),
    ("splash", tpu, SHORT, None),
    ("tpu", tpu, SHORT, TOP_K),
  ):
    routed = "" if top_k is None else f" {top_k} routed of"
    yield Check(
      f"attention {name},{routed} {chunks} chunks",
      platforms,
      part(_pass, implementation=name, chunks=chunks, top_k=top_k),
    )
  for top_k in (None, TOP_K):
    routed = "" if top_k is None else f" {top_k} routed of"
    for name, build, chunks in (
      ("layer", _layer, SHORT),
      ("decoding layer", _decode, LONG),
    ):
      yield Check(
        f"{name},{routed} {chunks} chunks",
        gpu + tpu,
        part(build, chunks=chunks, top_k=top_k),
      )


CHECKS = tuple(_every())


def select(targets: Sequence[str], only: str = "") -> list[tuple[str, Check]]:
  """The checks of some targets whose name has `only` in it.

  Raises:
    UserError: an unknown target, one without compiler, or nothing to do.
  """
  kinds = {name: topologies.require(name).platform for name in targets}
  chosen = [
    (name, check)
    for name in kinds
    for check in CHECKS
    if kinds[name] in check.platforms and only in check.what
  ]
  if not chosen:
    names = sorted({c.what for c in CHECKS})
    raise UserError(
      f"no check of {', '.join(targets)} has {only!r} in its name; there are:"
      f" {'; '.join(names)}"
    )
  return chosen


def lower(target: str, check: Check, device: Any = None) -> Any:
  """A check, lowered for a device of a target, or for the target at large."""
  sharding = None if device is None else SingleDeviceSharding(device)
  array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
  platform = topologies.find(target).platform
  with topologies.lowering(target):
    function, arguments = check.build(platform, array)
    traced = jax.jit(function).trace(*arguments)
    language = {"gpu": "cuda", "tpu": "tpu"}[platform]
    return traced.lower(lowering_platforms=(language,))


def run(target: str, check: Check) -> Result:
  """Compiles a check for a target and judges it."""
  result = Result(target, check.what, bound=bound(target, check.what))
  lowered = lower(target, check, topologies.devices(target)[0])
  written: set[str] = set()
  with tempfile.TemporaryDirectory() as folder:
    cubins, options = Path(folder) / "kernels", {}
    if topologies.find(target).platform == "gpu":
      options[cubin.OPTION] = str(cubins)
      written = kernel_names(lowered.as_text())
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    result.seconds = time.perf_counter() - start
    if written:
      kernels = cubin.read(cubins.read_bytes())
      result.kernels = [k for k in kernels if _base(k.name) in written]
  result.temp = compiled.memory_analysis().temp_size_in_bytes
  found = {_base(kernel.name) for kernel in result.kernels}
  result.failures = judge(result) + [
    f"kernel {name}: XLA left no binary to look at"
    for name in sorted(written - found)
  ]
  return result


def apart(function: Callable[..., Any], *args: Any) -> Any:
  """Calls a function in a process of its own.

  Raises:
    RuntimeError: the process died. Compilers abort where they find themselves
      in the wrong, and would take the other checks with them.
  """
  spawn = multiprocessing.get_context("spawn")
  with futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
    try:
      return pool.submit(function, *args).result()
    except BrokenProcessPool as error:
      raise RuntimeError("the compiler died; see what it said above") from error


def kernel_names(lowered: str) -> set[str]:
  """Names of the Triton kernels in a lowered program; XLA adds its own."""
  calls = re.finditer(r"@__gpu\$xla\.gpu\.triton\(.*", lowered)
  names = (re.search(r'\bname = "([^"]+)"', call[0]) for call in calls)
  return {_base(name[1]) for name in names if name}


def _base(name: str) -> str:
  """A kernel's name without the number that tells its namesakes apart."""
  return re.sub(r"_\d+$", "", name)


HEADER = (
  f"{'target':<7} {'program':<41} {'compile s':>9} {'MiB':>7} {'bound':>7}"
)


def lines(result: Result) -> list[str]:
  """A result as rows of the table whose head is HEADER."""
  most = "-" if result.bound is None else f"{result.bound / MIB:.0f}"
  row = (
    f"{result.target:<7} {result.what:<41} {result.seconds:9.1f}"
    f" {result.temp / MIB:7.0f} {most:>7}"
  )
  kernels = [
    f"{'':<7}   {kernel.name:<24} {kernel.registers:>3} registers,"
    f" {kernel.stack} B spilled, {kernel.shared / 1024:.0f} KiB shared"
    for kernel in result.kernels
  ]
  failures = [f"{'':<7} FAILED: {failure}" for failure in result.failures]
  return [row, *kernels, *failures]


def record(results: Sequence[Result]) -> dict[str, Any]:
  """Results, and what made them, for a JSON file."""
  versions = {}
  for package in ("jax", "jaxlib", "libtpu"):
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  rows = [
    dataclasses.asdict(result)
    | {"kernels": [kernel._asdict() for kernel in result.kernels]}
    for result in results
  ]
  return {"versions": versions, "recorded": RECORDED, "results": rows}


def report(
  chosen: Sequence[tuple[str, Check]], file: str | None = None
) -> bool:
  """Compiles checks one by one and prints what came of it; is all well?

  Args:
    chosen: what `select` gives.
    file: where to write `record` to.
  """
  results = []
  # A bar on terminals only; rows appear anywhere, as soon as they are known.
  with tqdm(total=len(chosen), disable=None) as bar:
    bar.write(HEADER)
    for target, check in chosen:
      bar.set_description(f"{target}: {check.what}")
      try:
        result = apart(run, target, check)
      except Exception as error:  # whatever it is, the next may compile
        traceback.print_exc()
        first = str(error).strip().partition("\n")[0]
        failure = f"{type(error).__name__}: {first[:200]}"
        result = Result(target, check.what, failures=[failure])
      results.append(result)
      bar.write("\n".join(lines(result)))
      sys.stdout.flush()
      bar.update()
  failed = [result for result in results if result.failures]
  print(f"{len(results) - len(failed)} good, {len(failed)} failed")
  if file:
    Path(file).write_text(json.dumps(record(results), indent=2) + "\n")
  return not failed
