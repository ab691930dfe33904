"""Run BAgger: train on rollouts that are reversed in time.

  avd bagger --config configs/worlds_bagger.py --workdir runs/bagger
  avd bagger --config configs/worlds_bagger.py --workdir runs/bagger \\
      --config.bagger.rounds=5

Trains the stage `base`; then, in every round, rolls the newest weights out
from real first chunks, reverses what they made, adds it to workdir/store, and
trains the stage `round` on seed videos and all of the store. The workdir gets
base/, store/, round_1/train/, round_1/manifest.json and so on. Stopped in any
way, the same command goes on from there; more rounds may be asked for later.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--config", default="configs/worlds_bagger.py")
  parser.add_argument("--workdir", required=True, help="where the run lives")


def run(args: argparse.Namespace) -> None:
  from avd_jax import config as config_lib
  from avd_jax.bagger import rounds
  from avd_jax.cli import devices
  from avd_jax.training import loop

  config = config_lib.load(args.config, args.overrides)
  devices.start(several=True)
  devices.agree(config, args.workdir)
  try:
    trained = rounds.run(config, args.workdir, devices.mesh(config))
  except loop.Interrupted as stop:
    print(stop)
    raise KeyboardInterrupt from stop
  for number, workdir in enumerate(trained, 1):
    print(f"round {number}: {workdir}")
