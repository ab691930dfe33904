"""Which training mends drift? Every history from one warm-up, and BAgger.

  avd study strategies --workdir runs/studies

Source: [RF Table 2] and [BAgger Table 1], at the scale of a laptop: world and
network of configs/worlds_tiny.py. A warm-up of 900 steps, then 500 steps a
branch, all with the same optimizer and, where the history is degraded, the same
law of levels. Diffusion forcing, and BAgger on top of it, have a warm-up of
their own objective; BAgger is also put on top of teacher forcing. Hardware: 2
CPU cores. Expected: not measured yet.
"""

from pathlib import Path

from avd_jax import config as base
from avd_jax.studies.study import Branch, Row, Study

WORLD = Path(__file__).parents[1] / "worlds_tiny.py"
STEPS = 500
# Other worlds for this network, as other studies use them. What fills or
# spreads does so slowly enough to go on through most of a rollout.
PLACES = {
  "balls": {},
  "pan": {"data.kind": "pan"},
  "occluder": {"data.kind": "occluder", "data.radius": 2.0},
  "pour": {"data.kind": "pour", "data.speed": 0.5},
  "ink": {"data.kind": "ink", "data.radius": 2.0, "data.speed": 0.5},
  "fall": {"data.kind": "fall"},
}


def continued(history, objective="flow_matching", **degradation):
  """The stage of a branch: the law of levels of configs/worlds_tiny.py."""
  stage = base.stage(
    history,
    STEPS,
    objective=objective,
    warmup_steps=20,
    decay_steps=480,
    final_lr_ratio=0.03,
  )
  stage.degradation.update(
    dict(shift=0.1, clean_prefix=1, random_prefix=True) | degradation
  )
  return stage


def warmup(objective="flow_matching"):
  """The stage that branches start from."""
  return base.stage("ground_truth", 900, objective=objective)


def get_study():
  forcing = "diffusion_forcing"
  # Rollouts start from half of a seed set, which must have an end.
  seeds = {"data.num_videos": 4096, "bagger.frames": 20}
  # Levels low enough that a clean history is nothing unheard of.
  uniform = {"loss.levels": "uniform", "loss.shift": 1.0}
  return Study(
    title="Strategies against drift",
    question=(
      "From one warm-up and with equal optimizer steps, which way of training"
      " drifts less, and what does it cost in content and in time?"
    ),
    config=base.load(str(WORLD), []),
    branches=(
      Branch("warmup", warmup()),
      Branch("teacher_forcing", continued("ground_truth"), "warmup"),
      Branch("noise_untold", continued("noise_augmented"), "warmup"),
      Branch("noise_told", continued("noise_augmented", tell=True), "warmup"),
      Branch("parallel", continued("parallel_resampled"), "warmup"),
      Branch("resampling", continued("self_resampled"), "warmup"),
      Branch("detached", continued("self_resampled", detached=True), "warmup"),
      Branch("error_bank", continued("error_bank"), "warmup"),
      Branch(
        "teacher_forcing_long",
        continued("ground_truth"),
        "warmup",
        equal_time_to="resampling",
      ),
      Branch("df_warmup", warmup(forcing)),
      Branch(forcing, continued("ground_truth", forcing), "df_warmup"),
      Branch(
        "bagger",
        continued("ground_truth", forcing),
        "df_warmup",
        seeds,
        rounds=3,
      ),
      Branch("df_uniform_warmup", warmup(forcing), changes=uniform),
      Branch(
        "df_uniform",
        continued("ground_truth", forcing),
        "df_uniform_warmup",
        uniform,
      ),
      Branch(
        "bagger_two_streams",
        continued("ground_truth"),
        "warmup",
        seeds,
        rounds=3,
      ),
    ),
    rows=(
      Row("teacher forcing", "teacher_forcing"),
      Row("teacher forcing, time of resampling", "teacher_forcing_long"),
      Row("noise augmentation, untold", "noise_untold"),
      Row("noise augmentation, told", "noise_told"),
      Row("parallel resampling", "parallel"),
      Row("resampling", "resampling"),
      Row("resampling, detached", "detached"),
      Row("error bank", "error_bank"),
      Row("diffusion forcing", forcing),
      Row(
        "diffusion forcing, context noise 0.2",
        forcing,
        {"sampling.context_noise": 0.2},
      ),
      Row("diffusion forcing, uniform levels", "df_uniform"),
      Row(
        "diffusion forcing, uniform levels, context noise 0.2",
        "df_uniform",
        {"sampling.context_noise": 0.2},
      ),
      Row("BAgger", "bagger"),
      Row("BAgger on teacher forcing", "bagger_two_streams"),
    ),
    baseline="teacher forcing",
    claims=(
      "Reported by Resampling Forcing (Table 2, VBench over 0-15 s: temporal,"
      " visual, text): noise augmentation 87.15, 61.90, 21.44; parallel"
      " resampling 88.01, 62.51, 24.51; autoregressive resampling 90.46, 64.25,"
      " 25.26. Reported by BAgger (50 s, drift of imaging quality, lower is"
      " better): diffusion forcing 7.34; rounds 1, 2, 3: 11.83, 5.92, 3.57."
    ),
  )
