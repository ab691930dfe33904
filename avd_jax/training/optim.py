"""The optimizer of a stage: clip, AdamW or Muon, warm-up - constant - decay."""

import jax
import optax
from ml_collections import ConfigDict
from optax import contrib


def learning_rate(stage: ConfigDict, step: int) -> float:
  """Linear warm-up, constant, then linear decay over the last decay_steps.

  Computed on the host and handed to the step, so that stages which differ in
  their schedule alone share one compiled program.

  Args:
    stage: of the config.
    step: counted from the stage's start.
  """
  rise = min(1.0, (step + 1) / (stage.warmup_steps + 1))
  past = step - (stage.steps - stage.decay_steps)
  fall = 1.0
  if stage.decay_steps and past > 0:
    fall = 1.0 - (1.0 - stage.final_lr_ratio) * past / stage.decay_steps
  return stage.learning_rate * min(rise, fall)


def ramp(stage: ConfigDict, step: int) -> float:
  """How far a stage's curriculum has come: 0 to 1 over its ramp_steps."""
  steps = stage.degradation.ramp_steps
  return min(1.0, step / steps) if steps else 1.0


def make(optimizer: ConfigDict) -> optax.GradientTransformation:
  """AdamW (or Muon for the blocks' matrices) under a global-norm clip.

  The updates are those of learning rate 1: the step scales them. Muon
  orthogonalizes the updates of the matrices inside blocks, layer by layer of
  the stack, at `muon_ratio` times the learning rate; everything else stays
  with AdamW.
  """
  decay = optimizer.weight_decay
  if optimizer.name == "adamw":
    tx = optax.adamw(1.0, optimizer.b1, optimizer.b2, weight_decay=decay)
  else:
    tx = contrib.muon(
      optimizer.muon_ratio,
      weight_decay=decay / optimizer.muon_ratio,
      adam_b1=optimizer.b1,
      adam_b2=optimizer.b2,
      adam_weight_decay=decay,
      adam_learning_rate=1.0,
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
