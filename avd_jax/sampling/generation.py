"""Text to video, extension of images and videos, prompts that change: what
`avd sample` does, from what a user asks for to a file.

Everything that can be wrong is found by `plan`, which reads configs and no
weights. `run` then loads one model at a time: the text encoder, which is let go
before the VAE encodes what is given, and the transformer.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from avd_jax import config as config_lib
from avd_jax.data import captions, pipeline, video, video_stream
from avd_jax.errors import UserError
from avd_jax.models.umt5 import UMT5Config
from avd_jax.sampling import loading, spaces, streaming
from avd_jax.sampling import prompts as prompts_lib
from avd_jax.sampling.prompts import Prompt
from avd_jax.sampling.sampler import Sampler
from avd_jax.sampling.texts import Texts
from avd_jax.wan import importing, prompting


@dataclasses.dataclass(frozen=True)
class Request:
  """What a user asks for; None leaves a choice to the run.

  Attributes:
    workdir: a trained run, or an imported checkpoint.
    out: file to write.
    overrides: `--config.field=value` arguments; see `loading.load`.
    prompts: what to show, and when; none at all is the given video's caption.
    negative: what not to show; guidance leads away from it.
    frames: length; or
    seconds: length.
    height, width: of a frame, in pixels.
    given: first frames that are given; None is 1 of an image, else 0.
    file: video or image that they are of; None is a held-out one of the run.
    index: which of those.
    wan: imported checkpoint whose VAE and text encoder a run on latents uses.
    steps, guidance: over the run's own.
    fps: of the file; prompts' times are counted by it.
    scale: whole factor to enlarge pixels by.
    seed: of the noise.
    overwrite: `out` may exist, and is replaced.
    cut_prompts: those that are too long lose their ends.
    fit: "crop" or "refuse" given frames of another shape than the video's.
  """

  workdir: str
  out: str
  overrides: Sequence[str] = ()
  prompts: Sequence[Prompt] = ()
  negative: str | None = None
  frames: int | None = None
  seconds: float | None = None
  height: int | None = None
  width: int | None = None
  given: int | None = None
  file: str | None = None
  index: int = 0
  wan: str | None = None
  steps: int | None = None
  guidance: float | None = None
  fps: float | None = None
  scale: int | None = None
  seed: int = 0
  overwrite: bool = False
  cut_prompts: bool = False
  fit: str = "crop"


@dataclasses.dataclass(frozen=True)
class Plan:
  """A request that can be met.

  Attributes:
    request: it.
    config: the run's, as it will be sampled with.
    space: what its videos are made of.
    frames: to write.
    size: (height, width) in pixels.
    fps: of the file.
    scale: to enlarge pixels by.
    clip: given frames [k H W 3], uint8 or float in [-1, 1].
    texts: what is said, of all prompts.
    starts: the chunk from which each is.
    notes: lines on what is not used as it was given.
  """

  request: Request
  config: ConfigDict
  space: spaces.Space
  frames: int
  size: tuple[int, int]
  fps: float
  scale: int
  clip: np.ndarray
  texts: tuple[str, ...]
  starts: tuple[int, ...]
  notes: tuple[str, ...] = ()

  @property
  def latents(self) -> int:
    """Latent frames to make, whole chunks of them, given ones included."""
    size = self.config.model.chunk_frames
    return -(-self.space.cover(self.frames) // size) * size

  @property
  def room(self) -> int:
    """Chunks that a cache has room for.

    Raises:
      UserError: fewer than are given.
    """
    size, given = self.config.model.chunk_frames, len(self.clip)
    done = self.space.cover(given) // size if given else 0
    sampler = Sampler(self.config, None)
    return sampler.room(done, self.latents // size, self.starts)[1]


def plan(request: Request) -> Plan:
  """Finds out what a request comes to, or what is wrong with it.

  Raises:
    UserError: whatever is; nothing was computed or written.
  """
  _check_numbers(request)
  _check_out(request)
  config = loading.read_config(
    request.workdir, request.overrides, request.frames or 0
  )
  if request.steps is not None:
    config.sampling.steps = request.steps
  if request.guidance is not None:
    config.sampling.guidance = request.guidance
  said = request.prompts or request.negative or request.guidance
  if config.model.text == "none" and said:
    raise UserError(
      f"{request.workdir} was trained without text (model.text 'none'):"
      " prompts and --guidance have nothing to act on"
    )
  if request.negative is not None and config.sampling.guidance == 1.0:
    raise UserError(
      "--negative-prompt: sampling.guidance 1 leads away from nothing; give"
      " --guidance 5, or the like"
    )
  space = spaces.of(config, request.workdir, request.wan)
  size = space.size(request.height, request.width)
  fps = space.fps if request.fps is None else request.fps
  clip, caption = _given(request, config, space)
  clip, notes = _fitted(request, clip, size)
  frames = _frames(request, space, len(clip), fps)
  prompts = list(request.prompts) or [_unsaid(request, config, caption)]
  chunk = config.model.chunk_frames
  starts = prompts_lib.starts(
    prompts,
    lambda i: space.begins(i * chunk) / fps,
    -(-space.cover(frames) // chunk),
  )
  found = Plan(
    request,
    config,
    space,
    frames,
    size,
    fps,
    _scale(request, config, size),
    clip,
    tuple(prompt.text for prompt in prompts),
    starts,
  )
  notes += _check_texts(found)
  _ = found.room
  return dataclasses.replace(found, notes=notes)


def _check_numbers(request: Request) -> None:
  for name, least in (("frames", 1), ("given", 0), ("steps", 1), ("scale", 1)):
    value = getattr(request, name)
    if value is not None and value < least:
      raise UserError(f"--{name} {value}: at least {least}")
  for name in ("fps", "seconds"):
    value = getattr(request, name)
    if value is not None and not 0 < value < math.inf:
      raise UserError(f"--{name} {value}: must be positive and finite")
  if request.frames is not None and request.seconds is not None:
    raise UserError("--frames and --seconds both say how long: give one")


def _check_out(request: Request) -> None:
  try:
    video_stream.check_writable(request.out)
  except UserError as error:
    raise UserError(f"--out {error}") from error
  out, file = Path(request.out), Path(request.file or "")
  if not out.exists():
    return
  if request.file and file.exists() and out.samefile(file):
    raise UserError(f"--out {out} is --video itself: give another file")
  if not request.overwrite:
    raise UserError(f"--out {out} exists: give another file, or --overwrite")


def _frames(
  request: Request, space: spaces.Space, given: int, fps: float
) -> int:
  """Length of the video."""
  if request.seconds is not None:
    frames = max(1, round(request.seconds * fps))
  else:
    frames = request.frames or max(space.frames, 2 * given)
  if given >= frames:
    raise UserError(
      f"{frames} frames are asked for and {given} are given: nothing is left"
      " to make"
    )
  return frames


def _scale(request: Request, config: ConfigDict, size: tuple[int, int]) -> int:
  """Toy worlds are enlarged, or nothing could be seen."""
  if request.scale is not None or config.model.text == "embeddings":
    return request.scale or 1
  return max(1, 256 // size[1])


def _given(
  request: Request, config: ConfigDict, space: spaces.Space
) -> tuple[np.ndarray, str]:
  """The given frames [k H W 3] and the caption that comes with them."""
  image = Path(request.file or "").suffix.lower() in video.IMAGES
  count = request.given
  if count is None:
    count = 1 if image else 0
  space.check_given(count)
  if request.file is None:
    return _held_out(request, config, count)
  if image:
    if count != 1:
      raise UserError(f"--given {count}: {request.file} is an image, 1 frame")
    clip = video.read_image(request.file)
  else:
    if not count:
      raise UserError("--video needs --given K: how many of its frames to use")
    # As the model was shown its videos, whatever the rate of the file to write.
    stride, rate = config.data.stride, config.data.fps
    if config.model.text == "embeddings":
      rate = space.fps
    if rate:
      stride = max(1, round(video.probe(request.file).fps / rate))
    clip = video.read_clip(request.file, 0, count, stride)
  return clip, ""


def _held_out(
  request: Request, config: ConfigDict, count: int
) -> tuple[np.ndarray, str]:
  if not count:
    return np.zeros((0, 1, 1, 3), np.uint8), ""
  data = config_lib.typed(pipeline.DataConfig, config.data)
  if config.model.text == "embeddings":
    raise UserError(f"--given {count}: of which video or image? Give --video")
  if count > data.frames:
    raise UserError(
      f"--given {count}: the run's clips have {data.frames} frames"
    )
  source = pipeline.make_source(data, "eval")
  if not 0 <= request.index < len(source):
    raise UserError(f"--index {request.index}: there are {len(source)} videos")
  record = source[request.index]
  return record["video"][:count], record["caption"]


def _fitted(
  request: Request, clip: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, tuple[str, ...]]:
  """The given frames in the video's size, and what is to be said of it."""
  if clip.shape[1:3] == size:
    return clip, ()
  if not len(clip):
    return np.zeros((0, *size, 3), np.uint8), ()
  height, width = clip.shape[1:3]
  notes = ()
  for side, lost in zip(
    ("height", "width"), video.cropped((height, width), size), strict=True
  ):
    if not lost:
      continue
    what = request.file or f"held-out video {request.index}"
    note = (
      f"{what} is {width}x{height}, the video {size[1]}x{size[0]}:"
      f" {100 * lost:.1f} % of its {side}"
    )
    if request.fit == "refuse":
      raise UserError(
        f"{note} would be cropped; give another --height and --width, or"
        " --fit crop"
      )
    notes = (f"{note} is cropped, half at either end",)
  return video.resize_crop(video.to_uint8(clip), *size), notes


def _unsaid(request: Request, config: ConfigDict, caption: str) -> Prompt:
  """What is said where the user says nothing."""
  if config.model.text == "embeddings":
    raise UserError("give --prompt: what the video shows")
  return Prompt(0.0, caption)


def _check_texts(found: Plan) -> tuple[str, ...]:
  """Says which prompts are cut, or refuses those the model cannot hold."""
  config, request = found.config, found.request
  length, cut = config.data.text_length, request.cut_prompts
  said = [*found.texts, request.negative or ""]
  if config.model.text != "embeddings":
    notes = []
    for text in dict.fromkeys(said):
      size = len(text.encode())
      notes += prompting.check_length(text, size, length, cut, "bytes")
    return tuple(notes)
  checkpoint = spaces.companion(request.workdir, request.wan, "text")
  notes = prompting.check(checkpoint, said, length, cut)
  folder = importing.component(checkpoint, "text")
  width = importing.read_config(UMT5Config, folder).dim
  if width != config.model.text_dim:
    raise UserError(
      f"{folder}: embeddings of {width} dimensions, the model reads"
      f" {config.model.text_dim}: give its own text encoder"
    )
  return tuple(notes)


def _embed(found: Plan) -> tuple[Texts, np.ndarray | None]:
  """What the model is told, and what guidance leads away from."""
  request, length = found.request, found.config.data.text_length
  said = [*found.texts, request.negative or ""]
  if found.config.model.text == "embeddings":
    checkpoint = spaces.companion(request.workdir, request.wan, "text")
    values = prompting.embed(checkpoint, said, length)
  else:
    said = [captions.beginning(text, length) for text in said]
    values = np.stack([captions.encode_bytes(text, length) for text in said])
  texts = tuple(value[None] for value in values[:-1])
  return Texts(found.starts, texts), values[-1]


def run(
  found: Plan,
  on_frames: Callable[[int], Any] = lambda count: None,
  mesh: Mesh | None = None,
  memory: int | None = None,
) -> streaming.Pace:
  """Makes the video of a plan and writes it as it is made.

  Args:
    found: what `plan` found.
    on_frames: hears of frames that were written.
    mesh: what the transformer runs on (`mesh.context`, `mesh.tensor`); None,
      and for the other models, is the default device.
    memory: bytes that a device has; None is not known.

  Returns:
    When frames came, counted from when all models were loaded.

  Raises:
    UserError: a mesh that does not cut the video's tokens or the model evenly,
      a cache that a device cannot hold, an attention implementation that cannot
      do its part, a damaged checkpoint, or a file that cannot be written.
  """
  grid = found.space.grid(*found.size)
  loading.check(found.config, grid, found.room, mesh, memory)
  texts, null = _embed(found)
  given = _encoded(found)
  sampler = loading.load(found.request.workdir, mesh=mesh)
  sampler = dataclasses.replace(sampler, config=found.config, null_text=null)
  parts = _parts(found, sampler, given, texts)
  decode = found.space.decode(*found.size)
  out = found.request.out
  with video_stream.VideoWriter(out, found.fps, found.scale) as file:
    return streaming.write(file, parts, decode, found.frames, on_frames)


def _encoded(found: Plan) -> np.ndarray:
  """The given frames as latents [1 g h w c]."""
  if len(found.clip):
    return found.space.encode(found.clip)
  grid = found.space.grid(*found.size)
  channels = found.config.model.channels
  return np.zeros((1, 0, *grid, channels), np.float32)


def _parts(
  found: Plan, sampler: Sampler, given: np.ndarray, texts: Texts
) -> Iterator[tuple[jax.Array, int]]:
  """(latents, chunks of them that were made) of the video, in order."""
  size, done = found.config.model.chunk_frames, 0
  here = jax.numpy.zeros(()).sharding  # where they are decoded
  needed = found.space.cover(found.frames)
  for first in range(0, given.shape[1] - size + 1, size):
    yield jax.numpy.asarray(given[:, first : first + size]), 0
    done += size
  seed = found.request.seed
  for made, _ in sampler.segments(given, texts, found.latents, seed):
    count = made.shape[1]
    yield jax.device_put(made[:, : needed - done], here), count // size
    done += count
