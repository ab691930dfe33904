"""The demo's world: a ball that bounces over a coloured background.

  make demo
  avd demo --seeds 3 --workdir runs/demo3 --config.evaluation.videos=192
  avd train --config configs/worlds_tiny.py --workdir runs/x

Source: [RF Alg. 1] after a teacher-forcing warm-up, at the scale of a laptop:
16x16 pixels, 4 tokens a frame, 484k parameters, clips of 10 frames rolled out
to 84. Window of 4 chunks, the first chunk kept as sink. The paper's shift
s = 0.6 costs content at this size; 0.1 and a random clean prefix do not
(BUILD_NOTES.md). Hardware: 2 CPU cores, under 10 minutes. Expected: in the last
third, half of teacher forcing's failed frames and a fifth of its background
error, at less than 1 dB of PSNR (README.md).
"""

from avd_jax import config as base


def get_config():
  config = base.default()
  config.data.update(frames=10, height=16, width=16, radius=3.0, speed=1.6)
  config.model.update(
    dim=96,
    ffn_dim=288,
    num_heads=3,
    num_layers=4,
    patch=8,
    attention=dict(window=4, sink=1),
    text="none",
    spatial_embedding=(2, 2),
    gate_init=0.5,
    rope_theta=100.0,
    scan_unroll=4,
  )
  config.optimizer.update(name="muon")
  config.stages = ("warmup", "resampling_forcing")
  config.stage.warmup = base.stage("ground_truth", 900)
  for name, history in (
    ("teacher_forcing", "ground_truth"),
    ("resampling_forcing", "self_resampled"),
  ):
    config.stage[name] = base.stage(
      history, 700, warmup_steps=20, decay_steps=680, final_lr_ratio=0.03
    )
  config.stage.resampling_forcing.degradation.update(
    shift=0.1, clean_prefix=1, random_prefix=True
  )
  config.evaluation.update(videos=96, given=4, frames=84, seed=2026)
  config.sampling.update(steps=8)
  return config
