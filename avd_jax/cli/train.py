"""Train a model; resumes what the workdir holds.

  avd train --config configs/worlds_tiny.py --workdir runs/x
  avd train --config configs/video_tiny.py --config.data.path=my_videos \\
      --workdir runs/mine

  avd train --config configs/vae_tiny.py --config.data.path=my_videos \\
      --workdir runs/vae

Any field of the config can be changed with --config.field=value. The workdir
gets checkpoints/, config.json, metrics.jsonl and tensorboard/. Ctrl-C saves
and stops; the same command goes on from there.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--config", required=True, help="a file of configs/")
  parser.add_argument("--workdir", required=True, help="where the run lives")


def run(args: argparse.Namespace) -> None:
  from avd_jax import config as config_lib
  from avd_jax.cli import devices
  from avd_jax.training import loop

  config = config_lib.load(args.config, args.overrides)
  devices.start(several=True)
  devices.agree(config, args.workdir)
  try:
    state = loop.train(config, args.workdir, devices.mesh(config))
  except loop.Interrupted as stop:
    print(stop)
    raise KeyboardInterrupt from stop
  if "vae" in config:
    _finish_vae(config, args.workdir, state)


def _finish_vae(config, workdir, state):
  """Writes the component `vae/` and a film of held-out clips."""
  from pathlib import Path

  import jax
  import numpy as np
  from tqdm import tqdm

  from avd_jax import config as config_lib
  from avd_jax.data import video
  from avd_jax.data.pipeline import DataConfig
  from avd_jax.training import vae

  if jax.process_index():
    return
  with tqdm(desc="mean and deviation of latents", unit="clip") as bar:
    cfg = vae.finish(config, workdir, state, bar.update)
  data = config_lib.typed(DataConfig, config.data)
  clips, made = vae.reconstructions(
    cfg, vae.here(state.ema), data, config.evaluation.videos
  )
  # A folder of which nothing is held out is evaluated on what it trained.
  same = data.source == "video" and not data.eval_files
  kind = "training" if same else "held-out"
  psnr = 10 * np.log10(4 / np.mean((clips - made) ** 2))
  film = video.side_by_side(
    [clips, made],
    [kind, "given back"],
    scale=max(1, 192 // data.width),
  )
  path = Path(workdir) / "reconstruction.mp4"
  video.write_video(path, film, fps=data.fps or 8.0)
  print(
    f"wrote {Path(workdir) / 'vae'} and {path}: {len(clips)} {kind} clips at"
    f" {psnr:.1f} dB"
  )
