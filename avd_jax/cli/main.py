"""`avd`: one program, a subcommand for each job."""

import argparse
import importlib
import sys

from avd_jax.errors import UserError

COMMANDS = (
  "demo",
  "train",
  "bagger",
  "sample",
  "evaluate",
  "study",
  "inspect",
  "bench",
  "compile-check",
  "plan",
  "scaling",
  "encode",
  "import-wan",
  "export-wan",
  "make-tiny-wan",
)

DESCRIPTION = """\
Trains autoregressive video diffusion that does not drift; measures the drift.

  avd demo                                   the whole story in ten minutes
  avd train --config configs/worlds_tiny.py --workdir runs/x
  avd sample --workdir runs/x --out clip.mp4
  avd evaluate --workdir runs/x
  avd study strategies --workdir runs/studies
"""


def parser() -> argparse.ArgumentParser:
  """The command line of every subcommand."""
  top = argparse.ArgumentParser(
    prog="avd",
    description=DESCRIPTION,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = top.add_subparsers(dest="command", required=True, metavar="JOB")
  for name in COMMANDS:
    file = name.replace("-", "_")
    module = importlib.import_module(f"avd_jax.cli.{file}")
    sub = commands.add_parser(
      name,
      help=module.__doc__.splitlines()[0],
      description=module.__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(sub)
    sub.set_defaults(run=module.run)
  return top


def main(argv: list[str] | None = None) -> int:
  """Runs a subcommand; a user's mistake is one line and exit code 2."""
  arguments = parser()
  args, rest = arguments.parse_known_args(argv)
  stray = [a for a in rest if not a.startswith("--config.")]
  configured = hasattr(args, "config") or hasattr(args, "workdir")
  if stray or (rest and not configured):
    arguments.error(f"unrecognized arguments: {' '.join(stray or rest)}")
  try:
    args.overrides = rest
    args.argv = sys.argv[1:] if argv is None else argv
    args.run(args)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except OSError as error:
    if error.filename is None:
      raise
    # A full disk, a file where a directory should be, no permission.
    print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("stopped", file=sys.stderr)
    return 130
  return 0


if __name__ == "__main__":
  sys.exit(main())
