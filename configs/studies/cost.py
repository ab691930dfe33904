"""What a step of each strategy costs, and what the cost buys.

  avd study cost --workdir runs/studies

Steps of all strategies race in turn in one process, in parts: making the
history, and the rest. Beside the models of configs/studies/strategies.py stand
detached resampling with a full two-stream step every 2nd, 4th and 8th step:
does a little gradient through the history restore what a detached cache loses?
Hardware: 2 CPU cores. Expected: docs/evidence/cost.md.
"""

import runpy
from pathlib import Path

from avd_jax import config as base
from avd_jax.studies.study import Branch, Row, Study

STRATEGIES = runpy.run_path(str(Path(__file__).with_name("strategies.py")))
KINDS = {
  "teacher forcing": ("teacher_forcing", "ground_truth", {}),
  "noise augmentation, told": (
    "noise_told",
    "noise_augmented",
    dict(tell=True),
  ),
  "error bank": ("error_bank", "error_bank", {}),
  "parallel resampling": ("parallel", "parallel_resampled", {}),
  "resampling": ("resampling", "self_resampled", {}),
  "resampling, 4 Euler steps": (
    "resampling_euler_4",
    "self_resampled",
    dict(steps=4),
  ),
  "detached": ("detached", "self_resampled", dict(detached=True)),
  **{
    f"detached, full every {n}": (
      f"detached_full_{n}",
      "self_resampled",
      dict(detached=True, full_every=n),
    )
    for n in (2, 4, 8)
  },
}


def slower():
  """Detached resampling at a third of the learning rate.

  A detached history learns nothing, but the weights that write it move on.
  """
  stage = STRATEGIES["continued"]("self_resampled", detached=True)
  stage.learning_rate /= 3
  return stage


def get_study():
  continued = STRATEGIES["continued"]
  return Study(
    title="What a step costs, and what it buys",
    question=(
      "Where does a training step's time go for each strategy, and which one"
      " mends most drift for its time?"
    ),
    config=base.load(str(STRATEGIES["WORLD"]), []),
    branches=(
      Branch("warmup", STRATEGIES["warmup"]()),
      *(
        Branch(name, continued(history, **options), "warmup")
        for name, history, options in KINDS.values()
      ),
      Branch("detached_slower", slower(), "warmup"),
    ),
    rows=(
      *(Row(label, name) for label, (name, *_) in KINDS.items()),
      Row("detached, a third of the rate", "detached_slower"),
    ),
    baseline="teacher forcing",
    analysis="cost",
    claims=(
      "Neither paper measures what its training costs a step. Resampling"
      " Forcing stops gradients at the re-made history, but runs both streams."
    ),
    found=(
      "A resampling step takes 1.2 of a teacher-forcing step, a fifth of it"
      " for the history (four Euler steps: 1.45, and worse), and of these"
      " methods fails least (17.5 % of frames, teacher forcing 32.7 %); the"
      " error bank is free at 23.1 %. A detached step takes .8 and loses 3.3"
      " dB in frame 1, of which a full step every 2nd, 4th or 8th restores"
      " 2.3, 1.9 and 1.6 dB at .96, .92 and .86 of a teacher-forcing step;"
      " 24.5, 30.5 and 27.3 % of frames fail then, 35.0 % without, within each"
      " other's range. Times resolve to about .05: the two detached rows run"
      " one program."
    ),
  )
