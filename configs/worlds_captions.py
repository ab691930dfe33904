"""Two balls and a caption that names their colours: text and guidance.

  avd train --config configs/worlds_captions.py --workdir runs/captions
  avd sample --workdir runs/captions --out balls.mp4 --guidance 2 \\
    --prompt "a red ball and a blue ball, dark green background"

Source: the recipe of configs/worlds_tiny.py, with text dropout 0.1 (method of
classifier-free guidance) and every chunk trained, the first one too, so that a
video can start from its caption alone. Hardware: 2 CPU cores. Never trained to
its end yet: what to expect is not measured.
"""

from avd_jax import config as base


def get_config():
  config = base.default()
  config.data.update(
    frames=10,
    height=16,
    width=16,
    num_balls=2,
    radius=3.0,
    speed=1.6,
    caption_detail="colour",
    text_length=64,
  )
  config.model.update(
    dim=96,
    ffn_dim=288,
    num_heads=3,
    num_layers=4,
    patch=8,
    attention=dict(window=4, sink=1),
    text="bytes",
    text_dim=48,
    text_tokens=4,
    spatial_embedding=(2, 2),
    gate_init=0.5,
    rope_theta=100.0,
    scan_unroll=4,
  )
  config.optimizer.update(name="muon")
  config.stages = ("warmup", "resampling_forcing")
  config.stage.warmup = base.stage("ground_truth", 2500)
  config.stage.resampling_forcing = base.stage(
    "self_resampled", 500, warmup_steps=20, decay_steps=480, final_lr_ratio=0.03
  )
  config.stage.resampling_forcing.degradation.update(
    shift=0.1, clean_prefix=1, random_prefix=True
  )
  config.evaluation.update(videos=32, given=4, frames=84)
  config.sampling.update(steps=8, guidance=2.0)
  return config
