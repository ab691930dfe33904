"""A round's trajectories: rolled out, reversed, stored, each of them once.

A batch of rollouts is the unit of work: its shard is written whole or not at
all, and everything in it follows from (config, round, batch). So a round that
was stopped goes on with the shards it lacks, and processes share the batches
without talking: process p of P makes batches p, p + P, ... on one device of
its own (its others idle meanwhile), all on one shared file system.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from avd_jax import config as config_lib
from avd_jax import sampling
from avd_jax.algorithms import bagger
from avd_jax.bagger import prompts
from avd_jax.data import aggregate, pipeline
from avd_jax.data import codec as codec_lib
from avd_jax.errors import UserError
from avd_jax.sampling import Sampler
from avd_jax.training import loop

# What random numbers are for. It stands last and is not 0: zeros at the end
# do not change a numpy seed sequence.
_CLIPS, _NOISE = 1, 2


@dataclasses.dataclass(frozen=True)
class Rollouts:
  """What the rollouts of all rounds have in common.

  Attributes:
    config: the run's, with its section `bagger`.
    store: directory of the aggregate.
  """

  config: ConfigDict
  store: Path

  @functools.cached_property
  def codec(self) -> Any:
    """A data.codec.Codec; to look whether it is one would load its weights."""
    setting = self.config.bagger.codec
    if not self._latent:
      return codec_lib.codec(setting)
    # Not at the top: rounds on pixels need nothing of Wan.
    from avd_jax.wan import codec as wan_codec

    return wan_codec.Encoder(setting.removeprefix("wan:"))

  def _let_go(self) -> None:
    """Frees a codec's weights: training needs the room."""
    self.__dict__.pop("codec", None)

  @property
  def _latent(self) -> bool:
    """Whether clips are latents, and their captions embeddings."""
    return self.config.data.source == "latents"

  @property
  def _text_bytes(self) -> int | None:
    """How long a caption may be; an embedded one is cut instead."""
    return None if self._latent else self.config.data.text_length

  @functools.cached_property
  def rewrite(self) -> prompts.Rewrite:
    return prompts.make(self.config.bagger.prompts)

  @property
  def frames(self) -> int:
    """Of a trajectory."""
    return self.config.bagger.frames or self.config.data.frames

  @functools.cached_property
  def seeds(self) -> pipeline.Source:
    """The videos that rollouts start from, as the model sees them."""
    return self._open(self.frames)

  def _open(self, frames: int) -> pipeline.Source:
    data = config_lib.typed(pipeline.DataConfig, self.config.data)
    if data.source == "worlds":
      # Goes on as long as a rollout does, and shows what it should have been.
      data = dataclasses.replace(data, frames=frames)
    return pipeline.make_source(data)

  @functools.cached_property
  def spec(self) -> aggregate.Spec:
    """What the store holds."""
    shape = (self.frames, *self.seeds[0]["video"].shape[1:])
    one = aggregate.Spec(self.codec.name, shape, self.config.model.chunk_frames)
    if not self._latent:
      return one
    return dataclasses.replace(
      one,
      text_encoder=self.codec.text_encoder,
      text_dim=self.codec.text_dim,
      text_length=self.config.data.text_length,
      dtype=self.seeds.spec.dtype,
    )

  def clips(self, round: int) -> list[int]:
    """The source clips of a round: `share` of all, drawn without repetition."""
    count = len(self.seeds)
    wanted = max(1, np.rint(self.config.bagger.share * count).astype(int))
    rng = np.random.default_rng((self.config.seed, round, 0, _CLIPS))
    return rng.choice(count, wanted, replace=False).tolist()

  def batches(self, round: int) -> list[list[int]]:
    """The same, in batches of rollouts made at once."""
    clips, size = self.clips(round), self.config.bagger.batch_size
    return [clips[i : i + size] for i in range(0, len(clips), size)]

  def files(self, round: int) -> list[Path]:
    """The shards of a round, one a batch."""
    count = len(self.batches(round))
    return [aggregate.shard(self.store, round, batch) for batch in range(count)]

  def check(self) -> None:
    """Refuses what would fail later, before anything is computed.

    Raises:
      UserError: a setting, a caption that cannot be rewritten, a codec that
        lacks something, or a store of other trajectories.
    """
    options, data = self.config.bagger, self.config.data
    chunk = self.config.model.chunk_frames
    bagger.prefix_chunks(data.frames // chunk, options.prefix)
    if options.given * chunk > data.frames:
      raise UserError(
        f"bagger.given {options.given} chunks: clips of data.frames"
        f" {data.frames} have {data.frames // chunk}"
      )
    self._check_codec()
    aggregate.claim(self.store, self.spec, write=False)
    self._let_go()
    self._check_captions()

  def _check_codec(self) -> None:
    """Refuses another codec than the one that the clips were encoded with."""
    if not self._latent:
      return
    seeds = self.seeds.spec  # what is wrong with them is not the codec's
    try:
      ours = self.spec
      self.codec.text("")  # whatever that needs, it has
    except UserError as error:
      raise UserError(f"bagger.codec: {error}") from None
    for what in ("codec", "text_encoder"):
      mine, theirs = getattr(ours, what), getattr(seeds, what)
      if mine != theirs:
        raise UserError(
          f"bagger.codec {self.config.bagger.codec} is {mine}, but the clips of"
          f" data.path were encoded with {theirs}: give the checkpoint that"
          " encoded them"
        )

  def _check_captions(self) -> None:
    """Rewrites every caption that rounds to come will rewrite."""
    options, data = self.config.bagger, self.config.data
    if self._latent and not options.prompts:
      return  # the template takes all, and latents would be read for it
    used = {
      clip
      for round in range(1, options.rounds + 1)
      if not aggregate.is_finished(self.store, round)
      for clip in self.clips(round)
    }
    # One frame is enough to know what a world is called.
    source = self._open(1) if data.source == "worlds" else self.seeds
    known = getattr(source, "captions", None)
    with tqdm(sorted(used), "read captions", delay=2.0, unit="clip") as bar:
      said = (source[i]["caption"] if known is None else known[i] for i in bar)
      prompts.check(self.rewrite, said, self._text_bytes)

  def make(
    self, round: int, workdir: Path, source: dict[str, Any], progress: bool
  ) -> None:
    """Makes what the store lacks of a round, and waits for other processes.

    Args:
      round: 1 or more.
      workdir: its newest weights roll out.
      source: says in every record which weights they are.
      progress: show a bar (on process 0).

    Raises:
      loop.Interrupted: after a signal; finished batches are stored.
    """
    if aggregate.is_finished(self.store, round):
      return
    lead = jax.process_index() == 0
    aggregate.claim(self.store, self.spec, write=lead)
    self.store.mkdir(parents=True, exist_ok=True)
    batches, files = self.batches(round), self.files(round)
    mine = range(jax.process_index(), len(batches), jax.process_count())
    whole = [b for b in mine if aggregate.is_whole(files[b], len(batches[b]))]
    # By every process, even one that has all of its batches: whoever opens
    # checkpoints waits until the others do.
    sampler = sampling.load(workdir)
    if self._latent:
      self.codec.load()
      null = self.seeds.null_text
      sampler = dataclasses.replace(sampler, null_text=null)
    each = self.frames - self._given
    with tqdm(
      desc=f"round {round}: roll out",
      total=each * sum(len(batches[b]) for b in mine),
      initial=each * sum(len(batches[b]) for b in whole),
      unit="frame",
      disable=not (progress and lead),
    ) as bar:
      missing = [b for b in mine if b not in whole]
      self._roll_out(sampler, round, missing, source, bar)
    self._let_go()
    if not lead:
      _wait(lambda: aggregate.is_finished(self.store, round))
      return
    others = [b for b in range(len(batches)) if b not in mine]
    _wait(
      lambda: all(aggregate.is_whole(files[b], len(batches[b])) for b in others)
    )
    aggregate.finish_round(self.store, round, files, self.clips(round))

  def _roll_out(
    self,
    sampler: Sampler,
    round: int,
    missing: Sequence[int],
    source: dict[str, Any],
    bar: tqdm,
  ) -> None:
    batches, files = self.batches(round), self.files(round)
    with loop.interruptible() as caught:
      for batch in missing:
        clips = batches[batch]
        hear = lambda frames, count=len(clips): bar.update(frames * count)
        header = {"round": round, "batch": batch, "checkpoint": source}
        records = self._trajectories(sampler, clips, header, hear)
        aggregate.write_shard(files[batch], records)
        if caught:
          raise loop.Interrupted(
            f"stopped in the rollouts of round {round}, finished batches are"
            f" in {self.store}; the same command goes on"
          )

  def _trajectories(
    self,
    sampler: Sampler,
    clips: Sequence[int],
    header: dict[str, Any],
    on_frames: Callable[[int], Any],
  ) -> list[bytes]:
    """Rolls out from some clips and turns time around: their records."""
    sources = [self.seeds[clip] for clip in clips]
    numbers = (self.config.seed, header["round"], header["batch"], _NOISE)
    seed = int(np.random.default_rng(numbers).integers(1 << 31))
    made, error = self._sample(sampler, sources, seed, on_frames)
    records = []
    for row, clip in enumerate(clips):
      said = sources[row]["caption"]
      own = {
        "clip": clip,
        "row": row,
        "seed": seed,
        "prompt": said,
        "caption": prompts.apply(self.rewrite, said, self._text_bytes),
        # Of the rollout from its real continuation, first frame first, as far
        # as that is known.
        "error": [float(e) for e in error[row]],
      }
      text = None
      if self._latent:
        text, own["tokens_cut"] = self.codec.text(own["caption"])
      back = self._turned(made[row : row + 1])[0]
      records.append(aggregate.pack(back, header | own, text))
    return records

  def _turned(self, made: np.ndarray) -> np.ndarray:
    """A rollout [1 f h w c] with its frames, not its latents, reversed."""
    pixels = np.clip(self.codec.decode(made), -1.0, 1.0)
    back = np.asarray(self.codec.encode(bagger.reverse(pixels)))
    if back.shape != made.shape:
      raise ValueError(
        f"codec {self.codec.name} made {back.shape} of {made.shape}"
      )
    return back.astype(self.spec.dtype)

  def _sample(
    self,
    sampler: Sampler,
    sources: list[dict[str, Any]],
    seed: int,
    on_frames: Callable[[int], Any],
  ) -> tuple[np.ndarray, np.ndarray]:
    """Rollouts [b f h w c] of some clips, and their error [b f]."""
    # A last, smaller batch is filled up: it would be another program.
    options, count = self.config.bagger, len(sources)
    size = max(count, min(options.batch_size, len(self.clips(1))))
    filled = sources + sources[:1] * (size - count)
    real = np.stack([record["video"] for record in filled])
    length = self.config.data.text_length
    text = [pipeline.text_of(record, length) for record in filled]
    made = sampler.extend(
      real[:, : self._given], np.stack(text), self.frames, seed, on_frames
    )
    shared = min(made.shape[1], real.shape[1])
    error = np.abs(made[:, :shared] - real[:, :shared]).mean((2, 3, 4))
    return made[:count], error[:count]

  @property
  def _given(self) -> int:
    """Real first frames of a rollout."""
    return self.config.bagger.given * self.config.model.chunk_frames

  def error_by_frame(self, round: int) -> list[float]:
    """Mean |rollout - real| of a round's trajectories, by frame."""
    errors = [
      header["error"]
      for file in self.files(round)
      for header in aggregate.headers(file)
    ]
    return np.mean(errors, 0).tolist()


def _wait(done: Callable[[], bool]) -> None:
  while not done():
    time.sleep(1.0)
