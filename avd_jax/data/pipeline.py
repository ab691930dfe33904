"""From a source to batches: grain, sharded by process, resumable by step.

Nothing but the step number is needed to resume. The order of an epoch and the
generator that draws a clip belong to a record's place in one endless global
stream; a batch is the next few places of it, and a process takes its share of
each. So step k holds the same records whatever the number of processes and
workers, and starting at step k is a slice, not a replay.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from absl import flags

from avd_jax.data import captions, worlds
from avd_jax.errors import UserError
from avd_jax.typing import Batch

SOURCES = ("worlds", "video", "tfds", "latents")


@runtime_checkable
class Source(Protocol):
  """What the pipeline reads.

  `source[i]` is a fixed video of record i, for evaluation; `clip(i, rng)` is
  one drawn by `rng`, for training. Both are dictionaries with `video`, float32
  [f, h, w, 3] in [-1, 1] or latents [f, h, w, c], and `caption`, str. Where
  there are such, `text` is the caption's embedding, float32 [m, d], and `given`
  how many first chunks are context without loss.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...

  def clip(self, index: int, rng: np.random.Generator) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where videos come from and how they are batched.

  Attributes:
    source: "worlds" (drawn), "video" (a folder of files), "tfds", or "latents"
      (what `avd encode` wrote).
    path: the folder of "video" or "latents"; for "tfds" the data_dir, or the
      folder of one prepared data set.
    frames, height, width: of a clip, in pixels; of "latents", in latents.
    batch_size: global, over all processes.
    text_length: caption tokens.
    seed: of worlds, order and clips; 0 to 2**32 - 1.
    num_workers: worker processes; 0 reads in threads of this process.
    num_threads: reading threads of each process, where sources wait for disks
      or decode; worlds are drawn by one.
    stride: every stride-th frame of a file; exclusive with fps.
    fps: if given, the stride that comes nearest to this rate, file by file.
    eval_files: files of a folder (videos of "latents") held out for the eval
      split, spread evenly over the sorted list; with 0 both splits read all.
    cache_mb: a folder that fits in this, at the size of a clip, is decoded
      once and kept in memory (of each process); 0 decodes every clip anew.
    name: of the TFDS data set; "" where path is its own folder.
    split, eval_split: TFDS splits for training and evaluation.
    video_key, caption_key: TFDS features, "/" for nested ones; caption_key ""
      leaves captions empty.
    aggregate: directory of a store of trajectories (see aggregate) that are
      mixed into the training split; "" for none.
    aggregate_rounds: rounds of it that are read: 1 to this one.
    aggregate_prefix: first chunks of a trajectory's clip without loss.
    num_videos: different training worlds; a world is drawn when asked for.
    kind, num_balls, radius, speed, background_low, background_high,
      caption_detail: see worlds.WorldConfig.

  Raises:
    UserError: a value outside its range.
  """

  source: str = "worlds"
  path: str = ""
  frames: int = 16
  height: int = 12
  width: int = 12
  batch_size: int = 16
  text_length: int = 64
  seed: int = 0
  num_workers: int = 0
  num_threads: int = 4
  stride: int = 1
  fps: float | None = None
  eval_files: int = 0
  cache_mb: int = 512
  name: str = ""
  split: str = "train"
  eval_split: str = "test"
  video_key: str = "video"
  caption_key: str = ""
  aggregate: str = ""
  aggregate_rounds: int = 0
  aggregate_prefix: int = 0
  num_videos: int = 1 << 20
  kind: str = "balls"
  num_balls: int = 1
  radius: float = 2.0
  speed: float = 1.25
  background_low: float = 0.1
  background_high: float = 0.5
  caption_detail: str = "count"

  def __post_init__(self):
    if self.source not in SOURCES:
      raise UserError(f"source={self.source!r}: give one of {SOURCES}")
    for field, least in (
      ("frames", 1),
      ("height", 1),
      ("width", 1),
      ("batch_size", 1),
      ("text_length", 1),
      ("num_workers", 0),
      ("num_threads", 0),
      ("stride", 1),
      ("eval_files", 0),
      ("cache_mb", 0),
      ("aggregate_rounds", 0),
      ("aggregate_prefix", 0),
      ("num_videos", 1),
    ):
      value = getattr(self, field)
      if value < least:
        raise UserError(f"{field}={value}: give {least} or more")
    if not 0 <= self.seed < 1 << 32:
      raise UserError(f"seed={self.seed}: give 0 to 2**32 - 1")
    if self.fps is not None and (self.fps <= 0 or self.stride != 1):
      raise UserError(
        f"fps={self.fps}, stride={self.stride}: give a positive fps, or a "
        "stride, not both"
      )

  @property
  def world(self) -> worlds.WorldConfig:
    """The fields of a world, as its own config."""
    return worlds.WorldConfig(
      **{
        f.name: getattr(self, f.name)
        for f in dataclasses.fields(worlds.WorldConfig)
      }
    )


def make_source(cfg: DataConfig, split: str = "train") -> Source:
  """Opens the source of a config.

  The splits share no video: worlds draw from another stream, folders hold out
  `eval_files`, TFDS reads `eval_split`. Trajectories are for training alone.

  Args:
    cfg: which source.
    split: "train" or "eval".

  Returns:
    The source, its captions checked against `text_length` where they are known
    without reading videos.

  Raises:
    UserError: unknown split, or whatever the source finds wrong (see sources).
  """
  if split not in ("train", "eval"):
    raise UserError(f"split={split!r}: give 'train' or 'eval'")
  if not cfg.aggregate or split == "eval":
    return _make_source(cfg, split)
  from avd_jax.data import aggregate

  rounds, given = cfg.aggregate_rounds, cfg.aggregate_prefix
  trajectories = aggregate.Aggregate(cfg.aggregate, rounds, cfg.frames, given)
  return aggregate.Mixed(_make_source(cfg, split), trajectories)


def _make_source(cfg: DataConfig, split: str) -> Source:
  if cfg.source == "worlds":
    stream = worlds.TRAIN if split == "train" else worlds.EVAL
    source = worlds.World(
      cfg.world, cfg.seed, cfg.num_videos, cfg.frames, stream
    )
    captions.encode_bytes(worlds.longest_caption(cfg.world), cfg.text_length)
    return source
  if cfg.source == "latents":
    from avd_jax.data import latent_store

    if not cfg.path:
      raise UserError(
        "data.path is empty: name the store of latents that `avd encode"
        " --videos DIR --checkpoint CKPT --out STORE` made"
      )
    source = latent_store.LatentSource(
      cfg.path, cfg.frames, split, cfg.eval_files
    )
    for what, found, asked in (
      ("latents", source.spec.shape[1:3], (cfg.height, cfg.width)),
      ("text_length", source.spec.text_length, cfg.text_length),
    ):
      if found != asked:
        raise UserError(
          f"{cfg.path}: its {what} are {found}, data.height, width and"
          f" text_length ask for {asked}"
        )
    return source
  # Not at the top: a run on worlds needs neither PyAV nor TFDS.
  from avd_jax.data import sources

  shape = {
    "frames": cfg.frames,
    "height": cfg.height,
    "width": cfg.width,
    "stride": cfg.stride,
    "fps": cfg.fps,
  }
  if cfg.source == "tfds":
    return sources.TfdsSource(
      cfg.name,
      cfg.path,
      cfg.split if split == "train" else cfg.eval_split,
      video_key=cfg.video_key,
      caption_key=cfg.caption_key,
      **shape,
    )
  source = sources.VideoFolderSource(
    cfg.path,
    split=split,
    eval_files=cfg.eval_files,
    cache_mb=cfg.cache_mb,
    **shape,
  )
  for path, caption in zip(source.paths, source.captions, strict=True):
    try:
      captions.encode_bytes(caption, cfg.text_length)
    except UserError as error:
      raise UserError(f"{path.with_suffix('.txt')}: {error}") from None
  return source


def text_of(record: dict[str, Any], length: int) -> np.ndarray:
  """A record's text: its embedding [m d], or its caption's bytes [m]."""
  if "text" in record:
    return record["text"]
  return captions.encode_bytes(record["caption"], length)


@dataclasses.dataclass(frozen=True)
class _SampleClip(grain.transforms.RandomMap):
  """Reads record `index` of the source as a clip and its tokens."""

  source: Source
  text_length: int

  def random_map(self, index: int, rng: np.random.Generator) -> Batch:
    record = self.source.clip(int(index), rng)
    return Batch(
      x=record["video"],
      text=text_of(record, self.text_length),
      given=np.int32(record.get("given", 0)),
    )


def batches(
  cfg: DataConfig,
  source: Source,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Yields training batches without end, from any step on.

  The batches of one step, over all processes, hold the same records whatever
  `process_count` and `num_workers`; no record is in two of them. Closing the
  iterator (or letting go of it) ends the worker processes.

  Args:
    cfg: batch size, seed, workers.
    source: what to read.
    start_step: the first batch's step; resuming at k equals skipping k batches.
    process_index, process_count: this process, of how many.

  Returns:
    An iterator of numpy Batches, this process's share: x float32 [b, f, h, w,
    c], text int32 [b, m], given int32 [b], b = batch_size / process_count.

  Raises:
    UserError: a batch size that the processes cannot share equally.
  """
  if cfg.batch_size % process_count:
    raise UserError(
      f"batch_size={cfg.batch_size} (global) cannot be shared by "
      f"{process_count} processes; make it a multiple of {process_count}"
    )
  if not 0 <= process_index < process_count:
    raise UserError(f"process_index={process_index} of {process_count}")
  if start_step < 0:
    raise UserError(f"start_step={start_step}: give 0 or more")
  stream = (
    grain.MapDataset.range(len(source))
    .seed(cfg.seed)
    .shuffle()
    .repeat(None)
    # Before any slice, so that a clip is drawn by the record's global place:
    # the same clip in one process of eight and in one of one.
    .random_map(_SampleClip(source, cfg.text_length))
  )
  # Shares of a batch side by side: put together they are the batch of one
  # process, row for row, and so is every row's noise.
  shares = stream.batch(cfg.batch_size // process_count, drop_remainder=True)
  dataset = shares[start_step * process_count + process_index :: process_count]
  # Drawing a world never waits: a second thread would only fight for the lock.
  drawn = isinstance(getattr(source, "seed", source), worlds.World)
  threads = 1 if drawn else cfg.num_threads
  dataset = dataset.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4)
  )
  if cfg.num_workers:
    # Workers are handed the parent's flags, which are unreadable until parsed:
    # outside of absl.app.run nobody has.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(
      grain.multiprocessing.MultiprocessingOptions(num_workers=cfg.num_workers)
    )
  return _iterate(dataset)


def _iterate(dataset: grain.IterDataset) -> Iterator[Batch]:
  iterator = iter(dataset)
  try:
    yield from iterator
  finally:
    iterator.close()


def fixed_batch(
  cfg: DataConfig, source: Source, indices: Sequence[int]
) -> tuple[Batch, dict[str, np.ndarray] | None]:
  """Reads given records, for evaluation: the same ones every time.

  Args:
    cfg: text_length is used.
    source: what to read.
    indices: which records, b of them.

  Returns:
    The Batch, x float32 [b, f, h, w, c], text int32 [b, m] and given int32 [b];
    and the truth of a world (World's `state`, each leaf with a leading b), None
    for any other source.
  """
  records = [source[i] for i in indices]
  batch = Batch(
    x=np.stack([r["video"] for r in records]),
    text=np.stack([text_of(record, cfg.text_length) for record in records]),
    given=np.array([r.get("given", 0) for r in records], np.int32),
  )
  if "state" not in records[0]:
    return batch, None
  state = {
    key: np.stack([r["state"][key] for r in records])
    for key in records[0]["state"]
  }
  return batch, state
