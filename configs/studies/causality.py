"""How often does each method break a law of the world, and when?

  avd study causality --workdir runs/studies

Three worlds whose law is known: a glass that fills (the level never falls), a
ball that bounces under gravity (its energy is constant), a ball that passes
behind a bar (it comes out with its colour and speed). Teacher forcing, noise
augmentation, resampling and the error bank from one warm-up in each; violations
are counted frame by frame, by thirds of the rollout; a frame that cannot be
read counts as one. Hardware: 2 CPU cores.
Expected: docs/evidence/causality.md.
"""

import runpy
from pathlib import Path

from avd_jax import config as base
from avd_jax.studies.study import Branch, Row, Study

STRATEGIES = runpy.run_path(str(Path(__file__).with_name("strategies.py")))
METHODS = {
  "teacher forcing": ("teacher_forcing", "ground_truth", {}),
  "noise augmentation, told": (
    "noise_told",
    "noise_augmented",
    dict(tell=True),
  ),
  "resampling": ("resampling", "self_resampled", {}),
  "error bank": ("error_bank", "error_bank", {}),
}


def get_study():
  continued, warmup = STRATEGIES["continued"], STRATEGIES["warmup"]
  branches, rows = [], []
  for kind in ("pour", "fall", "occluder"):
    world = STRATEGIES["PLACES"][kind]
    branches.append(Branch(f"warmup_{kind}", warmup(), changes=world))
    against = f"{kind}: teacher forcing"
    for label, (name, history, options) in METHODS.items():
      stage = continued(history, **options)
      branches.append(Branch(f"{name}_{kind}", stage, f"warmup_{kind}", world))
      rows.append(Row(f"{kind}: {label}", f"{name}_{kind}", against=against))
  return Study(
    title="Laws kept and broken",
    question="How often does each method break a known law of its world?",
    config=base.load(str(STRATEGIES["WORLD"]), []),
    branches=tuple(branches),
    rows=tuple(rows),
    baseline="pour: teacher forcing",
    shown=("violation", "state_error"),
    thirds=("violation", "failed"),
    claims=(
      "Resampling Forcing shows a pouring scene (a figure, no numbers) in which"
      " a distilled model lets the level fall and its own does not."
    ),
    found=(
      "No method lets the level fall, teacher forcing included (none here is"
      " distilled). Elsewhere what goes wrong is that the ball is lost: in the"
      " last third in 22 % of the frames under gravity with resampling (teacher"
      " forcing 46 %), but behind a bar in 45 % (36 %; told noise 30 %, error"
      " bank 49 %). In the frames that can be read, which are others with each"
      " method, the law itself breaks in 12 to 20 % under gravity and in 6 to"
      " 9 % behind the bar, there in each seed more often with resampling (9)"
      " than with teacher forcing (6)."
    ),
  )
