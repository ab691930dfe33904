"""Does BAgger break causality where time has a direction?

  avd study reversal --workdir runs/studies

A reversible world (a ball that bounces) and two irreversible ones (a glass that
fills, a drop of ink that spreads): in each, diffusion forcing (half of its
videos with clean context, as BAgger's prefix is) and two rounds of BAgger on
top of it, whose corrective clips run backwards in time. BAgger rewrites their
captions to say so; these networks hear none, but for one of the glass, which is
conditioned on captions in training and at test. A violation of the world's law
(speed kept; level never falling; width never shrinking) is counted frame by
frame. Hardware: 2 CPU cores. Expected:
docs/evidence/reversal.md.
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
  for kind, told in (
    ("balls", False),
    ("pour", False),
    ("pour", True),
    ("ink", False),
  ):
    # The ball's models are those of configs/studies/strategies.py.
    suffix = "" if kind == "balls" else f"_{kind}"
    changes = STRATEGIES["PLACES"][kind] | {"loss.clean_context": 0.5}
    corrective = {"data.num_videos": 4096}
    if kind != "balls":  # their captions are long, reversed ones longer
      corrective["data.text_length"] = 96
    if told:
      suffix += "_told"
      changes |= {"model.text": "bytes", "data.text_length": 96}
    base_name = f"df_clean_warmup{suffix}"
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
    label = f"{kind}, captioned" if told else kind
    against = f"{label}: diffusion forcing"
    rows += [
      Row(against, f"df_clean{suffix}"),
      *(
        Row(
          f"{label}: BAgger round {k}",
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
    shown=("violation", "background_error"),
    claims=(
      "BAgger's authors state the limit: processes such as pouring or breaking"
      " are not closed under time reversal; they do not measure it."
    ),
    found=(
      "Where no caption says that time runs backwards, yes: with BAgger the"
      " glass breaks its law in 42 % of the frames after one round and in 27 %"
      " after two (0.5 % before), ink in 5 and 8 % (0.4 % before), and even the"
      " ball, whose law holds both ways, in 16 and 18 % (10 % before). Where"
      " the network hears captions, which BAgger rewrites, the glass keeps its"
      " law (0.6 and 0.4 %), at 1 to 3 dB of PSNR and 3 to 5 times the error"
      " of its level; in none of these worlds did"
      " BAgger lower the drift of a model that had seen clean context."
    ),
  )
