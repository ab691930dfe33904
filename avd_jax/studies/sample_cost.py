"""What making a video costs, part by part, by how long its history is.

The sampler that users call goes on from 1, 5, 20 chunks of history under dense,
windowed and routed attention; on latents umT5 and the VAE race along. A window
or a top-k that no history exceeds does what dense attention does. Whatever
implementation of attention the run names, "auto" is timed: some do one kind.

All lengths are continued in videos of the same length, so a kind of attention
has one program, and a cache with room for the longest. Given chunks are noise
and text is zeros: no time depends on them but that of routing, which is less
where queries choose alike.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from avd_jax import config as config_lib
from avd_jax import sampling
from avd_jax.errors import UserError
from avd_jax.models import vae
from avd_jax.sampling import Sampler, spaces
from avd_jax.sampling.spaces import Space
from avd_jax.studies import race
from avd_jax.wan import importing, prompting

Calls = dict[Any, Callable[[], Any]]

PROMPT = "A small red boat crosses a calm lake"
# What the benchmark itself sets.
OWN = {
  "model.attention.window": "give --window",
  "model.attention.sink": "windows are raced without sinks",
  "model.attention.routing_top_k": "give --top-k",
  "model.attention.implementation": "each kind is timed with auto",
  "sampling.segment": "chunks are timed one by one",
  "mesh.context": "one device is timed",
  "mesh.tensor": "one device is timed",
}


def kinds(window: int, top_k: int) -> dict[str, dict[str, int]]:
  """Ways of attending to history, as settings of model.attention."""
  return {
    "dense": {},
    f"window {window}": dict(window=window),
    f"routed, top {top_k}": dict(routing_top_k=top_k),
  }


def measure(
  workdir: str | Path,
  overrides: Sequence[str] = (),
  histories: Sequence[int] = (1, 5, 20),
  rounds: int = 5,
  window: int = 5,
  top_k: int = 5,
  height: int | None = None,
  width: int | None = None,
  wan: str | None = None,
  progress: bool = True,
) -> dict[str, Any]:
  """Times a chunk and the way to the first one, kind by kind, interleaved.

  All models are in memory at once, umT5 too, and one KV cache.

  Args:
    workdir: a trained run, or an imported checkpoint.
    overrides: `--config.field=value` arguments; see `sampling.load`.
    histories: chunks before the one that is made, from short to long.
    rounds: of every contender in turn.
    window: chunks of history in a window's sight.
    top_k: chunks that a routed query chooses.
    height: of a frame in pixels; None is the run's own.
    width: the same.
    wan: imported checkpoint whose VAE and text encoder a run on latents uses.
    progress: show bars.

  Returns:
    "rows": for each history and each of `kinds`, "chunk_ms" (a chunk against a
    full cache) and "first_ms" (the cache filled with given chunks, and a
    chunk); "chunk_over_dense" and "first_over_dense", medians of ratios within
    a round. On latents "parts" are milliseconds: "text" of a prompt, "encode"
    of a given chunk after the first and "decode" of a made one; and a row has
    "chunk_shares" of text, vae and dit in a chunk of a long video, and
    "first_shares" in the first: all prompts that guidance needs are embedded,
    given chunks encoded, and decoded too, since the decoder is causal.
    Besides: what was asked for.

  Raises:
    UserError: before anything is computed, for what cannot be measured.
  """
  _check(overrides, histories, rounds, window, top_k)
  config = sampling.read_config(workdir, overrides)
  space = spaces.of(config, workdir, wan)
  size = space.size(height, width)
  samplers = {
    name: _sampler(config, attention)
    for name, attention in kinds(window, top_k).items()
  }
  for sampler in samplers.values():
    sampler.room(max(histories), max(histories) + 1)
  if on_latents := isinstance(space, spaces.Wan):
    text = spaces.companion(workdir, wan, "text")
    prompting.check(text, [PROMPT], config.data.text_length)

  params = sampling.load(workdir, overrides).params
  samplers = {
    name: dataclasses.replace(sampler, params=params)
    for name, sampler in samplers.items()
  }
  calls = videos(samplers, space.grid(*size), histories)
  if on_latents:
    beside = spaces.companion(workdir, wan, "vae")
    calls["text"] = _embedding(text, config.data.text_length)
    calls["encode"] = _encoding(beside, size, config.model.chunk_frames)
    calls["decode"] = _decoding(space, size, config)
  times = race.run(calls, rounds, progress)

  options = config.sampling
  numbers = dict(
    steps=options.steps,
    solver=options.solver,
    guidance=options.guidance,
    height=size[0],
    width=size[1],
    chunk_frames=config.model.chunk_frames,
    rounds=rounds,
    rows=[_row(times, name, n) for n in histories for name in samplers],
  )
  if on_latents:
    parts = ("text", "encode", "decode")
    numbers["parts"] = {name: 1e3 * race.median(times[name]) for name in parts}
    prompts = 2 if _guided(config) else 1
    for row in numbers["rows"]:
      row |= _row_shares(times, row["attention"], row["history"], prompts)
  return numbers


def _check(
  overrides: Sequence[str],
  histories: Sequence[int],
  rounds: int,
  window: int,
  top_k: int,
) -> None:
  given = list(histories)
  if not given or min(given) < 1 or given != sorted(set(given)):
    raise UserError(
      f"--histories {' '.join(map(str, given))}: give numbers of chunks, 1 and"
      " more, each once, from small to large"
    )
  for name, value in (
    ("rounds", rounds),
    ("window", window),
    ("top-k", top_k),
  ):
    if value < 1:
      raise UserError(f"--{name} {value}: at least 1")
  for override in overrides:
    field = override.removeprefix("--config.").partition("=")[0]
    if field in OWN:
      raise UserError(f"--config.{field}: bench sample sets it: {OWN[field]}")


def _guided(config: ConfigDict) -> bool:
  return config.sampling.guidance != 1.0 and config.model.text != "none"


def _sampler(config: ConfigDict, attention: Mapping[str, int]) -> Sampler:
  """A kind's, without weights yet."""
  own = config_lib.from_json(config_lib.to_json(config))
  own.model.attention.update(
    window=None, sink=0, routing_top_k=None, implementation="auto"
  )
  own.model.attention.update(attention)
  own.sampling.segment = 1
  text = _text(Sampler(own, None))
  return Sampler(own, None, null_text=text[0] if _guided(own) else None)


def _text(sampler: Sampler) -> np.ndarray:
  like = sampler.model.text_struct(1, sampler.config.data.text_length)
  return np.zeros(like.shape, like.dtype)


def videos(
  samplers: Mapping[str, Sampler],
  grid: tuple[int, int],
  histories: Sequence[int],
) -> Calls:
  """Calls that make a chunk, by (sampler, history, "first" or "chunk").

  A "first" fills a cache; the "chunk" that comes next goes on from it.

  Args:
    samplers: by name; they make a chunk a segment.
    grid: height and width of a (latent) frame.
    histories: chunks before the one that is made.
  """
  held = _Held()
  calls: Calls = {}
  for history in histories:
    for name, sampler in samplers.items():
      first, chunk = _video(sampler, grid, history, max(histories) + 1, held)
      calls[name, history, "first"] = first
      calls[name, history, "chunk"] = chunk
  return calls


@dataclasses.dataclass
class _Held:
  """The one cache that is alive, of whichever video is being made."""

  cache: Any = None


def _video(
  sampler: Sampler,
  grid: tuple[int, int],
  history: int,
  total: int,
  held: _Held,
) -> tuple[Callable[[], Any], Callable[[], Any]]:
  """(from given chunks to the first that is made, a chunk with its cache)."""
  size = sampler.model.chunk_frames
  shape = (1, size, *grid, sampler.model.channels)
  rng = np.random.default_rng(0)
  given = rng.normal(size=(1, history * size, *shape[2:])).astype(np.float32)
  text, null = _text(sampler), sampler.null_text
  place = (jnp.int32(history), jnp.int32(history))
  rest = (jax.random.key(0), place, shape, 1)
  known = (None if null is None else jnp.asarray(null), None)

  def first():
    held.cache = None  # where one fits, two may not
    made, held.cache = next(sampler.segments(given, text, total * size))
    return made

  def chunk():
    # The same place again: its slot is written over, all others stay.
    made, held.cache = sampler.segment(
      sampler.params, jnp.asarray(text), held.cache, *rest, *known
    )
    return made

  return first, chunk


def _embedding(checkpoint: str | Path, length: int) -> Callable[[], Any]:
  """A prompt to its embedding."""
  encoder = prompting.TextEncoder(checkpoint, length)
  return lambda: encoder(PROMPT)


def _encoding(
  checkpoint: str | Path, size: tuple[int, int], latents: int
) -> Callable[[], Any]:
  """Frames of a chunk to its latents, one after another, as a stream."""
  cfg, params = importing.load_vae(checkpoint)
  params = {"encoder": params["encoder"]}
  step = jax.jit(
    vae.encode_step, static_argnames="cfg", donate_argnames="cache"
  )
  pixels = jnp.zeros((1, cfg.temporal_factor, *size, 3))
  cache = vae.encoder_cache(cfg, 1, *size)

  def encode():
    nonlocal cache
    made = []
    for _ in range(latents):
      one, cache = step(cfg, params, pixels, cache)
      made.append(one)
    return made

  return encode


def _decoding(
  space: Space, size: tuple[int, int], config: ConfigDict
) -> Callable[[], Any]:
  """A chunk of latents to its frames, in the middle of a video."""
  decode = space.decode(*size)
  shape = (config.model.chunk_frames, *space.grid(*size))
  latents = jnp.zeros((1, *shape, config.model.channels))
  decode(latents)  # a video's first frame has a program of its own
  return lambda: decode(latents)


def _row(times: Mapping[Any, Any], name: str, history: int) -> dict[str, Any]:
  row: dict[str, Any] = {"history": history, "attention": name}
  for what in ("chunk", "first"):
    mine, dense = (name, history, what), ("dense", history, what)
    row[f"{what}_ms"] = 1e3 * race.median(times[mine])
    row[f"{what}_over_dense"] = race.ratio(times, mine, dense)
  return row


def _row_shares(
  times: Mapping[Any, Any], name: str, history: int, prompts: int
) -> dict[str, dict[str, float]]:
  of = lambda call: np.asarray(times[call])
  encoded, decoded = history * of("encode"), (history + 1) * of("decode")
  chunk = (0 * of("text"), of("decode"), of((name, history, "chunk")))
  first = (
    prompts * of("text"),
    encoded + decoded,
    of((name, history, "first")),
  )
  return {"chunk_shares": shares(*chunk), "first_shares": shares(*first)}


def shares(
  text: np.ndarray, vae: np.ndarray, dit: np.ndarray
) -> dict[str, float]:
  """Medians of parts' shares within rounds; they add up to 1.

  Args:
    text: seconds [rounds] of the text encoder.
    vae: of the VAE.
    dit: of the transformer.
  """
  parts = np.stack([text, vae, dit])
  middle = np.median(parts / parts.sum(0), axis=1)
  names = ("text", "vae", "dit")
  return dict(zip(names, map(float, middle / middle.sum()), strict=True))


def table(numbers: dict[str, Any]) -> str:
  """A line for each history and kind, and what the parts beside it take."""
  lines = [
    f"{'history':>7}  {'attention':<16}{'ms/chunk':>10}{'/dense':>8}"
    f"{'ms to first':>13}{'/dense':>8}"
  ]
  if "parts" in numbers:
    lines[0] += f"{'text, VAE, DiT: of it':>25}{'of a chunk':>16}"
  for row in numbers["rows"]:
    line = (
      f"{row['history']:>7}  {row['attention']:<16}{row['chunk_ms']:>10.1f}"
      f"{row['chunk_over_dense']:>7.2f}x{row['first_ms']:>13.1f}"
      f"{row['first_over_dense']:>7.2f}x"
    )
    if "parts" in numbers:
      of = lambda what, row=row: ", ".join(
        f"{100 * share:.0f}" for share in row[f"{what}_shares"].values()
      )
      line += f"{of('first') + ' %':>25}{of('chunk') + ' %':>16}"
    lines.append(line)
  lines += ["", "every kind with model.attention.implementation auto"]
  if "parts" in numbers:
    ms = {name: f"{value:.1f} ms" for name, value in numbers["parts"].items()}
    lines += [
      f"text encoder {ms['text']} a prompt; VAE {ms['encode']} to encode a"
      f" chunk, {ms['decode']} to decode one",
    ]
  return "\n".join(lines)


def draw(path: str | Path, numbers: dict[str, Any], where: str) -> None:
  """The chart of `measure`'s numbers."""
  from avd_jax.evaluation import cost_charts

  title = (
    f"Chunks of {numbers['chunk_frames']} x {numbers['height']} x"
    f" {numbers['width']}, {numbers['steps']} steps, {where}"
  )
  cost_charts.sampling(path, numbers["rows"], title)
