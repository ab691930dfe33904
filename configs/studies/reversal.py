"""Does BAgger break causality where time has a direction?

  avd study reversal --workdir runs/studies

A reversible world (a ball that bounces) and two irreversible ones (a glass that
fills, a drop of ink that spreads): in each, diffusion forcing (half of its
videos with clean context, as BAgger's prefix is) and two rounds of BAgger on
top of it, whose corrective clips run backwards in time. A violation
of the world's law (speed kept; level never falling; width never shrinking) is
counted frame by frame. Hardware: 2 CPU cores. Expected: not measured yet.
"""

import runpy
from pathlib import Path

from avd_jax import config as base
from avd_jax.studies.study import Branch, Row, Study

STRATEGIES = runpy.run_path(str(Path(__file__).with_name("strategies.py")))
FORCING = "diffusion_forcing"


def get_study():
  continued, warmup = STRATEGIES["continued"], STRATEGIES["warmup"]
  branches, rows = [], []
  for kind in ("balls", "pour", "ink"):
    # The ball's models are those of configs/studies/strategies.py.
    suffix = "" if kind == "balls" else f"_{kind}"
    base_name = f"df_clean_warmup{suffix}"
    changes = STRATEGIES["PLACES"][kind] | {"loss.clean_context": 0.5}
    corrective = {"data.num_videos": 4096}
    if kind != "balls":  # their captions are long, reversed ones longer
      corrective["data.text_length"] = 96
    branches += [
      Branch(base_name, warmup(FORCING), changes=changes),
      Branch(
        f"df_clean{suffix}",
        continued("ground_truth", FORCING),
        base_name,
        changes,
      ),
      Branch(
        f"bagger{suffix}",
        continued("ground_truth", FORCING),
        base_name,
        changes | corrective,
        rounds=3 if kind == "balls" else 2,
      ),
    ]
    against = f"{kind}: diffusion forcing"
    rows += [
      Row(against, f"df_clean{suffix}"),
      *(
        Row(
          f"{kind}: BAgger round {k}",
          f"bagger{suffix}",
          round=k,
          against=against,
        )
        for k in (1, 2)
      ),
    ]
  return Study(
    title="BAgger where time has a direction",
    question=(
      "BAgger trains on clips that run backwards: does a model then break laws"
      " that hold forwards only?"
    ),
    config=base.load(str(STRATEGIES["WORLD"]), []),
    branches=tuple(branches),
    rows=tuple(rows),
    baseline="balls: diffusion forcing",
    claims=(
      "BAgger's authors state the limit: processes such as pouring or breaking"
      " are not closed under time reversal; they do not measure it."
    ),
  )
