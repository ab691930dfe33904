"""Contenders timed in turn, so that a shared machine is unfair to none.

A time alone says little where others work too: contenders run one after the
other, round after round in one process, and ratios are medians over rounds.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from tqdm import tqdm

Call = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)


def run(
  contenders: Mapping[Name, Call], rounds: int, progress: bool = True
) -> dict[Name, list[float]]:
  """Seconds of every contender in every round.

  Args:
    contenders: calls that return what to wait for; each runs twice before the
      first round, to compile and to warm up.
    rounds: of every contender in turn.
    progress: show bars.
  """
  times: dict[Name, list[float]] = {name: [] for name in contenders}
  with tqdm(
    desc="compile", total=len(contenders), disable=not progress, leave=False
  ) as bar:
    for call in contenders.values():
      jax.block_until_ready(call())
      jax.block_until_ready(call())  # the first after a compile is no measure
      bar.update()
  with tqdm(
    desc="rounds", total=rounds, disable=not progress, leave=False
  ) as bar:
    for _ in range(rounds):
      for name, call in contenders.items():
        start = time.perf_counter()
        jax.block_until_ready(call())
        times[name].append(time.perf_counter() - start)
      bar.update()
  return times


def median(values: Sequence[float]) -> float:
  """The middle value."""
  return float(statistics.median(values))


def ratio(times: Mapping[Name, Sequence[float]], a: Name, b: Name) -> float:
  """How many times b's time a takes: the median of the rounds' ratios."""
  return median([x / y for x, y in zip(times[a], times[b], strict=True)])
