"""What attention costs: every implementation, dense and routed, by length.

Each problem is a pass over whole videos (training: two streams, forward and
backward) or a chunk against a KV cache (decoding). Contenders are first held
to the reference on the same inputs, then timed in turn (`race`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avd_jax.errors import UserError
from avd_jax.ops import attention, kv_cache, masks, routing
from avd_jax.ops.masks import Sight
from avd_jax.ops.problem import Problem, describe
from avd_jax.studies import race, rivals

MODES = ("training", "decoding")
# Logits [q, k] up to which the masked reference races, and checks the others;
# larger problems are checked on a smaller one.
CHECKED = 2**24


@dataclasses.dataclass(frozen=True)
class Size:
  """The shape that all problems of a run share.

  Attributes:
    tokens: of a chunk.
    heads: attention heads.
    head_dim: dims of a head.
    batch: videos.
    dtype: of queries, keys and values.
  """

  tokens: int = 128
  heads: int = 2
  head_dim: int = 64
  batch: int = 1
  dtype: str = "float32"

  def __post_init__(self):
    for field in ("tokens", "heads", "head_dim", "batch"):
      if getattr(self, field) < 1:
        raise UserError(f"--{field.replace('_', '-')}: at least 1")
    if self.dtype not in ("float32", "bfloat16", "float16"):
      raise UserError(
        f"--dtype {self.dtype}: give float32, bfloat16 or float16"
      )


# Tokens of a chunk where slopes are measured on a CPU: as few as fill groups.
SLOPE_TOKENS = 512
# Wan2.1-1.3B's chunk of one latent frame at 480p, and what two cores can do.
SIZES = {
  "gpu": Size(1560, 12, 128, 1, "bfloat16"),
  "tpu": Size(1560, 12, 128, 1, "bfloat16"),
  "cpu": Size(),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """One problem of the benchmark.

  Attributes:
    mode: "training" or "decoding".
    chunks: of the video (training), or of history (decoding).
    top_k: chunks that routing chooses; None is dense.
    size: the shape.
  """

  mode: str
  chunks: int
  top_k: int | None
  size: Size

  def sight(self, index: jax.Array | None = None) -> Sight:
    """Which chunk sees which; of a decoding chunk `index`."""
    tokens = self.size.tokens
    if self.mode == "training":
      mask = masks.history_mask(2, None, 0)
      return masks.sight(mask, self.chunks, 2, tokens)
    layout = kv_cache.layout(self.chunks + 1, None, 0, keep_all=False)
    return layout.sight(
      jnp.int32(self.chunks) if index is None else index, tokens
    )

  def pairs(self) -> int:
    """Chunk pairs that must be computed."""
    most = self.chunks if self.top_k is None else self.top_k
    if self.mode == "decoding":
      return min(self.chunks, most) + 1
    return 2 * sum(min(i, most) + 1 for i in range(self.chunks))

  def flops(self) -> int:
    """Useful operations: forward, and backward 2.5 times that in training."""
    s = self.size
    forward = 4 * self.pairs() * s.tokens**2 * s.head_dim * s.heads * s.batch
    return int(forward * (3.5 if self.mode == "training" else 1))

  def ideal(self) -> float:
    """Needed work over that of dense attention: (k + 1) / (i + 1)."""
    return self.pairs() / dataclasses.replace(self, top_k=None).pairs()

  def arrays(self, seed: int = 0) -> tuple[jax.Array, ...]:
    """Random q, k, v and the gradient of out."""
    s, sight = self.size, self.sight(jnp.int32(0))
    rows, columns = sight.sees.shape
    keys = jax.random.split(jax.random.key(seed), 4)
    shape = lambda n: (s.batch, n * s.tokens, s.heads, s.head_dim)
    sizes = (rows, columns, columns, rows)
    return tuple(
      jax.random.normal(key, shape(n), s.dtype)
      for key, n in zip(keys, sizes, strict=True)
    )

  def problem(self, platform: str) -> Problem:
    """The problem as implementations see it."""
    q, k = (jax.eval_shape(self.arrays)[i] for i in range(2))
    return describe(platform, q, k, self.sight(jnp.int32(0)), self.top_k)


def ours(case: Case, name: str, platform: str) -> Callable[..., Any]:
  """The call of an implementation: `(q, k, v, do) -> outputs`."""

  def forward(q, k, v, index=None):
    sight = case.sight(index)
    rule = None
    if case.top_k is not None:
      keys = k[:, : sight.history * case.size.tokens]
      means = routing.descriptors(keys, case.size.tokens)
      rule = routing.Routing(case.top_k, means)
    return attention.attend(
      q, k, v, sight, routing=rule, implementation=name, place=platform
    )[0]

  if case.mode == "decoding":
    # The index is data, as in a rollout: one program for every chunk.
    return lambda q, k, v, do: forward(q, k, v, jnp.int32(case.chunks))

  def backward(q, k, v, do):
    out, pull = jax.vjp(forward, q, k, v)
    return out, *pull(do)

  return backward


def contenders(case: Case, platform: str) -> dict[str, rivals.Contender]:
  """Everything that can do a case on this platform, by name."""
  problem = case.problem(platform)
  found = {}
  for name, refusal in attention.refusals(problem).items():
    if refusal is None and (name != "reference" or _logits(case) <= CHECKED):
      found[name] = rivals.of_jax(ours(case, name, platform))
  if case.top_k is None and problem.platform == "gpu":
    # A sight that is numpy: theirs is compiled for one length.
    sight = jax.tree.map(np.asarray, dataclasses.asdict(case.sight()))
    found |= rivals.others(Sight(**sight), case.mode, case.size.tokens)
  return found


def check(case: Case, name: str, platform: str) -> float:
  """Largest error of a contender over the reference's largest value.

  On the case itself, or, where the reference would not fit, on fewer chunks
  (but more than routing chooses) of fewer tokens.

  Raises:
    UserError: it is not the same attention; nothing should be timed then.
  """
  case = _smaller(case)
  arrays = case.arrays()
  contender = contenders(case, platform)[name]
  found = contender.numpy(contender.prepare(*arrays)())
  exact = dataclasses.replace(case.size, dtype="float32")
  exact = dataclasses.replace(case, size=exact)
  truth = rivals.of_jax(ours(exact, "reference", platform))
  arrays = [z.astype(jnp.float32) for z in arrays]
  wanted = truth.numpy(truth.prepare(*arrays)())
  worst = max(
    float(np.abs(a - b).max() / np.abs(b).max())
    for a, b in zip(found, wanted, strict=True)
  )
  allowed = 1e-4 if case.size.dtype == "float32" else 3e-2
  if not worst <= allowed:
    raise UserError(
      f"{name} differs from the reference by {worst:.1e} (allowed"
      f" {allowed:.0e}) at {case}: it is not timed"
    )
  return worst


def _smaller(case: Case) -> Case:
  """The case, or one that the reference can do and that still routes."""
  fewest = min(case.chunks, (case.top_k or 1) + 3)
  while _logits(case) > CHECKED and case.chunks > fewest:
    case = dataclasses.replace(case, chunks=case.chunks - 1)
  while _logits(case) > CHECKED and case.size.tokens > 1:
    size = dataclasses.replace(case.size, tokens=case.size.tokens // 2)
    case = dataclasses.replace(case, size=size)
  return case


def _logits(case: Case) -> int:
  rows, columns = case.sight(jnp.int32(0)).sees.shape
  return rows * columns * case.size.tokens**2


def _memory(contender: rivals.Contender, arrays) -> float | None:
  """Temporary megabytes of a compiled call; None where nobody counts them."""
  if contender.lower is None:
    return None
  analysis = contender.lower(*arrays).memory_analysis()
  return None if analysis is None else analysis.temp_size_in_bytes / 1e6


def measure(
  platform: str,
  size: Size,
  chunks: Sequence[int] = (7, 21, 60),
  top_k: Sequence[int | None] = (1, 5, None),
  modes: Sequence[str] = MODES,
  rounds: int = 5,
  slope_tokens: int | None = None,
  progress: bool = True,
) -> dict[str, Any]:
  """Times every contender on every case.

  Args:
    platform: "cpu", "gpu" or "tpu": what this process computes on.
    size: the shape.
    chunks: lengths.
    top_k: chunks that routing chooses; None is dense ("all").
    modes: of MODES.
    rounds: of every contender in turn, within a length.
    slope_tokens: tokens of a chunk where slopes are measured; None is size's.
    progress: show bars.

  Returns:
    rows, one a contender and case: mode, chunks, top_k, implementation, chosen
    (whether "auto" picks it), error, ms, tflops (useful), memory_mb,
    over_dense (time over the fastest dense contender's), ideal, over_ideal;
    and slope_dense, slope_routed (queries choose evenly) and
    slope_routed_alike (all choose the same): what a chunk of history adds to
    the time of decoding a chunk, in units of attention to the own chunk alone.

  Raises:
    UserError: a k that no case can have, no rounds, a contender that computes
      something else.
  """
  _check_arguments(chunks, top_k, rounds)
  rows: list[dict[str, Any]] = []
  for mode in modes:
    for n in chunks:
      cases = [Case(mode, n, k, size) for k in top_k if k is None or k < n]
      rows += _race(cases, platform, rounds, progress)
  out: dict[str, Any] = {"size": dataclasses.asdict(size), "rows": rows}
  size = dataclasses.replace(size, tokens=slope_tokens or size.tokens)
  return out | _slopes(platform, size, chunks, top_k, rounds, progress)


def _check_arguments(chunks, top_k, rounds):
  if rounds < 1 or min(chunks) < 1:
    raise UserError("--rounds and --chunks: at least 1")
  for k in top_k:
    if k is not None and not 1 <= k < max(chunks):
      raise UserError(
        f"--top-k {k}: give 1 to {max(chunks) - 1}, the most chunks of history"
        " that --chunks leaves, or all"
      )


def _race(cases, platform, rounds, progress):
  """Rows of some cases that share a length; dense ones among them or not."""
  dense = dataclasses.replace(cases[0], top_k=None)
  entries, rows = {}, {}
  for case in [dense, *(c for c in cases if c.top_k is not None)]:
    arrays = case.arrays()
    for name, contender in contenders(case, platform).items():
      key = (case.top_k, name)
      rows[key] = {
        "mode": case.mode,
        "chunks": case.chunks,
        "top_k": "all" if case.top_k is None else case.top_k,
        "implementation": name,
        "chosen": attention.choose(case.problem(platform)).name == name,
        "error": check(case, name, platform),
        "memory_mb": _memory(contender, arrays),
        "ideal": case.ideal(),
        "flops": case.flops(),
      }
      entries[key] = contender.prepare(*arrays)
  times = race.run(entries, rounds, progress)
  best = min(
    (k for k in times if k[0] is None), key=lambda k: race.median(times[k])
  )
  for key, row in rows.items():
    seconds = race.median(times[key])
    row["ms"] = 1e3 * seconds
    row["tflops"] = row.pop("flops") / seconds / 1e12
    row["over_dense"] = race.ratio(times, key, best)
    row["over_ideal"] = row["over_dense"] / row["ideal"]
  wanted = {case.top_k for case in cases}
  return [row for key, row in rows.items() if key[0] in wanted]


def _slopes(platform, size, chunks, top_k, rounds, progress):
  """How the time of decoding a chunk grows with its history."""
  routed = [k for k in top_k if k is not None]
  lengths = sorted(set(chunks))
  if len(lengths) < 2:
    return {}
  entries = {("own", 0): _decoder(Case("decoding", 0, None, size), platform)}
  for n in lengths:
    entries["dense", n] = _decoder(Case("decoding", n, None, size), platform)
    if routed and n > max(routed):
      case = Case("decoding", n, max(routed), size)
      entries["routed", n] = _decoder(case, platform)
      entries["routed_alike", n] = _decoder(case, platform, alike=True)
  times = race.run(entries, rounds, progress)
  one = race.median(times["own", 0])
  out: dict[str, Any] = {"slope_tokens": size.tokens}
  for kind in ("dense", "routed", "routed_alike"):
    points = [
      (n, race.median(t) / one) for (k, n), t in times.items() if k == kind
    ]
    if len(points) > 1:
      out[f"slope_{kind}"] = float(np.polyfit(*zip(*points, strict=True), 1)[0])
      out[f"curve_{kind}"] = points
  return out


def _decoder(case: Case, platform: str, alike: bool = False) -> race.Call:
  """A call of what "auto" picks, jitted, with its arrays.

  Random queries choose evenly, the worst case for groups. `alike` gives all
  queries and keys a direction in common, which chunks have in different
  amounts: then all choose the same ones.
  """
  q, k, v, do = case.arrays()
  if alike:
    chunks = k.shape[1] // case.size.tokens
    amounts = np.random.default_rng(0).permutation(chunks) / chunks
    amounts = np.repeat(amounts, case.size.tokens)[None, :, None, None]
    q, k = q + 4, (k + 4 * amounts).astype(k.dtype)
  return rivals.of_jax(ours(case, "auto", platform)).prepare(q, k, v, do)


def explain(
  platform: str,
  size: Size,
  chunks: Sequence[int],
  top_k: Sequence[int | None],
  modes: Sequence[str] = MODES,
) -> str:
  """Which implementation each case would get, and why, line by line.

  Raises:
    UserError: a k that no case can have.
  """
  _check_arguments(chunks, top_k, 1)
  lines = []
  for mode in modes:
    for n in chunks:
      for k in top_k:
        if k is not None and k >= n:
          continue
        case = Case(mode, n, k, size)
        name = "dense" if k is None else f"top {k}"
        lines.append(f"{mode}, {n} chunks of {size.tokens} tokens, {name}")
        lines += [
          f"  {who:<10} {verdict}"
          for who, verdict in attention.explain(case.problem(platform))
        ]
  return "\n".join(lines)


COLUMNS = (
  ("mode", "{:<9}", ""),
  ("chunks", "{:>6}", ""),
  ("top_k", "{:>5}", ""),
  ("implementation", "{:<15}", ""),
  ("ms", "{:>10.2f}", ""),
  ("tflops", "{:>8.4g}", "useful TFLOP/s"),
  ("memory_mb", "{:>10.1f}", "temporary memory of the compiled call"),
  ("over_dense", "{:>10.3f}", "time over the fastest dense contender's"),
  ("ideal", "{:>7.3f}", "(k + 1) / (i + 1): the work needed over dense's"),
  ("over_ideal", "{:>10.2f}", "over_dense / ideal"),
  ("error", "{:>9.1e}", "against the reference, over its largest value"),
)


def table(numbers: dict[str, Any]) -> str:
  """Rows as text; * marks what "auto" picks."""

  def cell(row, name, form):
    value = row[name]
    blank = form.split(".")[0].rstrip("f}") + "}"
    if value is None:
      return blank.format("-")
    if name == "implementation" and row["chosen"]:
      value += " *"
    return form.format(value)

  width = lambda form: form.split(".")[0].rstrip("}").replace("{:", "")
  head = "  ".join(f"{name:{width(form)}}" for name, form, _ in COLUMNS)
  lines = [head] + [
    "  ".join(cell(row, name, form) for name, form, _ in COLUMNS)
    for row in numbers["rows"]
  ]
  lines += ["", *(f"{n}: {why}" for n, _, why in COLUMNS if why)]
  for kind in ("dense", "routed", "routed_alike"):
    if f"slope_{kind}" in numbers:
      lines.append(
        f"slope_{kind} {numbers[f'slope_{kind}']:.3f}: what a chunk of history"
        f" adds to decoding a chunk of {numbers['slope_tokens']} tokens, in"
        " units of attention to the own chunk alone"
      )
  return "\n".join(lines)
