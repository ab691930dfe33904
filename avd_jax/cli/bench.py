"""Benchmark: what a training step costs, method against method.

  avd bench step
  avd bench step --config configs/worlds_tiny.py --rounds 40 --json step.json

Contenders run in turn; ratios are medians over rounds. mfu is measured against
a matrix product timed in the same rounds.
"""

import argparse

MEANINGS = {
  "rf_over_tf": "resampling-forcing step over teacher-forcing step",
  "rf_detached_over_tf": "the same, history from the rollout's own cache",
  "rollout_share": "share of a resampling step spent re-making the history",
  "tokens_per_second": "noisy tokens that teacher forcing trains a second",
  "mfu": "useful FLOP/s over a matrix product's, teacher forcing",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("what", choices=("step",))
  parser.add_argument("--config", default="configs/worlds_tiny.py")
  parser.add_argument("--rounds", type=int, default=20)
  parser.add_argument("--json", help="file to write the numbers to")


def run(args: argparse.Namespace) -> None:
  import json
  from pathlib import Path

  from avd_jax import config as config_lib
  from avd_jax.cli import devices
  from avd_jax.studies import step_cost

  config = config_lib.load(args.config, args.overrides)
  devices.start()
  numbers = step_cost.measure(config, devices.mesh(config), args.rounds)
  numbers = {"device": devices.describe(), **numbers}
  for name, value in numbers.items():
    shown = f"{value:.4g}" if isinstance(value, float) else value
    print(f"{name:<20} {shown:>10}  {MEANINGS.get(name, '')}")
  if args.json:
    Path(args.json).write_text(json.dumps(numbers, indent=2) + "\n")
