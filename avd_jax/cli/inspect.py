"""Inspect a trained run: which chunks its queries choose.

  avd inspect routing --workdir runs/x
  avd inspect routing --workdir runs/x --top_k 1 3 5 --descriptor rotated raw
  avd inspect routing --workdir runs/dense --apply

Rolls out held-out videos and counts, in every layer and head, how often each
chunk is chosen, and which share of dense attention the chosen chunks hold.
Writes routing.json and routing.png to workdir/routing. A run is sampled as it
was trained, a dense one dense: choices are then only looked at.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  integer: dict = dict(type=int, metavar="N")
  parser.add_argument("what", choices=("routing",))
  parser.add_argument("--workdir", required=True, help="a trained run")
  parser.add_argument(
    "--top_k",
    nargs="+",
    help="chunks to choose (default: 1 3 5 and the run's own)",
    **integer,
  )
  parser.add_argument(
    "--descriptor",
    nargs="+",
    metavar="NAME",
    help="what describes a chunk: rotated, raw (default: both)",
  )
  parser.add_argument(
    "--apply", action="store_true", help="attend to what is chosen"
  )
  parser.add_argument("--frames", help="length of a rollout", **integer)
  parser.add_argument("--videos", help="how many to roll out", **integer)
  parser.add_argument("--seed", default=0, help="of the noise", **integer)
  parser.add_argument("--out", help="directory (default: workdir/routing)")
  parser.add_argument("--json", help="numbers (default: OUT/routing.json)")


def run(args: argparse.Namespace) -> None:
  import json
  from pathlib import Path

  from avd_jax import config as config_lib
  from avd_jax import sampling
  from avd_jax.cli import devices
  from avd_jax.evaluation import routing_chart
  from avd_jax.models import attention
  from avd_jax.studies import rollouts, routing_choice

  devices.start()
  sampler = sampling.load(args.workdir, args.overrides)
  config = sampler.config
  for name in ("videos", "frames"):
    value = getattr(args, name)
    if value is not None:
      config.evaluation[name] = value
  config_lib.check(config)
  names = args.descriptor or attention.DESCRIPTORS
  frames = config.evaluation.frames
  chosen = routing_choice.checked(sampler, frames, args.top_k, names)
  prompts = rollouts.held_out(config)
  label = rollouts.label_of(args.workdir)
  numbers = {
    "command": _command(args),
    "run": label,
    **routing_choice.measure(
      sampler, prompts, *chosen, label, args.seed, args.apply
    ),
  }
  out = Path(args.out or Path(args.workdir) / "routing")
  file = Path(args.json or out / "routing.json")
  out.mkdir(parents=True, exist_ok=True)
  (out / "routing.png").write_bytes(routing_chart.draw(numbers))
  file.write_text(json.dumps(numbers) + "\n")
  print(routing_chart.format_table(numbers))
  print(f"wrote {out / 'routing.png'} and {file}")


def _command(args) -> str:
  """The command line that gives these numbers."""
  import shlex

  words = ["avd", "inspect", args.what]
  for name in (
    "workdir", "top_k", "descriptor", "frames", "videos", "seed", "out", "json"
  ):  # fmt: skip
    value = getattr(args, name)
    values = value if isinstance(value, list) else [value]
    if value is not None:
      words += [f"--{name}", *map(str, values)]
  words += ["--apply"] * args.apply + args.overrides
  return shlex.join(words)
