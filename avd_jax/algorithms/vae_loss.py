"""The loss of a VAE: what it must give back, and how much it may remember."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from avd_jax.typing import Batch, LossFn, StepContext

# Wan clips the log variance to this before it samples.
LOGVAR = (-30.0, 20.0)


def vae_loss(
  moments: Callable[..., tuple[jax.Array, jax.Array]],
  decode: Callable[..., jax.Array],
  kl: float,
) -> LossFn:
  """Mean absolute error of the pixels, and the prior's pull.

  Latents are drawn from q(z | video) = N(mu, sigma^2), one sample a video; the
  second term is `kl` times the mean over latents of KL(q || N(0, 1)). Wan adds
  a perceptual loss and, later, an adversarial one, which need networks of their
  own; without them results are softer.

  Args:
    moments: `(params, video [b F H W 3]) -> (mu, log variance) [b f h w c]`.
    decode: `(params, z [b f h w c]) -> video`, pixels uncut: where they are
      cut, no gradient brings them back.
    kl: weight of the second term.
  """

  def loss_fn(params, batch: Batch, key, context=StepContext()):
    mu, logvar = moments(params, batch.x)
    logvar = jnp.clip(logvar, *LOGVAR)
    z = mu + jnp.exp(0.5 * logvar) * jax.random.normal(key, mu.shape)
    made = decode(params, z)
    error = jnp.mean(jnp.abs(made - batch.x))
    divergence = 0.5 * jnp.mean(mu**2 + jnp.exp(logvar) - 1 - logvar)
    loss = error + kl * divergence
    square = jnp.mean((jnp.clip(made, -1, 1) - batch.x) ** 2)
    metrics = {
      "loss": loss,
      "absolute_error": error,
      "divergence": divergence,
      "psnr": 10 * jnp.log10(4.0 / square),
    }
    return loss, (metrics, dict(context.memory))

  return loss_fn
