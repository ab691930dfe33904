"""BAgger on Wan2.1-1.3B: a diffusion-forcing base and three rounds.

  avd import-wan --source Wan2.1-T2V-1.3B --out runs/wan
  avd encode --videos DIR --checkpoint runs/wan --out store_5s
  avd bagger --config configs/wan_1_3b_bagger.py --workdir runs/wan_bagger \\
    --config.data.path=store_5s

Source: [BAgger Alg. 1]: 16,000 steps of diffusion forcing, batch 96, on 55k
clips of 5 s (81 frames of 832x480: 7 chunks of 3 latent frames); in each of
three rounds rollouts of half as many clips, from a real first chunk and in 20
sampling steps, decoded, reversed as pixels, encoded again; then 16,000 steps
from the base on clips and all trajectories, of which the first 4 of 7 chunks
are context without loss. Starts from: `init_from`, what import-wan wrote; its
VAE and text encoder are `bagger.codec`, and must be those that encoded the
store. Expects: `data.path`, what avd encode wrote. For long videos the paper
makes the cache anew in windows: `--config.sampling.recompute=7` of avd sample.

Ours, since the paper does not say: learning rate 5e-5, shift and guidance 5 of
the rollouts (Resampling Forcing's); "a base" that restarts rounds is the model
after its 16,000 steps; prompts are rewritten by a template (`bagger.prompts`);
and what configs/wan_1_3b_teacher_forcing.py says of its own. No video is held
out: a rollout needs a real clip, not a fresh one.

Meant for 64 accelerators of 80 GB or more, in pairs that share three videos of
a batch (96 does not cut into 64). Rollouts run on one device of each process:
start as many processes as devices for them. Two at once take 22 GiB of cache
(7 chunks, and as many again for guidance) besides umT5's 11 GB and the weights.
Cost: 56.2 PFLOP a step,
recomputing not counted, and for each trajectory 6 chunks of 20 steps, two
passes each. No hours are known to us, and nobody has run this here.
"""

import runpy
from pathlib import Path

WAN = runpy.run_path(
  str(Path(__file__).with_name("wan_1_3b_teacher_forcing.py"))
)


def get_config():
  forcing = lambda: WAN["stage"](
    "ground_truth", 16_000, objective="diffusion_forcing"
  )
  stages = {"base": forcing(), "round": forcing()}
  config = WAN["recipe"](WAN["WAN_1_3B"], "5s", "runs/wan", stages, 96)
  config.stages = ("base",)
  config.data.eval_files = 0
  config.mesh.tensor = 2
  config.sampling.steps = 20
  config.bagger.update(
    rounds=3,
    share=0.5,
    given=1,
    prefix=4 / 7,
    restart="base",
    codec="wan:runs/wan",
    batch_size=2,
  )
  return config
