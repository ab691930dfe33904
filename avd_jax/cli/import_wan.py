"""Import Wan2.1's weights into a checkpoint.

  avd import-wan --source Wan2.1-T2V-1.3B --out runs/wan
  avd import-wan --source self_forcing_dmd.pt --out runs/forced
  avd import-wan --source Wan2.1-T2V-1.3B --out runs/forced --component vae

Reads text-to-video models of any size: the original repository's directory,
diffusers' (with a transformers text encoder), or a single file, .safetensors,
.pth or .pt (Self Forcing's too). What is there of transformer, VAE, text
encoder and tokenizer is imported, tensor by tensor, in the type it has.

Then train with --config.init_from=runs/wan, or sample from runs/wan.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--source", required=True, help="directory or file")
  parser.add_argument("--out", required=True, help="checkpoint to make")
  parser.add_argument(
    "--component",
    choices=("dit", "vae", "text"),
    help="only this one (default: all that --source holds)",
  )


def run(args: argparse.Namespace) -> None:
  import resource
  import sys
  import time

  from avd_jax.cli import devices
  from avd_jax.wan import importing

  begun = time.perf_counter()
  devices.start()
  importing.run(args.source, args.out, args.component, print)
  seconds = time.perf_counter() - begun
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  peak *= 1 if sys.platform == "darwin" else 1024
  print(
    f"wrote {args.out} in {seconds:.1f} s, peak {peak / 1e9:.2f} GB of memory"
  )
