"""The smallest run of BAgger: a base and two rounds, six trajectories each."""

from avd_jax import config as base


def get_config():
  config = base.default()
  config.data.update(
    frames=3, height=12, width=12, batch_size=8, num_videos=12, text_length=64
  )
  config.model.update(
    dim=16, ffn_dim=16, num_heads=1, num_layers=1, patch=6, freq_dim=8,
    text_dim=8, text_tokens=1, scan_unroll=1,
  )  # fmt: skip
  config.stages = ("base",)
  for name in ("base", "round"):
    config.stage[name] = base.stage(
      "ground_truth", 4, objective="diffusion_forcing", warmup_steps=1
    )
  config.bagger.update(rounds=2, frames=5, batch_size=4)
  config.log.update(every=1, checkpoint_every=2)
  config.sampling.update(steps=1, segment=4)
  config.evaluation.update(videos=2, given=1, frames=7)
  return config
