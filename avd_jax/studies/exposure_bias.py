"""The demo: does a model that trains on its own history drift less?

A teacher-forcing warm-up, then from that one checkpoint two continuations of
equal optimizer steps, teacher forcing and resampling forcing; both are rolled
out from the same real first frames to many times the training length, and
measured against the truth. Every part resumes where it was stopped.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from avd_jax import config as config_lib
from avd_jax import disk, sampling
from avd_jax.errors import UserError
from avd_jax.evaluation import drift, report
from avd_jax.studies import rollouts
from avd_jax.training import loop

WARMUP = "warmup"
METHODS = ("teacher_forcing", "resampling_forcing")


class Clock:
  """Seconds by part, kept across interruptions in workdir/timings.json."""

  def __init__(self, workdir: Path):
    self._path = workdir / "timings.json"
    known = self._path.exists()
    self.seconds: dict[str, float] = disk.read_json(self._path) if known else {}

  @contextmanager
  def part(self, name: str) -> Iterator[None]:
    """Adds the time spent inside to `name`."""
    start = time.perf_counter()
    try:
      yield
    finally:
      spent = time.perf_counter() - start
      self.seconds[name] = self.seconds.get(name, 0.0) + spent
      self._path.parent.mkdir(parents=True, exist_ok=True)
      disk.write_json(self._path, self.seconds)


def branch(
  config: ConfigDict, stage: str, seed: int, init_from: str = ""
) -> ConfigDict:
  """The config of one part: one stage, from one checkpoint."""
  part = config_lib.from_json(config_lib.to_json(config))
  part.stages, part.init_from, part.seed = (stage,), init_from, seed
  part.data.seed = seed
  return part


def run(
  config: ConfigDict, workdir: str | Path, mesh: Mesh, seeds: int, command: str
) -> dict[str, drift.Summary]:
  """Trains, rolls out, measures, and writes the report.

  Args:
    config: has the stages warmup, teacher_forcing and resampling_forcing.
    workdir: seed_<i>/<part> hold the runs; the report lies on top.
    mesh: what to run on.
    seeds: independent repetitions, from config.seed on.
    command: shown in the report.

  Returns:
    The summary of each method, aggregated over seeds.

  Raises:
    UserError: a stage is missing, or the continuations differ in steps.
    loop.Interrupted: after a signal, once everything is saved.
  """
  workdir = Path(workdir)
  missing = [s for s in (WARMUP, *METHODS) if s not in config.stage]
  if missing:
    raise UserError(f"the config has no stage {', '.join(missing)}")
  steps = {name: config.stage[name].steps for name in METHODS}
  if len(set(steps.values())) > 1:
    raise UserError(f"the continuations must take equal steps, not {steps}")
  clock = Clock(workdir)
  prompts = rollouts.held_out(config)
  metrics: dict[str, list[drift.FrameMetrics]] = {m: [] for m in METHODS}
  videos: dict[str, np.ndarray] = {"ground_truth": prompts.truth.x}
  for seed in range(config.seed, config.seed + seeds):
    place = workdir / f"seed_{seed}"
    with clock.part(WARMUP):
      loop.train(branch(config, WARMUP, seed), place / WARMUP, mesh)
    for method in METHODS:
      with clock.part(method):
        part = branch(config, method, seed, str(place / WARMUP))
        loop.train(part, place / method, mesh)
    for method in METHODS:
      with clock.part("rollouts"):
        sampler = sampling.load(place / method)
        video = rollouts.roll_out(sampler, prompts, method)
      videos.setdefault(method, video)  # the first seed is shown
      with clock.part("measuring"):
        metrics[method].append(rollouts.measure(video, prompts))
  summaries = {
    method: drift.aggregate(
      [rollouts.summarize(m, prompts) for m in metrics[method]]
    )
    for method in METHODS
  }
  report.write_report(
    workdir,
    summaries,
    {method: drift.curves(metrics[method]) for method in METHODS},
    videos,
    given=prompts.given,
    train_frames=config.data.frames,
    config=config_lib.to_json(config),
    timings=clock.seconds,
    command=command,
  )
  return summaries
