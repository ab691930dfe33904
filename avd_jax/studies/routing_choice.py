"""Which chunks of history queries choose, while a run's own weights roll out.

How often each chunk is chosen, in every layer and head, and which share of
dense attention the chosen chunks hold; `onlooker.py` does the counting.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from avd_jax import config as config_lib
from avd_jax import sampling
from avd_jax.errors import UserError
from avd_jax.models import attention
from avd_jax.ops import masks
from avd_jax.studies import onlooker
from avd_jax.studies.onlooker import Tally
from avd_jax.studies.rollouts import Prompts


def most(see: attention.AttentionConfig, chunks: int) -> int:
  """Chunks of history that the last of `chunks` chunks can choose from."""
  reach = chunks if see.window is None else see.window + see.sink
  return min(reach, chunks - 1)


def checked(
  sampler: sampling.Sampler,
  frames: int,
  top_k: Sequence[int] | None,
  descriptors: Sequence[str],
) -> tuple[tuple[int, ...], tuple[str, ...]]:
  """(top_k, descriptors), sorted and without doubles.

  Args:
    sampler: the run.
    frames: of a rollout.
    top_k: None takes 1, 3, 5 and the run's own, as far as they fit.
    descriptors: names; none takes the run's own.

  Raises:
    UserError: a number or a name that is not possible.
  """
  see = sampler.model.attention
  limit = most(see, frames // sampler.model.chunk_frames)
  if top_k is None:
    wanted = {1, 3, 5, see.routing_top_k or 1}
    top_k = [k for k in wanted if k <= limit]
  for k in top_k:
    if not 1 <= k <= limit:
      raise UserError(
        f"--top_k {k}: give 1 to {limit}, the chunks of history that the last"
        f" chunk of {frames} frames can choose from"
      )
  for name in descriptors:
    if name not in attention.DESCRIPTORS:
      raise UserError(
        f"--descriptor {name!r} is not one of"
        f" {', '.join(attention.DESCRIPTORS)}"
      )
  descriptors = tuple(dict.fromkeys(descriptors)) or (see.descriptor,)
  return tuple(sorted(set(top_k))), descriptors


def roll_out(
  sampler: sampling.Sampler,
  prompts: Prompts,
  top_k: tuple[int, ...],
  descriptors: tuple[str, ...],
  label: str,
  seed: int = 0,
) -> tuple[np.ndarray, Tally]:
  """Continues every prompt under the onlooker's eye, with a progress bar.

  Returns:
    (the video [b f h w c], the tally in numpy; of given chunks it has their
    clean pass only).

  Raises:
    UserError: frames that are not whole chunks.
  """
  truth = prompts.truth
  watch = onlooker.Watch(top_k, descriptors, len(truth.x))
  looking = dataclasses.replace(
    sampler, make=functools.partial(onlooker.watched, watch=watch)
  )
  given, total = prompts.given, truth.x.shape[1]
  parts, tally = [np.asarray(truth.x[:, :given])], None
  with tqdm(desc=label, total=total - given, unit="frame") as bar:
    for made, cache in looking.segments(
      truth.x[:, :given], truth.text, total, seed
    ):
      parts.append(made)
      tally = cache.tally
      bar.update(made.shape[1])
  chunks = total // sampler.model.chunk_frames
  tally = jax.tree.map(np.asarray, tally)
  # The last segment may have run past the end.
  tally = Tally(*(x[:, :chunks] for x in tally))
  cut = {
    name: getattr(tally, name)[..., :chunks] for name in ("chosen", "mass")
  }
  return np.concatenate(parts, 1), tally._replace(**cut)


def routed(
  sampler: sampling.Sampler, top_k: int, descriptor: str
) -> sampling.Sampler:
  """The same weights, attending to what they choose."""
  config = config_lib.from_json(config_lib.to_json(sampler.config))
  config.model.attention.update(routing_top_k=top_k, descriptor=descriptor)
  return dataclasses.replace(sampler, config=config)


def candidates(see: attention.AttentionConfig, chunks: int) -> np.ndarray:
  """Booleans [n n]: which chunk may choose which."""
  mask = masks.history_mask(1, see.window, see.sink)
  return masks.chunk_table(mask, chunks, 1) & ~np.eye(chunks, dtype=bool)


def _heads(x: np.ndarray) -> dict[str, Any]:
  """Numbers [l a ...]: each of them, and their mean over layers and heads."""
  plain = lambda y: (np.round(y, 6) + 0.0).tolist()  # no -0.0
  return {"mean": plain(x.mean((0, 1))), "layer_head": plain(x)}


def _in_sight(frequency: np.ndarray, may: np.ndarray) -> list[float | None]:
  """Means [j] of [l a j]; None for chunks that cannot be chosen."""
  means = np.round(frequency.mean((0, 1)), 6).tolist()
  return [mean if seen else None for mean, seen in zip(means, may, strict=True)]


def _against_peers(frequency, may, rows, even) -> float | None:
  """How much more often the first chunk is chosen than others as far away.

  Some distances are chosen more often than others whatever lies there, since
  rotary angles come round; a sink is what is left. Both in units of an even
  choice, since peers of a distance have more chunks beside them.
  """
  share = frequency.mean((1, 2)) / even[:, None]
  ours, theirs = [], []
  for chunk in rows:
    far = [c for c in rows if c > chunk and may[c, c - chunk]]
    if may[chunk, 0] and far:
      ours.append(share[chunk, 0])
      theirs.append(np.mean([share[c, c - chunk] for c in far]))
  total = float(np.sum(theirs))
  return round(float(np.sum(ours)) / total, 6) if total else None


def _by_distance(frequency, may, rows, top_k) -> dict[str, Any]:
  """How often chunks at a distance are chosen, and the first chunk, anywhere.

  Args:
    frequency: [n l a j].
    may: candidates [n j].
    rows: chunks to average over.
    top_k: for what choosing evenly would give.
  """
  even = np.minimum(top_k / np.maximum(may.sum(1), 1), 1)
  first = [c for c in rows if may[c, 0]]
  result: dict[str, Any] = {
    "chunks": rows,
    "distance": [],
    "even": [],
    "frequency": [],
    "first_chunk": None,
  }
  if first:
    result["first_chunk"] = {
      "even": round(float(even[first].mean()), 6),
      **_heads(frequency[first, :, :, 0].mean(0)),
      "against_peers": _against_peers(frequency, may, rows, even),
    }
  by_distance = []
  for distance in range(1, max(rows)):
    seen = [c for c in rows if c - distance > 0 and may[c, c - distance]]
    if not seen:
      continue
    result["distance"].append(distance)
    result["even"].append(round(float(even[seen].mean()), 6))
    by_distance.append(
      np.mean([frequency[c, :, :, c - distance] for c in seen], 0)
    )
  if by_distance:
    result["frequency"] = _heads(np.stack(by_distance, -1))
  return result


def _shares(mass, caught, best, may, top_k, row) -> dict[str, Any]:
  """Where the dense softmax of a chunk's queries falls.

  Own, chosen and dropped add up to 1. `recent` is what the k chunks just
  before would catch, `best` the k heaviest of each query.
  """
  own = mass[row, :, :, row]
  recent = mass[row][..., np.flatnonzero(may[row])[-top_k:]].sum(-1)
  return {
    "own": _heads(own),
    "chosen": _heads(caught[row]),
    "dropped": _heads(1 - own - caught[row]),
    "best": _heads(best[row]),
    "recent": _heads(recent),
  }


def numbers(
  tally: Tally,
  see: attention.AttentionConfig,
  given: int,
  top_k: Sequence[int],
  descriptors: Sequence[str],
) -> list[dict[str, Any]]:
  """What a tally says, for JSON and the chart.

  Args:
    tally: of a rollout.
    see: what the run's queries see.
    given: chunks that were given; those after them count.
    top_k: as watched.
    descriptors: as watched.

  Returns:
    An entry for each descriptor, top_k and pass: `frequency` with which the
    last chunk's queries choose each chunk of history (0 for those that are no
    candidates), `by_distance` the same over all made chunks that had a choice,
    `by_chunk` [made, history] the means of every made chunk (None for no
    candidates), `mass` the last chunk's shares of dense attention, and
    `mass_by_chunk` where it falls.
  """
  n = tally.queries.shape[1]
  may, entries = candidates(see, n), []
  for p, name in enumerate(onlooker.PASSES):
    # A given chunk has no solver's steps.
    queries = np.maximum(tally.queries[p], 1)
    per_query = lambda x, q=queries: x / q.reshape(-1, *(1,) * (x.ndim - 1))
    mass = per_query(tally.mass[p])
    for m, descriptor in enumerate(descriptors):
      for t, k in enumerate(top_k):
        frequency = per_query(tally.chosen[p, :, :, m, t])
        caught = per_query(tally.caught[p, :, :, m, t])
        best = per_query(tally.best[p, :, :, t])
        made = range(given, n)
        rows = [c for c in made if may[c].sum() > k] or list(made)
        last = n - 1
        entries.append(
          {
            "descriptor": descriptor,
            "top_k": k,
            "pass": name,
            "queries": int(tally.queries[p, last]),
            "chunk": last,
            "candidates": np.flatnonzero(may[last]).tolist(),
            "frequency": _heads(frequency[last, :, :, :last]),
            "by_distance": _by_distance(frequency, may, rows, k),
            "mass": _shares(mass, caught, best, may, k, last),
            "mass_by_chunk": _heads(mass[last]),
            "by_chunk": [_in_sight(frequency[c], may[c]) for c in made],
          }
        )
  return entries


def measure(
  sampler: sampling.Sampler,
  prompts: Prompts,
  top_k: tuple[int, ...],
  descriptors: tuple[str, ...],
  label: str,
  seed: int = 0,
  apply: bool = False,
) -> dict[str, Any]:
  """Rolls out and counts.

  Args:
    sampler: the run.
    prompts: held-out videos.
    top_k: chunks to choose, from `checked`.
    descriptors: from `checked`.
    label: on the bar.
    seed: of the noise.
    apply: attend to what is chosen: a rollout for each top_k and descriptor,
      looked at in its own choice. Else one rollout, as the run was trained.

  Returns:
    JSON: what was run, and `choices`, see `numbers`.

  Raises:
    UserError: frames that are not whole chunks.
  """
  see, size = sampler.model.attention, sampler.model.chunk_frames
  given = prompts.given // size
  if apply:
    entries = []
    for descriptor in descriptors:
      for k in top_k:
        one = ((k,), (descriptor,))
        name = f"{label}: {descriptor} top-{k}"
        _, tally = roll_out(
          routed(sampler, k, descriptor), prompts, *one, name, seed
        )
        entries += numbers(tally, see, given, *one)
  else:
    name = f"{label}: roll out"
    _, tally = roll_out(sampler, prompts, top_k, descriptors, name, seed)
    entries = numbers(tally, see, given, top_k, descriptors)
  options = sampler.config.sampling
  if apply:
    attended = "what is chosen, a rollout for each top_k and descriptor"
  elif see.routing_top_k is None:
    attended = "all in sight"
  else:
    attended = f"top-{see.routing_top_k} by {see.descriptor} descriptors"
  return {
    "attended": attended,
    "window": see.window,
    "sink": see.sink,
    "videos": len(prompts.truth.x),
    "chunks": prompts.truth.x.shape[1] // size,
    "chunk_frames": size,
    "given": given,
    "seed": seed,
    "sampling": {
      "solver": options.solver,
      "steps": options.steps,
      "shift": options.shift,
      "guidance": options.guidance,
    },
    "top_k": list(top_k),
    "descriptors": list(descriptors),
    "layers": sampler.model.num_layers,
    "heads": sampler.model.num_heads,
    "choices": entries,
  }
