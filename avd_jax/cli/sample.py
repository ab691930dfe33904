"""Sample a video: from text, from nothing, or from real frames.

  avd sample --workdir runs/x --out clip.mp4 --given 4 --frames 200
  avd sample --workdir ckpt --out a.mp4 --prompt "a boat" --prompt "a storm@5s"

--config.X=V: sampling.*, model.attention.*, mesh.tensor, mesh.context.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.usage = "avd sample --workdir RUN --out FILE [options]"
  add = parser.add_argument
  add("--workdir", required=True, help="a run, or an imported checkpoint")
  add(
    "--out",
    required=True,
    help=".mp4 (plays while it grows), .gif, .webp or .mkv",
  )
  add("--overwrite", action="store_true", help="--out may exist")
  add(
    "--prompt",
    action="append",
    metavar="TEXT[@5s]",
    help="from the first chunk that begins at 5s or later",
  )
  add(
    "--prompts", metavar="JSON", help='list of {"at": seconds, "prompt": ...}'
  )
  add("--negative-prompt", metavar="P", help="what guidance leads away from")
  add("--cut-prompts", action="store_true", help="those that are too long")
  add("--frames", type=int, help="length (default: training's)")
  add("--seconds", type=float, help="length")
  add("--height", type=int, help="of a frame (default: training's)")
  add("--width", type=int, help="of a frame (default: training's)")
  add("--given", type=int, help="first frames of --video, or of a held-out one")
  add("--video", metavar="FILE", help="video or image; its frames are given")
  add(
    "--fit",
    choices=("crop", "refuse"),
    default="crop",
    help="given frames of another shape (default: crop)",
  )
  add("--index", type=int, default=0, help="held-out video")
  add("--wan", metavar="CKPT", help="VAE and text encoder of a run on latents")
  add("--seed", type=int, default=0, help="of the noise")
  add("--steps", type=int, help="solver steps")
  add("--guidance", type=float, help="1 is no guidance")
  add("--fps", type=float, help="of the file (default: 12, Wan's 16)")
  add("--scale", type=int, help="pixels per pixel")


def run(args: argparse.Namespace) -> None:
  from tqdm import tqdm

  from avd_jax.cli import devices
  from avd_jax.sampling import generation

  request = _request(args)
  devices.start()
  plan = generation.plan(request)
  for note in plan.notes:
    print(note)
  mesh = devices.some(plan.config)
  written = 0
  # Not before there is something to show: what is wrong shows at once.
  with tqdm(desc="sample", total=plan.frames, unit="frame", delay=0.1) as bar:

    def show(count):
      nonlocal written
      written += count
      bar.update(count)

    try:
      pace = generation.run(plan, show, mesh, devices.memory())
    except KeyboardInterrupt:
      if written:
        bar.close()
        print(f"{args.out} has the first {written} frames")
      raise
  given = f", the first {len(plan.clip)} given" if len(plan.clip) else ""
  print(f"wrote {args.out}: {plan.frames} frames{given}")
  print(pace)


def _request(args):
  from avd_jax.errors import UserError
  from avd_jax.sampling import generation, prompts

  if args.prompt is not None and args.prompts is not None:
    raise UserError("--prompt and --prompts both say what to show: give one")
  if args.prompts is not None:
    said = prompts.read(args.prompts)
  else:
    said = prompts.parse(args.prompt or ())
  return generation.Request(
    workdir=args.workdir,
    out=args.out,
    overrides=args.overrides,
    prompts=said,
    negative=args.negative_prompt,
    file=args.video,
    **{
      name: getattr(args, name)
      for name in (
        *("frames", "seconds", "height", "width", "given", "index"),
        *("wan", "steps", "guidance", "fps", "scale", "seed"),
        *("overwrite", "cut_prompts", "fit"),
      )
    },
  )
