"""The demo's world: a ball that bounces over a coloured background.

[Resampling Forcing, Section 3], on a laptop.
"""

from avd_jax import config as base


def get_config():
  config = base.default()
  config.stages = ("warmup", "resampling_forcing")
  config.data.update(frames=10, height=16, width=16, radius=3.0, speed=1.6)
  config.model.update(
    dim=96, ffn_dim=288, num_heads=3, num_layers=4, patch=8, window=4, sink=1,
    text="none", spatial_embedding=(2, 2), gate_init=0.5, rope_theta=100.0,
    scan_unroll=4,
  )
  config.optimizer.update(name="muon")
  config.stage.warmup = base.stage("ground_truth", 1500)
  for name, history in (
    ("teacher_forcing", "ground_truth"),
    ("resampling_forcing", "self_resampled"),
  ):
    config.stage[name] = base.stage(
      history, 400, warmup_steps=20, decay_steps=380, final_lr_ratio=0.03
    )
  resampling = config.stage.resampling_forcing.resampling
  resampling.update(shift=0.1, clean_prefix=1, random_prefix=True)
  config.evaluation.update(videos=64, given=4, frames=84)
  config.sampling.update(steps=4)
  return config
