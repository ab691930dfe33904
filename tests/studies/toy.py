"""The smallest study that has everything: it trains for seconds."""

from pathlib import Path

from avd_jax import config as base
from avd_jax.studies.study import Branch, Row, Study

TINY = Path(__file__).parents[1] / "tiny_config.py"


def get_study():
  resampled = base.stage("self_resampled", 2, warmup_steps=0)
  config = base.load(str(TINY), [])
  config.data.text_length = 64  # "a reversed video of" takes some
  return Study(
    title="A toy",
    question="Does the engine run?",
    config=config,
    branches=(
      Branch("warmup", base.stage("ground_truth", 3, warmup_steps=1)),
      Branch("teacher", base.stage("ground_truth", 2), "warmup"),
      Branch("resampled", resampled, "warmup"),
      Branch(
        "long", base.stage("ground_truth", 2), "warmup", equal_time_to="teacher"
      ),
      Branch("bagger", base.stage("ground_truth", 1), "warmup", rounds=1),
    ),
    rows=(
      Row("teacher forcing", "teacher"),
      Row("teacher forcing, long", "long"),
      Row("resampled", "resampled"),
      Row("resampled, 2 steps", "resampled", {"sampling.steps": 2}),
      Row("BAgger", "bagger"),
    ),
    baseline="teacher forcing",
    claims="Nothing is claimed of toys.",
    found="It runs.",
    seeds=2,
  )
