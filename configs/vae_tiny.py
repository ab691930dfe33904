"""A small VAE on your own videos: Wan2.1's network, a thousandth of its size.

  avd train --config configs/vae_tiny.py --config.data.path=DIR --workdir W

Source: Wan2.1's VAE, causal in time, here with space shrunk by four and time by
two, 8 channels instead of 96 and 8 of latents instead of 16; mean absolute
error and a weak pull to N(0, 1), without Wan's perceptual and adversarial
losses, so that results are soft. The run leaves W/vae, which is what `avd
import-wan` would have written, and W/reconstruction.mp4, held-out clips and
what the VAE makes of them. Hardware: 2 CPU cores. Seen: BUILD_NOTES.md.
"""

from avd_jax import config as base


def get_config():
  config = base.vae_default()
  config.data.update(
    source="video",
    eval_files=2,
    frames=5,
    height=32,
    width=48,
    fps=8.0,
    batch_size=4,
  )
  config.vae.update(
    base_dim=8,
    z_dim=8,
    dim_mult=(1, 2, 4),
    num_res_blocks=1,
    temporal_downsample=(False, True),
  )
  config.optimizer.update(name="adamw", b2=0.99, weight_decay=0.0, ema=0.99)
  config.stage.vae.update(
    steps=1500, learning_rate=2e-3, warmup_steps=20, decay_steps=500
  )
  return config
