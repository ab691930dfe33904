"""Sample a video, from nothing or from real frames.

  avd sample --workdir runs/x --out clip.mp4
  avd sample --workdir runs/x --out clip.mp4 --frames 200 --given 4 --seed 7
  avd sample --workdir runs/x --out clip.gif --given 4 --video holiday.mp4

With --given K, the first K frames are real: of --video, or of a held-out video
of the run's own data. The suffix of --out picks the format: .mp4, .gif, .webp
or .mkv (lossless).

Fields that weights do not depend on may change: sampling.*, and what attention
sees, --config.model.attention.routing_top_k=5 for one.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--workdir", required=True, help="a trained run")
  parser.add_argument("--out", required=True, help="file to write")
  parser.add_argument("--frames", type=int, help="length (default: training's)")
  parser.add_argument("--given", type=int, default=0, help="real first frames")
  parser.add_argument("--video", help="file whose first frames are given")
  parser.add_argument("--index", type=int, default=0, help="held-out video")
  parser.add_argument("--prompt", help="caption (default: the given video's)")
  parser.add_argument("--seed", type=int, default=0, help="of the noise")
  parser.add_argument("--steps", type=int, help="solver steps")
  parser.add_argument("--guidance", type=float, help="1 is no guidance")
  parser.add_argument("--fps", type=float, default=12.0, help="of the file")
  parser.add_argument("--scale", type=int, help="pixels per pixel")


def run(args: argparse.Namespace) -> None:
  from tqdm import tqdm

  from avd_jax import sampling
  from avd_jax.cli import devices
  from avd_jax.data import video as video_lib
  from avd_jax.errors import UserError

  suffix = "." + args.out.rpartition(".")[2].lower()
  if suffix not in video_lib.WRITABLE:
    raise UserError(
      f"--out {args.out}: give one of {', '.join(video_lib.WRITABLE)}"
    )
  for name, least in (("frames", 1), ("given", 0), ("steps", 1), ("scale", 1)):
    value = getattr(args, name)
    if value is not None and value < least:
      raise UserError(f"--{name} {value}: at least {least}")
  if args.fps <= 0:
    raise UserError(f"--fps {args.fps}: must be positive")
  devices.start()
  sampler = sampling.load(args.workdir, args.overrides, args.frames or 0)
  config = sampler.config
  if args.steps is not None:
    config.sampling.steps = args.steps
  if args.guidance is not None:
    config.sampling.guidance = args.guidance
  if config.model.text == "none" and (args.prompt or args.guidance):
    raise UserError(
      f"{args.workdir} was trained without text (model.text 'none'): --prompt"
      " and --guidance have nothing to act on"
    )
  given, text = _condition(args, config)
  frames = args.frames or max(config.data.frames, 2 * args.given)
  total = frames - args.given
  # Not before there is something to show: what is wrong shows at once.
  with tqdm(desc="sample", total=total, unit="frame", delay=0.1) as bar:
    made = sampler.extend(given, text, frames, args.seed, bar.update)
  scale = args.scale or max(1, 256 // made.shape[3])
  try:
    video_lib.write_video(args.out, made[0], args.fps, scale)
  except OSError as error:
    raise UserError(f"--out {args.out}: {error.strerror}") from error
  print(f"wrote {args.out}: {frames} frames, the first {args.given} given")


def _condition(args, config):
  """The given frames [1 g h w c] and the text [1 m]."""
  import numpy as np

  from avd_jax import config as config_lib
  from avd_jax.data import captions, pipeline
  from avd_jax.data import video as video_lib
  from avd_jax.errors import UserError

  data = config_lib.typed(pipeline.DataConfig, config.data)
  given = np.zeros((1, 0, data.height, data.width, 3), np.float32)
  caption = args.prompt or ""
  if args.video:
    if not args.given:
      raise UserError("--video needs --given K: how many of its frames to use")
    clip = video_lib.read_clip(args.video, 0, args.given, data.stride)
    clip = video_lib.resize_crop(clip, data.height, data.width)
    given = video_lib.to_float(clip)[None]
  elif args.given:
    if args.given > data.frames:
      raise UserError(
        f"--given {args.given}: the run's clips have {data.frames} frames"
      )
    source = pipeline.make_source(data, "eval")
    if not 0 <= args.index < len(source):
      raise UserError(f"--index {args.index}: there are {len(source)} videos")
    record = source[args.index]
    given = record["video"][None, : args.given]
    caption = record["caption"] if args.prompt is None else caption
  return given, captions.encode_bytes(caption, data.text_length)[None]
