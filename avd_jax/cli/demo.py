"""Run the demo: two ways of training, and how they drift.

  avd demo
  avd demo --workdir runs/demo3 --seeds 3

Trains a warm-up and two continuations of equal steps on procedural videos,
rolls both out to 8 times the training length, prints a table and writes
report.html, comparison.mp4, comparison.gif, drift.png and drift.json to the
workdir. Ctrl-C saves and stops; the same command goes on from there.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--config", default="configs/worlds_tiny.py")
  parser.add_argument("--workdir", default="runs/demo")
  parser.add_argument("--seeds", type=int, default=1, help="repetitions")


def run(args: argparse.Namespace) -> None:
  from pathlib import Path

  from avd_jax import config as config_lib
  from avd_jax.cli import devices
  from avd_jax.errors import UserError
  from avd_jax.evaluation import report
  from avd_jax.studies import exposure_bias
  from avd_jax.training import loop

  if args.seeds < 1:
    raise UserError(f"--seeds {args.seeds}: at least 1")
  config = config_lib.load(args.config, args.overrides)
  devices.start()
  mesh = devices.mesh(config)
  command = f"avd demo --config {args.config} --seeds {args.seeds}"
  command = " ".join([command, *args.overrides])
  print(f"{args.config} on {devices.describe()}")
  try:
    summaries = exposure_bias.run(
      config, args.workdir, mesh, args.seeds, command
    )
  except loop.Interrupted as stop:
    print(stop)
    raise KeyboardInterrupt from stop
  print(report.format_table(summaries))
  print(f"open {Path(args.workdir) / 'report.html'}")
