"""UniPC takes the steps of diffusers' scheduler, on the same velocities."""

import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.diffusion import solvers

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


def velocity(x, t, exp):
  """Curved in space and in time, in either library's numbers."""
  turned = x[..., ::-1] if isinstance(x, jnp.ndarray) else x.flip(-1)
  return 1.3 * x - 0.7 * turned * exp(-2 * t) + 0.2 * x * x * t - 0.5


@pytest.mark.parametrize(
  ("steps", "shift"), [(1, 5.0), (2, 5.0), (3, 1.0), (8, 3.0), (32, 5.0)]
)
def test_it_equals_diffusers(steps, shift):
  torch.set_num_threads(1)
  theirs = diffusers.UniPCMultistepScheduler(
    prediction_type="flow_prediction",
    use_flow_sigmas=True,
    flow_shift=shift,
    solver_order=2,
    solver_type="bh2",
    lower_order_final=True,
  )
  theirs.set_timesteps(steps)
  start = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
  x = torch.from_numpy(start)
  for t, level in zip(theirs.timesteps, theirs.sigmas[:-1], strict=True):
    x = theirs.step(velocity(x, level, torch.exp), t, x).prev_sample

  def call(x, t, cache):
    return velocity(x, t[0], jnp.exp), cache

  grid = jnp.asarray(theirs.sigmas.numpy())
  found, _ = solvers.solve(
    call, jnp.asarray(start), jnp.ones(2), grid, (), "unipc"
  )
  scale = np.abs(x.numpy()).max()
  assert np.abs(np.asarray(found) - x.numpy()).max() <= 1e-5 * scale
  if steps > 2:  # or the solver would not matter here
    euler, _ = solvers.solve(call, jnp.asarray(start), jnp.ones(2), grid, ())
    assert np.abs(np.asarray(euler) - x.numpy()).max() > 1e-3 * scale
