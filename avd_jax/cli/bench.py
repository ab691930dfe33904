"""Benchmarks: a training step, attention, a long rollout.

  avd bench step
  avd bench step --meshes --devices 8
  avd bench step --config configs/worlds_tiny.py --rounds 40 --json step.json
  avd bench attention --json attention.json
  avd bench attention --explain
  avd bench rollout --chunks 500 --plot rollout.png
  avd bench sample --workdir ckpt --histories 1 5 20 --config.sampling.steps=4

Contenders run in turn; ratios are medians over rounds.
"""

import argparse
from typing import Any

MEANINGS = {
  "rf_over_tf": "resampling-forcing step over teacher-forcing step",
  "rf_detached_over_tf": "the same, history from the rollout's own cache",
  "rollout_share": "share of a resampling step spent re-making the history",
  "tokens_per_second": "noisy tokens that teacher forcing trains a second",
  "mfu": "useful FLOP/s over a matrix product's, teacher forcing",
}


def _top_k(text: str) -> int | None:
  return None if text == "all" else int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
  step = kinds.add_parser("step", help="resampling against teacher forcing")
  step.add_argument("--config", default="configs/worlds_tiny.py")
  step.add_argument("--rounds", type=int, default=20)
  step.add_argument(
    "--meshes",
    action="store_true",
    help="each axis of the mesh against plain data parallelism",
  )
  step.add_argument(
    "--devices",
    type=int,
    metavar="N",
    help="this host's cores as N devices (default: the devices there are)",
  )
  step.add_argument("--json", help="file to write the numbers to")

  cost = kinds.add_parser("attention", help="every implementation, by length")
  cost.add_argument("--chunks", type=int, nargs="+", default=[7, 21, 60])
  cost.add_argument(
    "--top-k", type=_top_k, nargs="+", default=[1, 5, None], metavar="K|all"
  )
  cost.add_argument(
    "--mode", nargs="+", choices=("training", "decoding"), dest="modes"
  )
  for name in ("tokens", "heads", "head-dim", "batch"):
    cost.add_argument(f"--{name}", type=int, help="default: by platform")
  cost.add_argument("--dtype", help="default: by platform")
  cost.add_argument("--rounds", type=int, default=5)
  cost.add_argument("--json", help="file to write the numbers to")
  cost.add_argument(
    "--explain",
    action="store_true",
    help="only say which implementation would be chosen, and why",
  )
  cost.add_argument(
    "--platform",
    choices=("cpu", "gpu", "tpu"),
    help="with --explain: another than this machine's",
  )

  rollout = kinds.add_parser("rollout", help="hundreds of chunks: cost of each")
  rollout.add_argument("--chunks", type=int, default=500)
  rollout.add_argument("--json", help="file to write the numbers to")
  rollout.add_argument("--plot", help="PNG to draw")

  sample = kinds.add_parser("sample", help="what a video costs, part by part")
  add = sample.add_argument
  add("--workdir", required=True, help="a run, or an imported checkpoint")
  add("--wan", metavar="CKPT", help="VAE and text encoder of a run on latents")
  add(
    "--histories",
    type=int,
    nargs="+",
    default=[1, 5, 20],
    metavar="N",
    help="chunks of history (default: 1 5 20)",
  )
  add("--rounds", type=int, default=5)
  add("--window", type=int, default=5, help="chunks in a window's sight")
  add("--top-k", type=int, default=5, help="chunks that a query chooses")
  add("--height", type=int, help="of a frame (default: training's)")
  add("--width", type=int, help="of a frame (default: training's)")
  add("--json", help="file to write the numbers to")
  add("--plot", help="PNG to draw")


def run(args: argparse.Namespace) -> None:
  {
    "step": _step,
    "attention": _attention,
    "rollout": _rollout,
    "sample": _sample,
  }[args.what](args)


def _write(path: str | None, numbers: dict[str, Any]) -> None:
  import json
  from pathlib import Path

  if path:
    Path(path).write_text(json.dumps(numbers, indent=2) + "\n")


def _step(args: argparse.Namespace) -> None:
  import os

  from avd_jax.errors import UserError

  if args.devices is not None:
    if args.devices < 1:
      raise UserError(f"--devices {args.devices}: at least 1")
    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax looks for devices
    os.environ["JAX_NUM_CPU_DEVICES"] = str(args.devices)
  import jax

  from avd_jax import config as config_lib
  from avd_jax.cli import devices
  from avd_jax.studies import mesh_cost, step_cost

  config = config_lib.load(args.config, args.overrides)
  devices.start()
  if args.meshes:
    numbers = mesh_cost.measure(config, jax.devices(), args.rounds)
    numbers = {"device": devices.describe(), **numbers}
    print(numbers["device"])
    print(mesh_cost.table(numbers))
    _write(args.json, numbers)
    return
  numbers = step_cost.measure(config, devices.mesh(config), args.rounds)
  numbers = {"device": devices.describe(), **numbers}
  for name, value in numbers.items():
    shown = f"{value:.4g}" if isinstance(value, float) else value
    print(f"{name:<20} {shown:>10}  {MEANINGS.get(name, '')}")
  _write(args.json, numbers)


def _attention(args: argparse.Namespace) -> None:
  import dataclasses

  from avd_jax.cli import devices
  from avd_jax.errors import UserError
  from avd_jax.studies import attention_cost

  if args.platform and not args.explain:
    raise UserError("--platform needs --explain: timing runs where it runs")
  devices.start()
  platform = args.platform or devices.platform()
  given = {
    field: getattr(args, field)
    for field in ("tokens", "heads", "head_dim", "batch", "dtype")
    if getattr(args, field) is not None
  }
  size = dataclasses.replace(attention_cost.SIZES[platform], **given)
  modes = args.modes or attention_cost.MODES
  if args.explain:
    text = attention_cost.explain(
      platform, size, args.chunks, args.top_k, modes
    )
    print(text)
    return
  slopes = None
  if platform == "cpu" and args.tokens is None:
    slopes = attention_cost.SLOPE_TOKENS
  numbers = {"device": devices.describe()} | attention_cost.measure(
    platform, size, args.chunks, args.top_k, modes, args.rounds, slopes
  )
  print(attention_cost.table(numbers))
  _write(args.json, numbers)


def _rollout(args: argparse.Namespace) -> None:
  from avd_jax.cli import devices
  from avd_jax.studies import long_rollout

  devices.start()
  where = devices.describe()
  numbers = {"device": where} | long_rollout.measure(args.chunks)
  print(f"{'history':<20}{'ms/chunk':>10}{'last fifth over first':>24}")
  for kind, curve in numbers["kinds"].items():
    ms = sum(curve["ms"]) / len(curve["ms"])
    growth = curve["growth"]
    print(
      f"{kind:<20}{ms:>10.1f}{growth['time']:>12.2f}x time"
      f"{growth['memory']:>8.2f}x memory"
    )
  _write(args.json, numbers)
  if args.plot:
    long_rollout.draw(args.plot, numbers, where)
    print(f"wrote {args.plot}")


def _sample(args: argparse.Namespace) -> None:
  from avd_jax.cli import devices
  from avd_jax.studies import sample_cost

  devices.start()
  where = devices.describe()
  names = ("histories", "rounds", "window", "top_k", "height", "width", "wan")
  given = {name: getattr(args, name) for name in names}
  numbers = {"device": where} | sample_cost.measure(
    args.workdir, args.overrides, **given
  )
  print(where)
  print(sample_cost.table(numbers))
  _write(args.json, numbers)
  if args.plot:
    sample_cost.draw(args.plot, numbers, where)
    print(f"wrote {args.plot}")
