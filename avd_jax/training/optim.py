"""The optimizer of a stage: clip, AdamW, warm-up - constant - decay."""

import optax
from ml_collections import ConfigDict


def schedule(stage: ConfigDict) -> optax.Schedule:
  """Linear warm-up, constant, then linear decay over the last decay_steps."""
  peak = stage.learning_rate
  final = peak * stage.final_lr_ratio
  begin_decay = stage.steps - stage.decay_steps
  pieces, boundaries = [], []
  if stage.warmup_steps:
    pieces.append(optax.linear_schedule(0.0, peak, stage.warmup_steps))
    boundaries.append(stage.warmup_steps)
  pieces.append(optax.constant_schedule(peak))
  if stage.decay_steps:
    pieces.append(optax.linear_schedule(peak, final, stage.decay_steps))
    boundaries.append(max(begin_decay, stage.warmup_steps))
  return optax.join_schedules(pieces, boundaries)


def make(
  optimizer: ConfigDict, stage: ConfigDict
) -> optax.GradientTransformation:
  """AdamW under a global-norm clip."""
  return optax.chain(
    optax.clip_by_global_norm(optimizer.clip_norm),
    optax.adamw(
      schedule(stage),
      b1=optimizer.b1,
      b2=optimizer.b2,
      weight_decay=optimizer.weight_decay,
    ),
  )
