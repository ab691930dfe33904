"""Compile check: kernels and layers, for GPUs and TPUs.

  avd compile-check                            all, as `make compile-check` does
  avd compile-check --target h100 v5e --only layer --json check.json

Needs no accelerator, and touches none: compilers come with the extras
compile-check-gpu (jax's CUDA plugin) and compile-check-tpu (libtpu). Exit code
1: something does not compile, a GPU kernel spills registers, or a program
needs more temporary memory than is on record.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--target",
    nargs="+",
    metavar="NAME",
    help="h100, h200, v5e, v5p, v6e (default: all but h200)",
  )
  parser.add_argument(
    "--only", default="", metavar="TEXT", help="checks with TEXT in their name"
  )
  parser.add_argument("--json", help="file to write the figures to")


def run(args: argparse.Namespace) -> None:
  import os
  import sys

  # Before jax looks for devices: this process compiles, on the CPU.
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["CUDA_VISIBLE_DEVICES"] = ""
  # A program from the cache was not compiled.
  os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
  from avd_jax.aot import compile_check

  chosen = compile_check.select(args.target or compile_check.DEFAULT, args.only)
  if not compile_check.report(chosen, args.json):
    sys.exit(1)
