"""Wan2.1-1.3B made causal: the warm-up that every other wan recipe builds on.

  avd import-wan --source Wan2.1-T2V-1.3B --out runs/wan
  avd encode --videos DIR --checkpoint runs/wan --out store_5s
  avd train --config configs/wan_1_3b_teacher_forcing.py \\
    --workdir runs/wan_tf --config.data.path=store_5s

Source: Resampling Forcing's recipe, stage one: Wan's weights, a noise level for
each chunk of 3 latent frames, no new parameter; 10,000 steps of teacher forcing
on clips of 5 s (81 frames of 832x480 at 16 a second: 21 latent frames, 7
chunks), batch 64, AdamW at 5e-5; sampling by Euler in 32 steps, shift 5,
guidance 5. Starts from: `init_from`, Wan's own files or what import-wan wrote.
Expects: `data.path`, what avd encode wrote; 16 of its videos are held out.

Ours, since the paper does not say: levels uniform, then shifted by 5, as its
sampler's are; betas and weight decay (PyTorch's defaults), clipping at 1; 100
steps of learning rate's warm-up, no decay; an EMA of 0.99, which is what the
next recipe starts from; text dropped for 10 % of videos, or guidance would ask
for what was never seen.

Meant for 64 accelerators of 80 GB or more, a video each; parameters are cut 8
ways, blocks recomputed, computed in bfloat16. On 8: `optimizer.accumulation=8`.
`avd plan --config ... --target h100:64` says what a device needs. Cost: 74.9
PFLOP a step, recomputing not counted. We know of no hours that the paper gives,
and nobody has run this here: no result is promised.
"""

import dataclasses

from avd_jax import config as base
from avd_jax.models.dit_config import DiTConfig

WAN_1_3B = DiTConfig(
  dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, dtype="bfloat16"
)
CLIPS = {"5s": 21, "15s": 63}  # latent frames; 81 and 249 of pixels


def recipe(model, clip, start, stages, batch_size=64):
  """What all recipes for Wan share: data, network, optimizer, mesh, sampler.

  Args:
    model: the network.
    clip: of CLIPS.
    start: the run, or import, whose EMA weights it starts from.
    stages: by name, in order.
    batch_size: over all devices.
  """
  if clip not in CLIPS:
    raise ValueError(f"clips of {clip!r}: give one of {', '.join(CLIPS)}")
  config = base.default()
  config.init_from = start
  config.data.update(
    source="latents",
    path="",  # what avd encode wrote: --config.data.path=DIR
    frames=CLIPS[clip],
    height=60,
    width=104,
    text_length=512,
    batch_size=batch_size,
    eval_files=16,
  )
  config.model.update(dataclasses.asdict(model))
  config.loss.update(levels="uniform", shift=5.0, text_dropout=0.1)
  config.optimizer.update(b1=0.9, b2=0.999, weight_decay=0.01, ema=0.99)
  config.stages, config.stage = tuple(stages), stages
  config.mesh.update(data=-1, fsdp=8)
  config.log.update(every=10, checkpoint_every=500)
  config.sampling.update(steps=32, shift=5.0, guidance=5.0)
  config.evaluation.update(videos=16, given=3, frames=CLIPS[clip])
  return config


def stage(history, steps, **changes):
  """A stage at the papers' learning rate."""
  return base.stage(
    history, steps, learning_rate=5e-5, warmup_steps=100, **changes
  )


def get_config():
  stages = {"teacher_forcing": stage("ground_truth", 10_000)}
  return recipe(WAN_1_3B, "5s", "runs/wan", stages)
