"""A video into its file while it is being made.

The device is always handed the next chunk before the last one is fetched: a
chunk's decoding is queued right behind it, the next chunk behind that, and a
thread waits for frames, encodes and writes them.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from avd_jax.data.video_stream import VideoWriter
from avd_jax.sampling.spaces import Decode

_AHEAD = 2  # parts that wait to be written, at most


class Pace(NamedTuple):
  """When frames came: seconds to the first that were made, compiling included,
  and seconds a chunk from there on (None where there was one part alone)."""

  first: float
  chunk: float | None

  def __str__(self) -> str:
    line = f"first frames after {self.first:.1f} s"
    if self.chunk is None:
      return line
    return f"{line}, then {self.chunk:.2g} s a chunk"


def write(
  file: VideoWriter,
  parts: Iterable[tuple[jax.Array, int]],
  decode: Decode,
  frames: int,
  on_frames: Callable[[int], Any] = lambda count: None,
) -> Pace:
  """Decodes parts of a video and writes them, as they come.

  Args:
    file: written to from another thread, as long as this runs.
    parts: (latents [1 f h w c], how many chunks of them were made), the whole
      video in order; it is asked for the next part while the last is written.
    decode: latents to frames.
    frames: to write; what comes after is dropped.
    on_frames: hears of frames that were written, in that thread.

  Raises:
    UserError: the file cannot be written. What making a part raises comes out
      as it is; what was written stays.
  """
  start, arrived = time.perf_counter(), []

  def put(pixels, made):
    for some in pixels:
      some = np.asarray(some)[: frames - file.frames]
      if len(some):
        file.write(some)
        on_frames(len(some))
    if made:
      arrived.append((time.perf_counter() - start, made))

  pool, waiting = ThreadPoolExecutor(1), deque[Future]()
  try:
    for latents, made in parts:
      waiting.append(pool.submit(put, decode(latents), made))
      if len(waiting) > _AHEAD:
        waiting.popleft().result()
    for written in waiting:
      written.result()
  finally:
    pool.shutdown(cancel_futures=True)
  return _pace(arrived)


def _pace(arrived: list[tuple[float, int]]) -> Pace:
  first, last = arrived[0][0], arrived[-1][0]
  later = sum(made for _, made in arrived[1:])
  return Pace(first, (last - first) / later if later else None)
