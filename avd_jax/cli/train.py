"""Train a model; resumes what the workdir holds.

  avd train --config configs/worlds_tiny.py --workdir runs/x
  avd train --config configs/video_tiny.py --config.data.path=my_videos \\
      --workdir runs/mine

Any field of the config can be changed with --config.field=value. The workdir
gets checkpoints/, config.json, metrics.jsonl and tensorboard/. Ctrl-C saves
and stops; the same command goes on from there.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--config", required=True, help="a file of configs/")
  parser.add_argument("--workdir", required=True, help="where the run lives")


def run(args: argparse.Namespace) -> None:
  from avd_jax import config as config_lib
  from avd_jax.cli import devices
  from avd_jax.training import loop

  config = config_lib.load(args.config, args.overrides)
  devices.start(several=True)
  devices.agree(config)
  try:
    loop.train(config, args.workdir, devices.mesh(config))
  except loop.Interrupted as stop:
    print(stop)
    raise KeyboardInterrupt from stop
