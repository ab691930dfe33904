"""Scaling on paper: planned steps on 8 to 4,096 devices.

  avd plan --config C --target v5p:4x4x4 --config.mesh.data=8 --json a.json
  avd scaling a.json b.json --out scaling.png

Reads what `avd plan --json` wrote, keeps each device's share of the batch, lets
the axis data grow, and prints and draws the share of a step's time that is left
for computing. The assumptions are printed below the tables.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "plans", nargs="+", metavar="PLAN", help="files of avd plan --json"
  )
  parser.add_argument(
    "--out", required=True, metavar="FILE", help="PNG to draw"
  )
  parser.add_argument(
    "--most",
    type=int,
    default=4096,
    metavar="N",
    help="devices to end with (default: 4096)",
  )


def run(args: argparse.Namespace) -> None:
  import shlex
  import textwrap
  from pathlib import Path

  from avd_jax.aot import scaling
  from avd_jax.cli import arguments
  from avd_jax.disk import read_json
  from avd_jax.errors import UserError
  from avd_jax.evaluation import cost_charts

  if not args.out.endswith(".png"):
    raise UserError(f"--out {args.out}: give a .png")
  arguments.check_file("--out", args.out)
  curves = {}
  for file in args.plans:
    plan = read_json(Path(file))
    try:
      points = scaling.curve(plan, most=args.most)
    except UserError as error:
      raise UserError(f"{file}: {error}") from None
    name = f"{Path(file).stem}: {plan['stage']} on {plan['target']}"
    curves[name] = points
  print(shlex.join(["avd", *args.argv]), end="\n\n")
  for name, points in curves.items():
    print(scaling.table(name, points), end="\n\n")
  for line in scaling.ASSUMPTIONS:
    print(textwrap.fill(line, 80, subsequent_indent="  "))
  cost_charts.weak_scaling(args.out, curves)
  print(f"wrote {args.out}")
