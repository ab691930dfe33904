"""Resampling Forcing on Wan2.1-1.3B: clips of 5 s, then of 15 s.

  avd train --config configs/wan_1_3b_resampling.py --workdir runs/wan_rf \\
    --config.data.path=store_5s
  avd encode --videos DIR --checkpoint runs/wan --out store_15s --frames 249
  avd train --config configs/wan_1_3b_resampling.py:15s \\
    --workdir runs/wan_rf_15s --config.data.path=store_15s

Source: [RF Alg. 1], stages two and three: 15,000 steps on 5 s and 5,000 on 15 s
(63 latent frames, 21 chunks), batch 64, AdamW at 5e-5, one Euler step of
resampling with the online weights, s = 0.6, every chunk resampled. Starts from:
`init_from`, by default the run that wan_1_3b_teacher_forcing.py made (runs/
wan_tf) and, for `:15s`, the one of 5 s (runs/wan_rf). Expects: `data.path`, a
store of clips of that length.

Ours: what wan_1_3b_teacher_forcing.py says of its own. At a laptop's size a
clean first chunk and s = 0.1 kept more of the content (BUILD_NOTES.md); here
the paper's values stand, and `stage.resampling_forcing.degradation` has both.

Hardware: as there; clips of 15 s keep each block's input in the host's memory
(`model.remat` "offload": 36 GB a device). Cost: 94.7 PFLOP a step of 5 s, 591
PFLOP of 15 s, recomputing not counted. No hours are known to us, and nobody has
run this here.
"""

import runpy
from pathlib import Path

WAN = runpy.run_path(
  str(Path(__file__).with_name("wan_1_3b_teacher_forcing.py"))
)


def resampling(steps):
  """The stage: every chunk of the history is resampled."""
  stage = WAN["stage"]("self_resampled", steps)
  stage.degradation.update(shift=0.6, steps=1, clean_prefix=0)
  return stage


def get_config(clip="5s"):
  steps = {"5s": 15_000, "15s": 5_000}.get(clip, 0)
  start = "runs/wan_tf" if clip == "5s" else "runs/wan_rf"
  stages = {"resampling_forcing": resampling(steps)}
  config = WAN["recipe"](WAN["WAN_1_3B"], clip, start, stages)
  if clip == "15s":
    config.model.remat = "offload"
  return config
