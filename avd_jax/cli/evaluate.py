"""Evaluate a trained run: roll out from real first frames, measure the drift.

  avd evaluate --workdir runs/x
  avd evaluate --workdir runs/x --videos 16 --frames 200

Rolls out held-out videos to config.evaluation.frames and writes drift.json,
drift.png, comparison.mp4, comparison.gif and report.html to
workdir/evaluation. Worlds are compared with their known truth; real video
with its own first frames.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--workdir", required=True, help="a trained run")
  parser.add_argument("--videos", type=int, help="how many to roll out")
  parser.add_argument("--frames", type=int, help="length of a rollout")
  parser.add_argument("--given", type=int, help="real first frames")
  parser.add_argument("--seed", type=int, help="of the held-out videos")
  parser.add_argument("--out", help="directory (default: workdir/evaluation)")
