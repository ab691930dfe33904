"""Your own videos, small: a folder of mp4 or webm files, on a laptop.

  avd train --config configs/video_tiny.py --config.data.path=DIR --workdir W

Source: the recipe of configs/worlds_tiny.py ([RF Alg. 1] after a teacher-
forcing warm-up) on clips of 10 frames at 8 a second, 24x32 pixels, captions
from the .txt beside a file. Hardware: 2 CPU cores. Seen so far, after 600
warm-up steps: colours and layout of a scene kept to frame 40 (BUILD_NOTES.md);
the whole schedule has not been measured.
"""

from avd_jax import config as base


def get_config():
  config = base.default()
  config.data.update(
    source="video",
    frames=10,
    height=24,
    width=32,
    fps=8.0,
    batch_size=8,
    text_length=128,
  )
  config.model.update(
    dim=128,
    ffn_dim=384,
    num_heads=4,
    num_layers=4,
    patch=8,
    attention=dict(window=4, sink=1),
    text="bytes",
    text_dim=64,
    spatial_embedding=(3, 4),
    gate_init=0.5,
    rope_theta=100.0,
    scan_unroll=4,
  )
  config.optimizer.update(name="muon")
  config.stages = ("warmup", "resampling_forcing")
  config.stage.warmup = base.stage("ground_truth", 1000)
  config.stage.resampling_forcing = base.stage(
    "self_resampled", 500, decay_steps=400
  )
  config.stage.resampling_forcing.degradation.update(
    shift=0.1, clean_prefix=1, random_prefix=True
  )
  config.evaluation.update(videos=4, given=4, frames=40)
  config.sampling.update(steps=8, shift=3.0)
  return config
