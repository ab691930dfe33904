"""Export a Wan2.1 checkpoint to the diffusers layout.

  avd export-wan --workdir runs/wan --out wan-diffusers
  avd export-wan --workdir runs/trained --out trained-diffusers --component dit

The way back from import-wan: transformer/, vae/, text_encoder/ and tokenizer/,
each as far as the checkpoint has it, for diffusers and transformers. Of a
trained run, its averaged weights. What was imported comes out bit by bit.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--workdir", required=True, help="an imported checkpoint or a trained run"
  )
  parser.add_argument("--out", required=True, help="directory to make")
  parser.add_argument(
    "--component",
    choices=("dit", "vae", "text"),
    help="only this one (default: all that --workdir holds)",
  )


def run(args: argparse.Namespace) -> None:
  from avd_jax.cli import devices
  from avd_jax.errors import UserError
  from avd_jax.wan import exporting

  if args.overrides:
    raise UserError(f"{args.overrides[0]}: an export changes nothing")
  devices.start()
  exporting.run(args.workdir, args.out, args.component, print)
  print(f"wrote {args.out}")
