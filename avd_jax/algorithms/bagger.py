"""BAgger's pure parts: what makes a corrective trajectory of a rollout.

A rollout runs from real to drifted. Its frames in reverse order run from
drifted to real: a demonstration of how to recover, with no teacher. Rounds of
it, with their files and their training, are in avd_jax.bagger.
"""

from typing import TypeVar

from avd_jax.errors import UserError

Video = TypeVar("Video")

REVERSED = "a reversed video of "
# Of 7 chunks, the first 4 are context: the paper's share.
PREFIX_SHARE = 4 / 7


def reverse(video: Video) -> Video:
  """Turns time around.

  Args:
    video: pixels [b f h w c], numpy or jax. Latents of a codec that packs
      several frames into one do not reverse this way: decode them first.

  Returns:
    The same frames, the last one first. [BAgger Alg. 1]
  """
  return video[:, ::-1]  # type: ignore[index]


def prefix_chunks(chunks: int, share: float = PREFIX_SHARE) -> int:
  """How many first chunks of a trajectory are context without loss.

  Args:
    chunks: n, of the clip that is trained on.
    share: of them that is prefix; the paper takes 4 of 7.

  Returns:
    The nearest number of chunks, 1 to n - 1: something must be given, and
    something must be left to learn.

  Raises:
    UserError: a single chunk, which cannot be both. [BAgger Alg. 1]
  """
  if chunks < 2:
    raise UserError(
      f"a trajectory of {chunks} chunk has no prefix and remainder; train on"
      " clips of 2 or more chunks"
    )
  return min(max(round(share * chunks), 1), chunks - 1)


def rewrite(caption: str) -> str:
  """The caption of the reversed video; of a reversed one, the original's.

  Captions that already carry the words, however often, are paired so that
  rewriting twice always gives back what was. "" says nothing, and stays so.
  [BAgger Alg. 1]
  """
  if not caption:
    return caption
  rest, times = caption, 0
  while rest.startswith(REVERSED) and rest != REVERSED:
    rest, times = rest.removeprefix(REVERSED), times + 1
  return caption.removeprefix(REVERSED) if times % 2 else REVERSED + caption
