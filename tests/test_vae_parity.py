"""The video VAE equals diffusers' AutoencoderKLWan on random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.models import vae
from avd_jax.wan import vae_names

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CFG = vae.VAEConfig(base_dim=8, num_res_blocks=1)
RELATIVE = 1e-4


@functools.cache
def theirs():
  """A small model with every tensor random, also those at zero or one."""
  torch.manual_seed(0)
  torch.set_num_threads(1)
  model = diffusers.AutoencoderKLWan(
    base_dim=CFG.base_dim,
    z_dim=CFG.z_dim,
    dim_mult=list(CFG.dim_mult),
    num_res_blocks=CFG.num_res_blocks,
    attn_scales=[],
    temperal_downsample=list(CFG.temporal_downsample),
  )
  with torch.no_grad():
    for weight in model.parameters():
      size = weight[0].numel() if weight.ndim > 1 else weight.numel()
      weight.add_(torch.randn_like(weight) * 0.5 / max(size, 4) ** 0.5)
  return model.eval()


@functools.cache
def ours():
  """The same weights in our tree."""
  tree = {}
  state = theirs().state_dict()
  for tensor in vae_names.tensors(CFG):
    x = state.pop(tensor.diffusers).numpy()
    assert x.shape == tensor.shape
    *parents, leaf = tensor.path.split("/")
    node = functools.reduce(lambda n, key: n.setdefault(key, {}), parents, tree)
    node[leaf] = jnp.asarray(tensor.ours(x))
  assert not state
  return tree


def error(found, wanted):
  """The largest difference, as a share of the largest value."""
  wanted = np.moveaxis(wanted.numpy(), 1, -1)
  assert found.shape == wanted.shape
  return np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize(
  "shape", [(1, 9, 32, 48, 3), (2, 13, 24, 16, 3), (1, 1, 16, 8, 3)]
)
def test_encoding(shape):
  x = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
  with torch.no_grad():
    said = theirs().encode(torch.from_numpy(np.moveaxis(x, -1, 1)).contiguous())
  wanted = said.latent_dist
  mu, logvar = jax.jit(vae.moments, static_argnums=0)(CFG, ours(), x)
  clipped = jnp.clip(logvar, -30, 20)
  found = jax.jit(vae.encode, static_argnums=0)(CFG, ours(), x)
  config = theirs().config
  mean, std = (
    torch.tensor(values)[:, None, None, None]
    for values in (config.latents_mean, config.latents_std)
  )
  errors = {
    "mean": error(mu, wanted.mean),
    "log variance": error(clipped, wanted.logvar),
    "latents": error(found, (wanted.mean - mean) / std),
  }
  assert max(errors.values()) <= RELATIVE, errors


@pytest.mark.parametrize(
  "shape", [(1, 3, 4, 6, 16), (2, 4, 3, 2, 16), (1, 1, 2, 1, 16)]
)
def test_decoding(shape):
  config = theirs().config
  z = np.random.default_rng(2).normal(size=shape).astype(np.float32)
  own = z * np.array(config.latents_std) + np.array(config.latents_mean)
  own = torch.tensor(np.moveaxis(own, -1, 1), dtype=torch.float32)
  with torch.no_grad():
    wanted = theirs().decode(own).sample
  # Not all cut to [-1, 1], or little would be compared.
  assert (wanted.abs() < 1).float().mean() > 0.05
  found = jax.jit(vae.decode, static_argnums=0)(CFG, ours(), z)
  assert error(found, wanted) <= RELATIVE
