"""Encode real videos into latents to train on.

  avd encode --videos clips --captions clips.json --checkpoint runs/wan \\
    --out shards
  avd encode ... --process-index 2 --process-count 8

Captions are a JSON object {"file name": "caption"} or a table with the columns
file and caption; without --captions, the .txt beside each video. Stopped, the
same command goes on after the last whole shard. Processes write a part of the
store each. Videos that cannot be read are skipped and listed.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--videos", required=True, metavar="DIR", help="folder of video files"
  )
  parser.add_argument("--captions", help=".json, .csv or .tsv", metavar="FILE")
  parser.add_argument(
    "--checkpoint", required=True, metavar="CKPT", help="what import-wan wrote"
  )
  parser.add_argument(
    "--out", required=True, help="store to make or go on with"
  )
  for name, default, what in (
    ("frames", 81, "of a clip: 1 + a multiple of 4"),
    ("height", 480, "of a clip, pixels: a multiple of 16"),
    ("width", 832, "of a clip, pixels: a multiple of 16"),
    ("clips-per-video", 1, "spread evenly over each video"),
    ("shard-size", 64, "clips of a shard"),
    ("process-index", 0, "this process, from 0"),
    ("process-count", 1, "processes that encode these videos"),
  ):
    what = f"{what} (default: {default})"
    parser.add_argument(
      f"--{name}", type=int, metavar="N", default=default, help=what
    )
  parser.add_argument(
    "--fps",
    type=float,
    metavar="F",
    default=16.0,
    help="every n-th frame, to come near it (default: 16)",
  )


def run(args: argparse.Namespace) -> None:
  import dataclasses

  from tqdm import tqdm

  from avd_jax.cli import devices
  from avd_jax.wan import encoding

  fields = dataclasses.fields(encoding.Options)
  options = encoding.Options(**{f.name: getattr(args, f.name) for f in fields})
  devices.start()
  encoder = encoding.Encoder(args.checkpoint)
  with tqdm(desc="encode", unit="clip", delay=0.1) as bar:

    def show(done, total):
      bar.total = total
      bar.update(done - bar.n)

    done = encoding.run(
      encoder, args.videos, args.captions, args.out, options, show
    )
  print(_summary(done, args.out, options.process_index))


def _summary(done, out, process):
  from avd_jax.data import latent_store

  folder = latent_store.part(out, process)
  line = f"wrote {folder}: {done.records} clips in {len(done.shards)} shards"
  skipped = [entry["file"] for entry in done.skipped]
  notes = (
    ("skipped", list(dict.fromkeys(skipped))),
    ("without a caption", done.uncaptioned),
    (
      "with a caption cut short",
      [f"{entry['file']}: {entry['tokens']} tokens" for entry in done.cut],
    ),
    (
      "that end early",
      [
        f"{entry['file']}: {entry['frames']} of {entry['promised']} frames"
        for entry in done.partial
      ],
    ),
  )
  for what, files in notes:
    if files:
      some = ", ".join(files[:5]) + ", ..." * (len(files) > 5)
      line += f", {len(files)} {what} ({some})"
  if any(files for _, files in notes):
    line += f"; see {folder / 'skipped.json'}"
  return line
