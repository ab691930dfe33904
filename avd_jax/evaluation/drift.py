"""How a rollout drifts, measured frame by frame against a world's truth.

No single number is honest. A model that ignores its history does not drift; a
frame of the right background with its ball gone lies near frames that could
have been drawn. So these are reported together: the distance to what the world
can draw, whether the objects are still there, content against the truth, and
flicker. `failed` is the strict one: broken, or objects lost or added.

Videos are [b f h w 3] in [-1, 1], metrics arrays [b f] on the host. The drift
of a quality score is its mean over the first fifth of the rollout minus its
mean over all of it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from avd_jax.data import worlds
from avd_jax.errors import UserError
from avd_jax.evaluation import manifold, objects

# Mean squared error, on the [-1, 1] scale, above which a frame is broken.
BROKEN = 0.05
# Generated frames, counted from 1, whose PSNR is reported.
HORIZONS = (1, 2, 4, 8)

# Finer than 8 bits can show (59 dB); keeps an exact frame finite.
_PSNR_FLOOR = 1e-6
# What a frame with a value that is not a number counts as: the worst.
WORST = {
  "off_manifold": 4.0,
  "broken": 1.0,
  "object_share": 0.0,
  "failed": 1.0,
  "violation": 1.0,
  "background_error": 3**0.5,
  "hue_error": 0.5,
  "flicker": 1.0,
  "psnr": 0.0,
  "speed_error": np.nan,
}
_THIRDS = (
  "off_manifold",
  "broken",
  "object_share",
  "failed",
  "background_error",
  "hue_error",
  "flicker",
  "violation",
  "state_error",
)

FrameMetrics = dict[str, np.ndarray]
Summary = dict[str, Any]


def truth(
  world: worlds.World, num_videos: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Stacks the first videos of a world: ([b f h w 3], state of [b ...])."""
  items = [world[i] for i in range(num_videos)]
  states = [item["state"] for item in items]
  state = {key: np.stack([s[key] for s in states]) for key in states[0]}
  return np.stack([item["video"] for item in items]), state


def frame_metrics(
  video: np.ndarray,
  truth_video: np.ndarray,
  state: Mapping[str, np.ndarray],
  world_config: worlds.WorldConfig,
) -> FrameMetrics:
  """Measures every frame of rollouts in a world.

  Args:
    video: [b f h w 3] in [-1, 1]; clipped to it, as a screen would.
    truth_video: [b f h w 3], what really happens after the given frames.
    state: of the truth: position [b f k 2] (y, x in pixels), colour [b k 3] and
      background [b 3] in [0, 1].
    world_config: what was drawn.

  Returns:
    Arrays [b f]:
      off_manifold: mean squared error, on the [-1, 1] scale, to the nearest
        frame found that the world could draw, with all its balls.
      broken: 1 where off_manifold > BROKEN.
      object_share: 1 where every ball is there and nothing else is
        (`objects.intact` says how; balls may touch or cover each other).
      failed: 1 where broken or not object_share.
      background_error: L2 distance to the true background, RGB in [0, 1].
      hue_error: circular distance of hues in [0, .5], mean over balls, each
        matched to the true ball that makes it smallest; .5 for a lost ball.
      flicker: mean absolute change of the background since the last frame,
        RGB in [0, 1]; 0 in the first frame.
      psnr: dB against the same frame of the truth, at most 66.
      speed_error: pixels a frame, |speed - true speed| of balls that flew
        freely (near no wall) since the last frame; NaN where there are none.
    A frame with a value that is not finite counts as failed, at the worst value
    of every metric.

  Raises:
    UserError: shapes that do not belong together, or more than 4 balls.
  """
  video, truth_video = np.asarray(video), np.asarray(truth_video)
  check(video, truth_video, world_config)
  finite = np.all(np.isfinite(video), axis=(2, 3, 4))
  video = np.where(finite[..., None, None, None], video, 0).clip(-1, 1)
  b, f = video.shape[:2]
  balls = world_config.num_balls
  frames = ((video.reshape(b * f, -1, 3) + 1) / 2).astype(np.float32)
  position = np.asarray(state["position"], np.float32).reshape(-1, balls, 2)
  colour = np.repeat(np.asarray(state["colour"], np.float32), f, axis=0)

  fit = manifold.fit(frames, position, colour, world_config, objects.CONTRAST)
  drawn = manifold.composite(fit.drawn_background, fit.share, fit.colour)
  off = 4 * np.square(frames - drawn).mean((1, 2))
  broken = off > BROKEN
  there = objects.present(frames, fit)
  expected = objects.shown(world_config, position)
  intact = objects.intact(frames, drawn, fit, there, expected, world_config)
  hue = objects.hue_of(objects.seen_colour(frames, fit))
  true_hue = objects.hue_of(colour)
  hue_error = objects.hue_error(hue, there, true_hue, expected)

  by_frame = lambda x: x.reshape(b, f, *x.shape[1:])
  background = by_frame(fit.background)
  true_background = np.asarray(state["background"])[:, None]
  change = np.abs(np.diff(background, axis=1, prepend=background[:, :1]))
  metrics = {
    "off_manifold": by_frame(off),
    "broken": by_frame(broken),
    "object_share": by_frame(intact),
    "failed": by_frame(broken | ~intact),
    "background_error": np.linalg.norm(background - true_background, axis=-1),
    "hue_error": by_frame(hue_error),
    "flicker": change.mean(-1),
    "psnr": psnr(video, truth_video),
    "speed_error": objects.speed_error(
      by_frame(fit.position), by_frame(there), world_config
    ),
  }
  return {
    name: np.where(finite, x.astype(np.float64), WORST[name])
    for name, x in metrics.items()
  }


def psnr(video: np.ndarray, truth_video: np.ndarray) -> np.ndarray:
  """Gives dB [b f] of videos [b f h w 3] in [-1, 1], at most 66."""
  error = np.square(video - truth_video).mean((2, 3, 4), dtype=np.float64)
  return 10 * np.log10(4 / np.maximum(error, _PSNR_FLOOR))


def check(
  video: np.ndarray, truth_video: np.ndarray, config: worlds.WorldConfig
) -> None:
  """Refuses videos that are not of this world, or have no truth.

  Raises:
    UserError: shapes that do not belong together, or more than 4 balls.
  """
  size = (config.height, config.width, 3)
  if video.ndim != 5 or video.shape[2:] != size:
    raise UserError(
      f"a video to measure has shape {video.shape}; its world draws "
      f"[videos, frames, {config.height}, {config.width}, 3]"
    )
  if truth_video.shape != video.shape:
    raise UserError(
      f"the video {video.shape} and its truth {truth_video.shape} differ in "
      "shape; measure as many frames as there is truth for"
    )
  if config.num_balls > 4:
    raise UserError(
      f"num_balls={config.num_balls}: drift is measured with 4 balls or fewer"
    )


def manifold_psnr(off_manifold: np.ndarray) -> np.ndarray:
  """Turns off_manifold into a quality in dB, at most 56."""
  return 10 * np.log10(4 / (off_manifold + 1e-5))


def _drift(score: np.ndarray) -> float:
  """Delta of a score [b f], first fifth minus all; positive where it falls.

  [BAgger Delta]
  """
  early = max(1, score.shape[1] // 5)
  return float(score[:, :early].mean() - score.mean())


def _generated(metrics: FrameMetrics, given: int) -> FrameMetrics:
  frames = next(iter(metrics.values())).shape[1]
  if not 0 <= given <= frames - 3:
    raise UserError(
      f"{frames} frames of which {given} are given leave {frames - given} "
      "generated; thirds of a rollout need 3 or more"
    )
  return {name: x[:, given:] for name, x in metrics.items()}


def _thirds(x: np.ndarray) -> list[float]:
  return [float(part.mean()) for part in np.array_split(x, 3, axis=1)]


def _psnr_at(psnr: np.ndarray) -> dict[str, float | None]:
  long_enough = lambda n: psnr.shape[1] >= n
  return {
    str(n): float(psnr[:, n - 1].mean()) if long_enough(n) else None
    for n in HORIZONS
  }


def summarize(metrics: FrameMetrics, given: int) -> Summary:
  """Sums up one seed's metrics over videos and thirds of the generated frames.

  Args:
    metrics: of `frame_metrics`, or of `physics.frame_metrics`.
    given: how many frames at the start were given, not generated.

  Returns:
    delta_db (drift of the PSNR to the manifold; lower is better, 0 is none);
    off_manifold, broken, object_share, failed, background_error, hue_error and
    flicker and, where they were measured, violation and state_error, each a
    list of three thirds; psnr_at, by generated frame counted
    from 1 (None beyond the end); seeds, which is 1.

  Raises:
    UserError: fewer than 3 generated frames.
  """
  made = _generated(metrics, given)
  return {
    "delta_db": _drift(manifold_psnr(made["off_manifold"])),
    **{name: _thirds(made[name]) for name in _THIRDS if name in made},
    "psnr_at": _psnr_at(made["psnr"]),
    "seeds": 1,
  }


def aggregate(summaries: Sequence[Summary]) -> Summary:
  """Means over seeds, of the same keys; `range` holds [lowest, highest]."""
  plain = [
    {k: v for k, v in s.items() if k not in ("seeds", "range")}
    for s in summaries
  ]
  return {
    **_merge(plain, lambda x: float(np.mean(x))),
    "seeds": len(plain),
    "range": _merge(plain, lambda x: [float(np.min(x)), float(np.max(x))]),
  }


def _merge(values: Sequence[Any], join) -> Any:
  first = values[0]
  if first is None:
    return None
  if isinstance(first, dict):
    return {k: _merge([v[k] for v in values], join) for k in first}
  if isinstance(first, list):
    return [_merge(list(v), join) for v in zip(*values, strict=True)]
  return join(values)


@dataclasses.dataclass(frozen=True)
class Curve:
  """A metric over the frames: [f] arrays; `spread` says what the band is."""

  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray
  spread: str


def curves(seeds: Sequence[FrameMetrics]) -> dict[str, Curve]:
  """Gives every metric over the frames, averaged over videos and seeds.

  Args:
    seeds: the metrics of each seed, of one length.

  Returns:
    A curve a metric, and `manifold_psnr`. The band is the range of the seeds'
    means or, of a single seed, the 95 % confidence interval of the mean over
    its videos.
  """
  with_psnr = [
    {**m, "manifold_psnr": manifold_psnr(m["off_manifold"])} for m in seeds
  ]
  return {
    name: _curve([m[name] for m in with_psnr])
    for name in with_psnr[0]
    if name != "speed_error"
  }


def _curve(seeds: Sequence[np.ndarray]) -> Curve:
  means = np.stack([x.mean(0) for x in seeds])
  mean = means.mean(0)
  if len(seeds) > 1:
    spread = f"range over {len(seeds)} seeds"
    return Curve(mean, means.min(0), means.max(0), spread)
  videos = len(seeds[0])
  half = 1.96 * seeds[0].std(0) / np.sqrt(max(videos - 1, 1))
  spread = f"95 % interval of the mean of {videos} videos"
  return Curve(mean, mean - half, mean + half, spread)


def frame_metrics_real(
  video: np.ndarray, reference: np.ndarray | None = None, window: int = 8
) -> FrameMetrics:
  """Measures drift where there is no state to compare with: real video.

  Args:
    video: [b f h w 3] in [-1, 1].
    reference: the true continuation, of the same shape, where it is known.
    window: frames at the start that every later frame is compared with.

  Returns:
    Arrays [b f]: sharpness (variance of the luma's Laplacian), saturation (mean
    difference of the largest and smallest channel) and contrast (standard
    deviation of luma), each divided by its mean over the first window;
    brightness, the mean luma in [0, 1] minus its mean over the first window;
    flicker, the mean absolute change of a pixel since the last frame, in
    [0, 1]; with a reference also psnr in dB. A frame with a value that is not
    finite counts as black.

  Raises:
    UserError: shapes that do not belong together.
  """
  video = np.asarray(video)
  if video.ndim != 5 or video.shape[-1] != 3:
    raise UserError(
      f"a video to measure has shape {video.shape}; give [videos, frames, "
      "height, width, 3]"
    )
  if reference is not None and reference.shape != video.shape:
    raise UserError(
      f"the video {video.shape} and its reference {reference.shape} differ in "
      "shape; cut both to the same frames and size"
    )
  finite = np.isfinite(video).all((2, 3, 4), keepdims=True)
  x = np.where(finite, video, -1).clip(-1, 1).astype(np.float32)
  rgb = (x + 1) / 2
  luma = rgb @ np.array([0.299, 0.587, 0.114], np.float32)
  across = luma[..., 2:, 1:-1] + luma[..., :-2, 1:-1]
  along = luma[..., 1:-1, 2:] + luma[..., 1:-1, :-2]
  laplacian = across + along - 4 * luma[..., 1:-1, 1:-1]
  start = lambda m: m[:, :window].mean(1, keepdims=True)
  relative = lambda m: m / np.maximum(start(m), 1e-6)
  brightness = luma.mean((2, 3))
  change = np.abs(np.diff(rgb, axis=1, prepend=rgb[:, :1]))
  metrics = {
    "sharpness": relative(laplacian.var((2, 3))),
    "saturation": relative((rgb.max(-1) - rgb.min(-1)).mean((2, 3))),
    "contrast": relative(luma.std((2, 3))),
    "brightness": brightness - start(brightness),
    "flicker": change.mean((2, 3, 4)),
  }
  if reference is not None:
    metrics["psnr"] = psnr(x, reference)
  return {name: m.astype(np.float64) for name, m in metrics.items()}


def summarize_real(metrics: FrameMetrics, given: int = 0) -> Summary:
  """Sums up `frame_metrics_real`: thirds of the generated frames.

  Returns:
    delta, the drift of sharpness, saturation and contrast (positive where they
    fade, 0 is none); thirds of each metric; psnr_at where there was a
    reference.

  Raises:
    UserError: fewer than 3 generated frames.
  """
  made = _generated(metrics, given)
  summary: Summary = {
    "delta": {
      name: _drift(made[name])
      for name in ("sharpness", "saturation", "contrast")
    },
    **{name: _thirds(x) for name, x in made.items() if name != "psnr"},
  }
  if "psnr" in made:
    summary["psnr_at"] = _psnr_at(made["psnr"])
  return summary
