"""The smallest run that uses everything: both histories, captions, an EMA."""

from avd_jax import config as base


def get_config():
  config = base.default()
  config.data.update(
    frames=3, height=12, width=12, batch_size=8, num_videos=64, text_length=32
  )
  config.model.update(
    dim=16, ffn_dim=16, num_heads=1, num_layers=1, patch=6, freq_dim=8,
    text_dim=8, text_tokens=1, scan_unroll=1,
  )  # fmt: skip
  config.stage.teacher_forcing.update(steps=3, warmup_steps=1)
  config.stage.resampling_forcing.update(steps=2)
  config.log.update(every=1, checkpoint_every=2)
  config.sampling.update(steps=1, segment=4)
  config.evaluation.update(videos=2, given=1, frames=7)
  return config
