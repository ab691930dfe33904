"""Do two to four steps do what sixteen did, with the drift mended too?

  avd study few_step --workdir runs/studies

The resampling model of configs/studies/strategies.py goes on for 300 steps,
either as before or with the consistency objective under the same histories
(algorithms/consistency.py), where no other model is involved, or by DMD on its
own rollouts as in Self Forcing (algorithms/dmd.py), where it is its own teacher
and a critic learns beside it. All take as many steps, not as much time: over a
resampling step a consistency step has two more forward passes, a step of DMD
takes six times as long. Then all are sampled with fewer and fewer solver steps.
DMD's learning rate was chosen on other videos, from one try. Hardware: 2 CPU
cores. Expected: docs/evidence/few_step.md.
"""

import runpy
from pathlib import Path

from avd_jax import config as base
from avd_jax.studies.study import Branch, Row, Study

STRATEGIES = runpy.run_path(str(Path(__file__).with_name("strategies.py")))
STEPS = 300


def further(objective):
  """A stage after resampling, under the same histories."""
  stage = STRATEGIES["continued"]("self_resampled", objective)
  stage.update(steps=STEPS, learning_rate=1e-3, decay_steps=STEPS - 20)
  stage.consistency.update(steps=16)
  return stage


def distilled():
  """DMD of 4 steps, given the first four frames as at test."""
  stage = STRATEGIES["continued"](
    "ground_truth", "dmd", clean_prefix=4, random_prefix=False
  )
  stage.update(steps=STEPS, learning_rate=3e-4, decay_steps=STEPS - 20)
  stage.dmd.update(steps=4, critic_learning_rate=1e-3)
  return stage


def rows(label, branch, solver, counts):
  """A row a number of solver steps."""
  return tuple(
    Row(
      f"{label}, {count} {'step' if count == 1 else 'steps'}",
      branch,
      {"sampling.steps": count, "sampling.solver": solver},
    )
    for count in counts
  )


def get_study():
  return Study(
    title="Few-step sampling without a bigger teacher",
    question=(
      "A resampling model is trained on to jump to the end of its own paths,"
      " or distilled on its own rollouts: what do 1, 2 or 4 steps then keep of"
      " the drift and the content that 16 steps have, and what would plain"
      " training on have kept?"
    ),
    config=base.load(str(STRATEGIES["WORLD"]), []),
    branches=(
      Branch("warmup", STRATEGIES["warmup"]()),
      Branch("resampling", STRATEGIES["continued"]("self_resampled"), "warmup"),
      Branch("resampling_more", further("flow_matching"), "resampling"),
      Branch("consistency", further("consistency"), "resampling"),
      Branch("dmd", distilled(), "resampling"),
    ),
    rows=(
      *rows("resampling", "resampling_more", "euler", (16, 8, 4, 2, 1)),
      *rows("resampling, jumping", "resampling_more", "consistency", (4, 2)),
      *rows("consistency", "consistency", "consistency", (4, 2, 1)),
      *rows("consistency, Euler", "consistency", "euler", (4, 2)),
      *rows("DMD", "dmd", "consistency", (4, 2, 1)),
    ),
    baseline="resampling, 16 steps",
    claims=(
      "Resampling Forcing and BAgger sample with 32 and 20 steps and name that"
      " as their cost; neither reports fewer."
    ),
    found=(
      "In a world this predictable many steps are not needed: plain"
      " resampling keeps its drift, within the seeds' range, and gains PSNR"
      " with 8, 4 or 2 Euler steps, and with one it pays in background error"
      " (1.6 times) and flicker (1.2). So consistency training has little to"
      " win here: its one step drifts like sixteen Euler steps (at 1.1 times"
      " the background error), its 4 are no better, and its 2 are worse. What"
      " helps untrained is to jump: straight to clean and back to the next"
      " level with fresh noise. 4 such steps have .5, .5, .4 and .2 dB over 4"
      " of Euler's in frames 1, 2, 4 and 8, and fail in 11.0 % of frames,"
      " those in 15.8 (9 to 15, 12 to 19). DMD with 4 steps has the fewest"
      " failed frames (10.5 %) and the least background and hue error (.0104,"
      " .088), and -.1, .2, .6 and .7 dB over jumping; but all of that is"
      " within the seeds' range of jumping alone but for frame 8, and a step"
      " costs six. With 2 steps it drifts least of all (.82 dB, consistency's"
      " one step .84); with 1 it has nothing over plain resampling's one step."
      " A world whose next frame is uncertain would have to show more."
    ),
  )
