"""What is given among the chunks of a batch: how often, and how it weighs."""

import jax
import jax.numpy as jnp
import linear
import numpy as np
import pytest

from avd_jax.algorithms import diffusion_forcing, flow_loss
from avd_jax.diffusion import flow_matching
from avd_jax.typing import Batch

NULL = jnp.zeros(4, jnp.int32)


def levels_of(batch, share):
  """The levels [b n] that diffusion forcing noises a batch to."""
  seen, plain = [], linear.denoiser()

  def parallel(*args):
    seen.append(args[2])
    return plain.parallel(*args)

  loss_fn = diffusion_forcing.diffusion_forcing(
    plain._replace(parallel=parallel),
    flow_matching.logit_normal(3.0),
    null_text=NULL,
    text_dropout=0.0,
    clean_context=share,
  )
  loss_fn(linear.params(), batch, jax.random.key(0))
  return np.asarray(seen[0])


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_share_of_videos_begins_with_given_chunks(share):
  clean = levels_of(Batch(*linear.batch(1000, 4)), share) == 0
  given = clean.sum(1)
  np.testing.assert_array_equal(clean, np.arange(4) < given[:, None])
  off = abs((given > 0).sum() - 1000 * share)
  assert off <= 4 * np.sqrt(1000 * share * (1 - share))
  counts = np.bincount(given, minlength=5)
  assert counts[4] == 0  # something is left to learn
  if share:
    assert (counts[1:4] > 1000 * share / 3 * 0.7).all()


def test_a_drifted_prefix_is_not_lengthened():
  x, text = linear.batch(1000, 4)
  given = jnp.arange(1000) % 4
  clean = (levels_of(Batch(x, text, given), 0.5) == 0).sum(1)
  drifted = np.asarray(given) > 0
  np.testing.assert_array_equal(clean[drifted], given[drifted])
  assert (clean[~drifted] > 0).any()


@pytest.mark.parametrize("skip", [0, 1])
def test_scored_chunks_weigh_the_same_in_any_microbatch(skip):
  rng = np.random.default_rng(0)
  error = jnp.asarray(rng.uniform(size=(6, 4, 1, 2, 3)), jnp.float32)
  given = jnp.array([0, 3, 0, 2, 1, 0])
  weight = flow_loss.scored(Batch(error, NULL, given), 4, skip)
  whole = flow_loss.chunk_mean(error, weight, skip)
  parts = [
    flow_loss.chunk_mean(error[s], weight[s], skip)
    for s in (slice(0, 2), slice(2, 4), slice(4, 6))
  ]
  np.testing.assert_allclose(whole, np.mean(parts), rtol=1e-6)
  by_hand = sum(
    error[b, n].mean() for b in range(6) for n in range(4) if weight[b, n]
  )
  np.testing.assert_allclose(whole, by_hand / (6 * (4 - skip)), rtol=1e-5)
