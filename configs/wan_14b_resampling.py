"""Resampling Forcing on Wan2.1-14B: warm-up and resampling in one run.

  avd import-wan --source Wan2.1-T2V-14B --out runs/wan14
  avd encode --videos DIR --checkpoint runs/wan14 --out store_5s
  avd train --config configs/wan_14b_resampling.py --workdir runs/wan14_rf \\
    --config.data.path=store_5s

Source: [RF Alg. 1], whose paper trains the 1.3B model; this is its schedule on
clips of 5 s (10,000 steps of teacher forcing, 15,000 of resampling, batch 64,
AdamW at 5e-5, s = 0.6) carried over to Wan2.1-14B, which is our doing. Starts
from: `init_from`, what import-wan wrote. Expects: `data.path`, what avd encode
wrote. Both sizes share one VAE and one text encoder: a store made for one
serves the other.

Ours, besides: what configs/wan_1_3b_teacher_forcing.py says of its own; the
same learning rate for ten times the parameters.

Meant for 64 accelerators of 80 GB or more, a video each; parameters are cut
over all of them, blocks recomputed, their inputs kept in the host's memory (54
GB a device). On v5p:4x4x4 `--config.mesh.data=2 --config.mesh.fsdp=16
--config.mesh.context=2 --config.model.remat=block
--config.optimizer.accumulation=2` takes 88 of 96 GiB, none of the host, by plan
(docs/plans/wan_14b_resampling_v5p.txt). Elsewhere ask `avd plan` before.
Cost: 494 PFLOP a step of warm-up, 628 PFLOP of resampling, recomputing not
counted. Nobody has run this here.
"""

import runpy
from pathlib import Path

from avd_jax.models.dit_config import DiTConfig

RESAMPLING = runpy.run_path(
  str(Path(__file__).with_name("wan_1_3b_resampling.py"))
)
WAN = RESAMPLING["WAN"]
WAN_14B = DiTConfig(
  dim=5120,
  ffn_dim=13_824,
  num_heads=40,
  num_layers=40,
  dtype="bfloat16",
  remat="offload",
)


def get_config():
  stages = {
    "teacher_forcing": WAN["stage"]("ground_truth", 10_000),
    "resampling_forcing": RESAMPLING["resampling"](15_000),
  }
  config = WAN["recipe"](WAN_14B, "5s", "runs/wan14", stages)
  config.mesh.update(data=1, fsdp=-1)
  return config
