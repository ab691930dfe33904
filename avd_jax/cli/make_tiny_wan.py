"""Make a tiny Wan2.1 with random weights.

  avd make-tiny-wan --out tiny
  avd make-tiny-wan --out tiny --layout diffusers --seed 7

To try the other jobs on: writes the files of the real thing, a few MB of them:
the original repository's, diffusers', or the one that Self Forcing saves (a
transformer only).
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--out", required=True, help="directory to make")
  parser.add_argument(
    "--layout",
    choices=("original", "diffusers", "self-forcing"),
    default="original",
    help="whose files (default: original)",
  )
  parser.add_argument("--seed", type=int, default=0, help="of the weights")


def run(args: argparse.Namespace) -> None:
  from avd_jax.wan import tiny

  tiny.run(args.out, args.layout, args.seed)
  print(f"wrote {args.out}, layout {args.layout}")
