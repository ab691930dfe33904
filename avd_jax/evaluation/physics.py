"""Rollouts in a world measured frame by frame: drift, content, and its law.

One layout for every kind of world. For balls it is `drift.frame_metrics` and
the law of their speed; scenes are read by `fitting` and judged by `laws`.

A frame that cannot be read obeys no law: `violation` is 1 wherever `failed` is.
So an empty rollout, a plain background of the right colour, has failed and
violation 1 in all its frames (a tower, a ball, a bar, a glass or ink is
missing), and hue_error .5 but where a ball may be hidden, though
background_error 0. One with its bar but no ball, or its glass but no liquid,
has the same once the ball should be out again, or as soon as the truth has
liquid.

The laws are of the rollout's own past, so that other videos of the same world,
shown in place of its own, break few: none but, in a fifth of the frames, that
of the energy. By chance they have background_error .26 (for backgrounds in [.1,
.5]) and hue_error .25 (occluder: .13, since hidden balls count 0), and a
state_error of pixels: content is for these three to tell. A rollout that
repeats its last given frame breaks no law of pan, pour and ink, which have no
clock, and that of the others in .4 to .75 of its frames; state_error tells it.
"""

from collections.abc import Mapping

import numpy as np

from avd_jax.data import worlds
from avd_jax.evaluation import drift, fitting, laws


def frame_metrics(
  video: np.ndarray,
  truth_video: np.ndarray,
  state: Mapping[str, np.ndarray],
  config: worlds.WorldConfig,
) -> drift.FrameMetrics:
  """Measures every frame of rollouts in a world of any kind.

  Args:
    video: [b f h w 3] in [-1, 1], the given frames first; clipped to it.
    truth_video: [b f h w 3], what really happens.
    state: of the truth, leaves [b ...] (see `worlds.World`).
    config: what was drawn.

  Returns:
    Arrays [b f]:
      off_manifold, broken, background_error, flicker, psnr: as of
        `drift.frame_metrics`.
      object_share: 1 where every object is there that should be, and no other
        ball; a ball behind its bar need not be seen.
      failed: 1 where broken or not object_share.
      violation: 1 where failed, or where the world's law is broken by more
        than the tolerances of `laws`.
      hue_error, state_error: see `laws.Verdict`. Balls have speed_error (see
        `drift.frame_metrics`) in place of state_error.
    A frame with a value that is not finite counts as failed, at the worst value
    of every metric.

  Raises:
    UserError: shapes that do not belong together, or more than 4 balls.
  """
  if config.kind == "balls":
    metrics = drift.frame_metrics(video, truth_video, state, config)
    speed = np.nan_to_num(metrics["speed_error"])
    wrong = speed > laws.SPEED_TOLERANCE * config.speed
    metrics["violation"] = np.maximum(metrics["failed"], wrong)
    return metrics
  video, truth_video = np.asarray(video), np.asarray(truth_video)
  drift.check(video, truth_video, config)
  finite = np.all(np.isfinite(video), axis=(2, 3, 4))
  video = np.where(finite[..., None, None, None], video, 0).clip(-1, 1)
  b, f = video.shape[:2]
  frames = ((video.reshape(b * f, -1, 3) + 1) / 2).astype(np.float32)
  fit = fitting.fit(frames, config)
  seen = fitting.Fit(*(x.reshape(b, f, *x.shape[1:]) for x in fit))

  broken = seen.off_manifold > drift.BROKEN
  verdict = laws.judge(seen, finite & ~broken, state, config)
  failed = broken | ~verdict.intact
  background = seen.colour[:, :, 0]
  true_background = np.asarray(state["background"])[:, None]
  change = np.abs(np.diff(background, axis=1, prepend=background[:, :1]))
  metrics = {
    "off_manifold": seen.off_manifold,
    "broken": broken,
    "object_share": verdict.intact,
    "failed": failed,
    "violation": failed | verdict.broken_law,
    "background_error": np.linalg.norm(background - true_background, axis=-1),
    "hue_error": verdict.hue_error,
    "state_error": verdict.state_error,
    "flicker": change.mean(-1),
    "psnr": drift.psnr(video, truth_video),
  }
  worst = {**drift.WORST, "state_error": float(config.height)}
  return {
    name: np.where(finite, x.astype(np.float64), worst[name])
    for name, x in metrics.items()
  }
