"""History routing on Wan2.1-1.3B: the last stage of Resampling Forcing.

  avd train --config configs/wan_1_3b_routing.py --workdir runs/wan_routed \\
    --config.data.path=store_15s

Source: [RF Eq. 8] and the recipe's stage four: 1,500 steps more on clips of 15
s, in which every query of every head chooses 5 of up to 20 chunks of history,
all else as in configs/wan_1_3b_resampling.py. Starts from: `init_from`, by
default the run that wan_1_3b_resampling.py:15s made (runs/wan_rf_15s); a choice
has no parameters, so that any run of the model will do. Expects: `data.path`, a
store of clips of 15 s.

Ours: chunks are described by the mean of rotated keys, which the paper does not
say; and what wan_1_3b_teacher_forcing.py says of its own.

Hardware: as configs/wan_1_3b_resampling.py:15s. Cost: 351 PFLOP a step,
recomputing and the choice itself not counted. No hours are known to us, and
nobody has run this here.
"""

import runpy
from pathlib import Path

RESAMPLING = runpy.run_path(
  str(Path(__file__).with_name("wan_1_3b_resampling.py"))
)


def get_config():
  config = RESAMPLING["get_config"]("15s")
  config.init_from = "runs/wan_rf_15s"
  config.model.attention.routing_top_k = 5
  config.stage = {"routing": RESAMPLING["resampling"](1_500)}
  config.stages = ("routing",)
  return config
