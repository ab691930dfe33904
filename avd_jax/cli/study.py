"""Run a study: train, roll out and compare.

  avd study strategies --workdir runs/studies
  avd study strategies --workdir runs/studies --seeds 0 2 --rows resampling
  avd study strategies --workdir runs/studies --report --out docs/evidence

A study is a file of configs/studies/, or any other path that ends in .py. It
leaves NAME.md, NAME.json and charts in workdir/NAME, and trainings that other
studies may share in workdir/runs. Any field may change for all branches:
--config.evaluation.videos=16, --config.stage.BRANCH.steps=50. Ctrl-C saves and
stops; the same command goes on. Processes with other --seeds may run beside it.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("study", metavar="NAME", help="of configs/studies/")
  parser.add_argument("--workdir", required=True, help="of all studies")
  parser.add_argument("--seeds", type=int, nargs="+", help="some of the seeds")
  parser.add_argument("--rows", nargs="+", default=[], help="some of the rows")
  parser.add_argument(
    "--report", action="store_true", help="only report what was measured"
  )
  parser.add_argument("--out", default="", help="directory for a second copy")


def run(args: argparse.Namespace) -> None:
  import shlex

  from avd_jax.cli import devices
  from avd_jax.errors import UserError
  from avd_jax.studies import study, study_report, study_run
  from avd_jax.studies.study_files import Files
  from avd_jax.training import loop

  name, what = study.load(args.study, args.overrides)
  seeds = list(range(what.seeds)) if args.seeds is None else args.seeds
  if min(seeds) < 0:
    raise UserError(f"--seeds {min(seeds)}: at least 0")
  files = Files(Path(args.workdir), name)
  if not args.report:
    devices.start()
    # Without what was picked: the same command makes the whole study.
    command = ["avd", "study", args.study, "--workdir", public(args.workdir)]
    about = {
      "command": shlex.join([*command, *args.overrides]),
      "device": devices.describe(),
    }
    print(f"{args.study} on {about['device']}")
    try:
      study_run.run(
        what,
        files,
        devices.mesh(what.config),
        seeds=seeds,
        labels=args.rows,
        about=about,
      )
    except loop.Interrupted as stop:
      print(stop)
      raise KeyboardInterrupt from stop
  path = study_report.write(what, files, args.out)
  print(path.read_text())
  print(f"wrote {path}")


def public(workdir: str) -> str:
  """A directory as evidence names it: nothing of this machine."""
  path = Path(workdir)
  if not path.is_absolute():
    return workdir
  here = Path.cwd()
  return str(path.relative_to(here) if path.is_relative_to(here) else path.name)
