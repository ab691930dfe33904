"""History routing on the demo's world: train dense, then let queries choose.

  avd train --config configs/worlds_routing.py:dense --workdir runs/dense
  avd train --config configs/worlds_routing.py --workdir runs/routed \
    --config.init_from=runs/dense
  avd inspect routing --workdir runs/routed

Source: the paper's last stage, dense training first, then a short one with
top-5 routing [RF 4.2.5]. Here: clips of 20 chunks, no window, so that a query
has up to 19 chunks to choose 5 from. Hardware: 2 CPU cores, 10 minutes and 3.
Expected: validation loss within a few percent of the dense model's; which
chunks are chosen, in BUILD_NOTES.md.
"""

from avd_jax import config as base


def get_config(attention="routed"):
  config = base.default()
  config.data.update(
    frames=20, height=16, width=16, radius=3.0, speed=1.6, batch_size=32
  )
  config.model.update(
    dim=96,
    ffn_dim=288,
    num_heads=3,
    num_layers=4,
    patch=8,
    text="none",
    spatial_embedding=(2, 2),
    gate_init=0.5,
    rope_theta=100.0,
    scan_unroll=4,
  )
  config.optimizer.update(name="muon")
  config.stages = ("warmup", "resampling_forcing")
  config.stage.warmup = base.stage("ground_truth", 900)
  resampling = dict(warmup_steps=20, decay_steps=480, final_lr_ratio=0.03)
  if attention == "routed":
    config.model.attention.routing_top_k = 5
    config.stages = ("resampling_forcing",)
    resampling = dict(warmup_steps=20, decay_steps=130, learning_rate=1e-3)
  config.stage.resampling_forcing = base.stage(
    "self_resampled",
    resampling["warmup_steps"] + resampling["decay_steps"],
    **resampling,
  )
  config.stage.resampling_forcing.degradation.update(
    shift=0.1, clean_prefix=1, random_prefix=True
  )
  config.evaluation.update(videos=96, given=4, frames=20, seed=2026)
  config.sampling.update(steps=8)
  return config
