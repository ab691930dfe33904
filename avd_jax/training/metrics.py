"""Metrics to TensorBoard and to metrics.jsonl, fetched late.

Device scalars are only gathered here; they are read an interval later, when
the steps that made them are long done, so that logging never makes the host
wait for the device.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorboardX


class Writer:
  """Averages metrics over intervals and writes a row for each.

  Args:
    workdir: rows go to workdir/metrics.jsonl, events to workdir/tensorboard.
    every: steps in an interval.
    step: steps already taken; rows past it (of a run that was cut off before
      its next checkpoint) are removed.
    begun: what `flush` returned at that step.
  """

  def __init__(
    self,
    workdir: Path,
    every: int,
    step: int,
    begun: Sequence[dict[str, float]] = (),
  ):
    self._path = workdir / "metrics.jsonl"
    self._every = every
    self._gathered: list[dict[str, Any]] = [
      {name: np.float32(value) for name, value in row.items()} for row in begun
    ]
    self._due: tuple[int, str, list[dict[str, Any]], float] | None = None
    self._clock = (time.perf_counter(), step)
    self.latest: dict[str, float] = {}
    if self._path.exists():
      rows = self._path.read_text().splitlines()
      kept = [row for row in rows if json.loads(row)["step"] <= step]
      self._path.write_text("".join(row + "\n" for row in kept))
    self._board = tensorboardX.SummaryWriter(
      str(workdir / "tensorboard"), purge_step=step + 1
    )

  def push(self, step: int, stage: str, metrics: dict[str, Any]) -> None:
    """Hands over the metrics, device scalars, of a step just launched."""
    self._gathered.append(metrics)
    if step % self._every == 0:
      self._write()
      self._due = (step, stage, self._gathered, time.perf_counter())
      self._gathered = []

  def flush(self) -> list[dict[str, float]]:
    """Writes what is due; returns the metrics of the interval begun since.

    It waits for the device. A checkpoint keeps what it returns, so that a
    resumed run writes the rows of an uninterrupted one.
    """
    self._write()
    return [
      {name: float(value) for name, value in row.items()}
      for row in jax.device_get(self._gathered)
    ]

  def _write(self) -> None:
    if self._due is None:
      return
    # Its own time, not now: rows are written late, the last one at once.
    step, stage, gathered, now = self._due
    self._due = None
    values = jax.device_get(gathered)
    # A row may span two stages, and not all of them have the same metrics.
    names = dict.fromkeys(name for v in values for name in v)
    row: dict[str, Any] = {
      name: float(np.mean([v[name] for v in values if name in v]))
      for name in names
    }
    then, before = self._clock
    row["steps_per_second"] = (step - before) / max(now - then, 1e-9)
    self._clock = (now, step)
    self.latest = row
    for name, value in row.items():
      self._board.add_scalar(name, value, step)
    with self._path.open("a") as file:
      file.write(json.dumps({"step": step, "stage": stage} | row) + "\n")

  def close(self) -> None:
    """Writes what is due."""
    self._write()
    self._board.close()
