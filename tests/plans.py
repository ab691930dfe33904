"""A tiny run, planned: programs are compiled here, each once."""

import dataclasses
import functools
import json
from unittest import mock

import programs

from avd_jax import config as base
from avd_jax.aot import plan_compile, plan_search, planner
from avd_jax.aot.plan_compile import Figures, Job
from avd_jax.cli.main import main

CPU = "cpu:8"
memory_of = plan_compile.memory
STATS = {}  # what compiled programs said of their memory, by stage


def tiny(**mesh):
  config = base.load(programs.TINY, [])
  config.unlock()
  config.mesh.update(data=-1, fsdp=1) if not mesh else config.mesh.update(mesh)
  return config


@functools.cache
def measured(job_text):
  job = Job(*json.loads(job_text))

  def memory(stats, held):
    STATS[job.what] = stats
    return memory_of(stats, held)

  with mock.patch.object(plan_compile, "memory", memory):
    return plan_compile.measure(job)


def here(job, until=None, tick=lambda: None):
  """Compiles in this process, each program once."""
  return measured(json.dumps([job.config, job.target, job.what, job.local]))


@functools.cache
def planned(stage="teacher_forcing"):
  return planner.plan(tiny(data=2, fsdp=4), CPU, stage, 2**40, here)


@functools.cache
def _cuts(stage):
  return plan_search.candidates(tiny(), CPU, stage)


def cuts(stage):
  return [dataclasses.replace(candidate) for candidate in _cuts(stage)]


def figures_of(job, needed, seconds):
  return Figures(
    job.what, 1, 1, 1, {"in all": needed}, seconds={"compute": seconds}
  )


def avd(monkeypatch, *arguments, config=programs.TINY, apart=here):
  """`avd plan` in this process, compiling here; gives its exit code."""
  for name in (
    "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "JAX_ENABLE_COMPILATION_CACHE",
    "JAX_NUM_CPU_DEVICES",
  ):  # fmt: skip
    monkeypatch.setenv(name, "")
  monkeypatch.setattr(plan_compile, "apart", apart)
  try:
    return main(["plan", "--config", config, *arguments])
  except SystemExit as end:
    return end.code
