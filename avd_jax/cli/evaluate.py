"""Evaluate a trained run: roll out, measure the drift.

  avd evaluate --workdir runs/x
  avd evaluate --workdir runs/x --videos 16 --frames 200

Rolls out held-out videos to config.evaluation.frames and writes drift.json,
drift.png, comparison.mp4, comparison.gif and report.html to
workdir/evaluation. Worlds are compared with their known truth; real video
with its own first frames.

Fields that weights do not depend on may change: sampling.*, and what attention
sees, --config.model.attention.routing_top_k=5 for one. --config.mesh.tensor=2
(heads) and .context (tokens) use several devices.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--workdir", required=True, help="a trained run")
  parser.add_argument("--videos", type=int, help="how many to roll out")
  parser.add_argument("--frames", type=int, help="length of a rollout")
  parser.add_argument("--given", type=int, help="real first frames")
  parser.add_argument("--seed", type=int, help="of the held-out videos")
  parser.add_argument("--out", help="directory (default: workdir/evaluation)")


def run(args: argparse.Namespace) -> None:
  import dataclasses
  import json
  from pathlib import Path

  from avd_jax import config as config_lib
  from avd_jax import sampling
  from avd_jax.cli import devices
  from avd_jax.data import video as video_lib
  from avd_jax.evaluation import drift, report
  from avd_jax.studies import rollouts

  devices.start()
  config = sampling.read_config(args.workdir, args.overrides)
  for name in ("videos", "frames", "given", "seed"):
    value = getattr(args, name)
    if value is not None:
      config.evaluation[name] = value
  config_lib.check(config)
  prompts = rollouts.held_out(config)
  mesh, chunk = devices.some(config), config.model.chunk_frames
  lengths = config.evaluation.given // chunk, config.evaluation.frames // chunk
  _, room = sampling.Sampler(config, None).room(*lengths)
  grid = config.data.height, config.data.width
  count = len(prompts.truth.x)  # all of them are made at once
  sampling.check(config, grid, room, mesh, devices.memory(), count)
  sampler = sampling.load(args.workdir, args.overrides, mesh=mesh)
  sampler = dataclasses.replace(sampler, config=config)
  name = rollouts.label_of(args.workdir)
  video = rollouts.roll_out(sampler, prompts, name)
  metrics = rollouts.measure(video, prompts)
  summary = rollouts.summarize(metrics, prompts)
  out = Path(args.out or Path(args.workdir) / "evaluation")
  videos = {"ground truth": prompts.truth.x, name: video}
  if prompts.state is not None:
    report.write_report(
      out,
      {name: summary},
      {name: drift.curves([metrics])},
      videos,
      given=prompts.given,
      train_frames=config.data.frames,
      config=config_lib.to_json(config),
      command=f"avd evaluate --workdir {args.workdir}",
    )
    print(report.format_table({name: summary}))
  else:
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({name: summary}, indent=2)
    (out / "drift.json").write_text(text + "\n")
    film = report.comparison(videos, given=prompts.given)
    for suffix in (".mp4", ".gif"):
      video_lib.write_video(out / f"comparison{suffix}", film, fps=8)
    print(text)
  print(f"wrote {out}")
