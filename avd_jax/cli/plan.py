"""Plan a run: compile it for devices that are not there.

  avd plan --config configs/worlds_tiny.py --target v5e:2x2
  avd plan --config C --target v5p:4x4x4 --json plan.json
  avd plan --config C --target h100:8 --stage warmup --config.mesh.fsdp=8
  avd plan --config C --target v6e:8x8 --search --minutes 60

The run's own training steps and the sampler's segment are compiled for a TPU
slice (libtpu: the extra compile-check-tpu), for GPUs (jax's CUDA plugin: the
extra compile-check-gpu), or for so many devices of this host (cpu:8). Printed
are the memory of a device by part, FLOPs, what devices send each other, and,
from the chip's data sheet, the least time of a step and of the whole recipe.
Nothing runs; compiling large models takes minutes. Exit code 1: it does not
fit, or not all of it was compiled.

--search tries meshes, recomputing (model.remat) and optimizer.accumulation,
and says which arguments give the fastest that fits. Two thirds of --minutes go
to the step that computes most, the rest to the winner's other programs.
"""

import argparse

from avd_jax.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--config", required=True, help="a file of configs/")
  parser.add_argument(
    "--target",
    required=True,
    metavar="NAME:SIZE",
    help="v5e:16x16, v5p:4x4x4, v6e:8x8, h100:8, h200:1, cpu:8",
  )
  parser.add_argument(
    "--stage", metavar="NAME", help="only this stage, or rollout"
  )
  parser.add_argument(
    "--search", action="store_true", help="look for the best mesh"
  )
  parser.add_argument(
    "--minutes",
    type=arguments.positive_number,
    default=30.0,
    help="that a search may take (default: 30)",
  )
  parser.add_argument(
    "--hbm",
    type=arguments.positive_number,
    metavar="GIB",
    help="memory of a device (default: the chip's; of cpu: no limit)",
  )
  parser.add_argument("--json", metavar="FILE", help="file for the figures")


def run(args: argparse.Namespace) -> None:
  import os
  import sys

  # Before jax looks for devices: this process and its children compile, on the
  # CPU, and what comes from the cache was not compiled.
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["CUDA_VISIBLE_DEVICES"] = ""
  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
  name, _, size = args.target.partition(":")
  if name == "cpu" and size.isdigit():
    os.environ["JAX_NUM_CPU_DEVICES"] = size
  import shlex
  from pathlib import Path

  from avd_jax import config as config_lib
  from avd_jax import disk
  from avd_jax.aot import plan_report, plan_search, planner

  arguments.check_file("--json", args.json)
  config = config_lib.load(args.config, args.overrides)
  limit = planner.limit_of(args.target, args.hbm)
  command, tried = shlex.join(["avd", *args.argv]), []
  if args.search:
    plan, tried = plan_search.best(
      config, args.target, args.stage, limit, args.minutes
    )
  else:
    plan = planner.plan(config, args.target, args.stage, limit)
  print(command)
  if args.search:
    print(plan_report.ranking(tried, limit), end="\n\n")
  if plan is None:
    why = plan_report.nothing(tried, limit, args.minutes)
    print(why)
    if args.json:
      values = plan_report.nothing_record(tried, args.target, why, command)
      disk.write_json(Path(args.json), values)
    sys.exit(1)
  print(plan_report.table(plan))
  if args.search:
    stage = plan_search.heaviest_stage(config, args.stage)
    if found := plan_report.choice(plan, stage):
      print("\n".join(["", *found]))
  hints = plan_search.advice(plan) if plan.tight else []
  if plan.tight:
    print("\nit does not fit; by estimate these would:")
    print("\n".join(hints or ["nothing that was thought of"]))
  if args.json:
    values = plan_report.record(plan, tried, hints, command)
    disk.write_json(Path(args.json), values)
  if not plan.fits:
    sys.exit(1)
