"""The optimizer of a stage: clip, AdamW or Muon, warm-up - constant - decay."""

import jax
import optax
from ml_collections import ConfigDict
from optax import contrib


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
  """AdamW (or Muon for the blocks' matrices) under a global-norm clip.

  Muon orthogonalizes the updates of the matrices inside blocks, layer by
  layer of the stack, at `muon_ratio` times the learning rate; everything else
  stays with AdamW.
  """
  rate = schedule(stage)
  adam = dict(b1=optimizer.b1, b2=optimizer.b2)
  if optimizer.name == "adamw":
    tx = optax.adamw(rate, weight_decay=optimizer.weight_decay, **adam)
  else:
    tx = contrib.muon(
      lambda count: optimizer.muon_ratio * rate(count),
      weight_decay=optimizer.weight_decay / optimizer.muon_ratio,
      adam_b1=optimizer.b1,
      adam_b2=optimizer.b2,
      adam_weight_decay=optimizer.weight_decay,
      adam_learning_rate=rate,
      muon_weight_dimension_numbers=_matrices,
    )
  return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), tx)


def _matrices(params):
  """Which leaves are stacks of matrices [layers, in, out], for Muon."""

  def spec(path, leaf):
    del leaf
    names = [getattr(key, "key", None) for key in path]
    if "blocks" in names and "kernel" in names:
      return contrib.MuonDimensionNumbers(1, 2)
    return None

  return jax.tree_util.tree_map_with_path(spec, params)
