"""A small byte-level text conditioner, so that tiny models read captions.

Large models get umT5 embeddings made beforehand; a world's caption is a dozen
words, and learning to read it costs a few thousand parameters. Bytes are
embedded, placed, and read by a few learned queries (one attention layer), so
that the network's cross-attention sees `tokens` vectors, not 64 bytes.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from avd_jax.models import layers
from avd_jax.ops.reference import reference

VOCABULARY = 257  # 0 pads, byte + 1 otherwise


class ByteConditioner(nn.Module):
  """Byte tokens to a few text vectors.

  Attributes:
    dim: width of a text vector.
    tokens: text vectors that come out.
    dtype: compute dtype.
  """

  dim: int
  tokens: int
  dtype: str

  @nn.compact
  def __call__(self, ids: Int[Array, "b m"]) -> Float[Array, "b k d"]:
    normal = nn.with_logical_partitioning(
      nn.initializers.normal(0.5), (None, "embed")
    )
    table = self.param("bytes", normal, (VOCABULARY, self.dim))
    places = self.param("places", normal, (ids.shape[1], self.dim))
    queries = self.param("queries", normal, (self.tokens, self.dim))
    # Neighbours are mixed before pooling: a bag of bytes has no words.
    x = table.astype(self.dtype)[ids] + places.astype(self.dtype)
    words = nn.Conv(
      self.dim,
      (5,),
      dtype=self.dtype,
      kernel_init=nn.with_logical_partitioning(
        nn.initializers.lecun_normal(), (None, "embed", None)
      ),
      bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (None,)),
      name="words",
    )
    x = nn.gelu(words(x))
    keys = layers.dense(self.dim, ("embed", None), self.dtype, name="k")(x)
    values = layers.dense(self.dim, ("embed", None), self.dtype, name="v")(x)
    q = jnp.broadcast_to(
      queries.astype(self.dtype), (ids.shape[0], self.tokens, self.dim)
    )
    # Padding stays visible: an empty caption must still be a caption.
    out, _ = reference(q[:, :, None], keys[:, :, None], values[:, :, None])
    return out[:, :, 0]
