"""BAgger on the demo's world: three rounds of corrective trajectories.

  avd bagger --config configs/worlds_bagger.py --workdir runs/bagger

Source: [BAgger Alg. 1], at the scale of a laptop: world and network of
configs/worlds_tiny.py under diffusion forcing, half of the videos with clean
context; in each round, half as many rollouts as there are seed videos,
reversed; training restarts from the base. Where the paper has 7 chunks a clip
and a drifted prefix of 4, clips here have 10 chunks and a prefix of 6.
Hardware: 2 CPU cores. Expected:
not measured yet.
"""

from avd_jax import config as base


def get_config():
  config = base.default()
  config.data.update(
    frames=10, height=16, width=16, radius=3.0, speed=1.6, num_videos=4096
  )
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
  config.stages = ("base",)
  for name, steps, schedule in (
    ("base", 900, {}),
    ("round", 500, dict(warmup_steps=20, decay_steps=480, final_lr_ratio=0.03)),
  ):
    config.stage[name] = base.stage(
      "ground_truth", steps, objective="diffusion_forcing", **schedule
    )
  config.loss.clean_context = 0.5
  config.bagger.update(rounds=3, share=0.5)
  config.evaluation.update(videos=96, given=4, frames=84, seed=2026)
  config.sampling.update(steps=8)
  return config
