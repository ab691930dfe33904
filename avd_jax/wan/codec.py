"""The VAE and the text encoder of an imported checkpoint, as a codec.

What was encoded once (`encoding.py`) and what BAgger encodes again go the same
way, and are told apart from those of other weights by name.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from avd_jax.data import latent_store, video
from avd_jax.errors import UserError
from avd_jax.models import vae
from avd_jax.models.vae import VAEConfig
from avd_jax.typing import Params
from avd_jax.wan import importing
from avd_jax.wan.prompting import TextEncoder

TEXT_LENGTH = 512  # tokens; Wan pads its prompts to this
_PATCH = 2  # latents along height, and width, that the transformer joins
_MIB = 1 << 20


class Encoder:
  """A `data.codec.Codec`, and what prompts become.

  Latent 0 is frame 0, latent j > 0 is frames 4j - 3 to 4j: turned around, a
  video's frames fall into other groups. Of a rollout from one real chunk of 3
  latents, frames 0 to 8, the reversal of 81 frames has its last real frames in
  72 to 80; its last chunk, latents 18 to 20, begins at frame 69.

  Each network is loaded when it is first needed, so that mistakes show before;
  they stay until this object is let go. Videos go through one by one, a latent
  frame at a time: memory does not grow with their number, nor, but for pixels
  and latents themselves, with their length.

  Args:
    checkpoint: what `importing.run` wrote.
  """

  def __init__(self, checkpoint: str | Path):
    self._checkpoint = checkpoint
    self._text = TextEncoder(checkpoint, TEXT_LENGTH)

  def load(self) -> None:
    """Loads both networks now.

    Where several processes work together, all must, at the same point: whoever
    opens saved weights waits until the others do.
    """
    _ = self._vae, self._text.weights

  @functools.cached_property
  def _vae(self) -> tuple[VAEConfig, Params]:
    return importing.load_vae(self._checkpoint)

  @functools.cached_property
  def _encode_video(self):
    return jax.jit(functools.partial(vae.encode, self._vae[0]))

  @functools.cached_property
  def _decode_video(self):
    return jax.jit(functools.partial(vae.decode, self._vae[0]))

  def shape(self, frames: int, height: int, width: int) -> tuple[int, ...]:
    """Latents [f h w c] of a clip.

    Raises:
      UserError: a clip that VAE or transformer cannot take.
    """
    cfg = self._vae[0]
    side, step = cfg.spatial_factor * _PATCH, cfg.temporal_factor
    if frames < 1 or (frames - 1) % step:
      nearest = 1 + step * max(0, round((frames - 1) / step))
      raise UserError(
        f"--frames {frames}: give 1 + a multiple of {step}, {nearest} is the"
        " nearest"
      )
    for name, value in (("height", height), ("width", width)):
      if value < 1 or value % side:
        nearest = side * max(1, round(value / side))
        raise UserError(
          f"--{name} {value}: give a multiple of {side}, {nearest} is the"
          " nearest"
        )
    return (cfg.latent_frames(frames), *cfg.grid(height, width), cfg.z_dim)

  @property
  def name(self) -> str:
    """Of the latents, by the weights that make them."""
    cfg, params = self._vae
    return f"wan-vae-{_digest(cfg, {'encoder': params['encoder']})}"

  @property
  def text_encoder(self) -> str:
    """Name of the embeddings, by the weights that make them."""
    return f"umt5-{_digest(*self._text.weights)}"

  @property
  def text_dim(self) -> int:
    """Width of an embedding."""
    return self._text.weights[0].dim

  def encode(
    self, pixels: Float[np.ndarray, "b F H W 3"]
  ) -> Float[np.ndarray, "b f h w c"]:
    """Pixels in [-1, 1], 1 + 4n frames, to 1 + n latent frames, float32."""
    params = self._vae[1]
    made = [self._encode_video(params, one[None])[0] for one in pixels]
    return np.stack([np.asarray(one, np.float32) for one in made])

  def decode(
    self, latents: Float[np.ndarray, "b f h w c"]
  ) -> Float[np.ndarray, "b F H W 3"]:
    """The way back: 1 + n latent frames to 1 + 4n frames in [-1, 1]."""
    params = self._vae[1]
    made = [self._decode_video(params, one[None])[0] for one in latents]
    return np.stack([np.asarray(one, np.float32) for one in made])

  def latents(self, clip: np.ndarray) -> np.ndarray:
    """uint8 [F H W 3] to bfloat16 latents [f h w c]."""
    made = self.encode(video.to_float(clip)[None])[0]
    return made.astype(latent_store.DTYPE)

  def text(self, caption: str) -> tuple[np.ndarray, int]:
    """(embedding [tokens d] bfloat16 up to the prompt's end, tokens cut)."""
    return self._text(caption)


def _digest(cfg: Any, params: Params) -> str:
  """Of a config and the first MiB of every leaf: weights of GBs tell enough."""
  found = hashlib.sha256(repr(cfg).encode())
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    found.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode())
    found.update(np.asarray(leaf.ravel()[: _MIB // leaf.itemsize]).tobytes())
  return found.hexdigest()[:16]
