"""A VAE that is trained here: its loss, its run, what the run leaves behind."""

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from avd_jax import config as config_lib
from avd_jax import parallel
from avd_jax.cli.main import main
from avd_jax.data import pipeline
from avd_jax.data.pipeline import DataConfig
from avd_jax.errors import UserError
from avd_jax.models import vae
from avd_jax.training import loop
from avd_jax.training import vae as training
from avd_jax.typing import Batch
from avd_jax.wan import importing

CONFIG = """
from avd_jax import config as base

def get_config():
  config = base.vae_default()
  config.data.update(frames=3, height=8, width=8, batch_size=8, num_videos=16)
  config.vae.update(
    base_dim=4, z_dim=2, dim_mult=(1, 2), num_res_blocks=1,
    temporal_downsample=(True,),
  )
  config.stage.vae.update(steps=30, learning_rate=1e-2, warmup_steps=0)
  config.optimizer.update(ema=0.0)
  config.log.update(every=1)
  return config
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
  file = tmp_path_factory.mktemp("configs") / "vae.py"
  file.write_text(CONFIG)
  return str(file)


@pytest.fixture(scope="module")
def run(config_file, tmp_path_factory):
  """(config, workdir, last state) of a finished run."""
  config = config_lib.load(config_file, [])
  workdir = tmp_path_factory.mktemp("vae")
  mesh = parallel.make_mesh(jax.devices()[:2], (2, 1, 1, 1))
  return config, workdir, loop.train(config, workdir, mesh, progress=False)


def test_the_loss_is_the_error_and_the_divergence(run):
  config, _, state = run
  cfg = training.network(config)
  x = jax.random.normal(jax.random.key(0), (2, 3, 8, 8, 3))
  batch = Batch(x, jnp.zeros((2, 1), jnp.int32))
  config = config.copy_and_resolve_references()
  config.loss.kl = 0.5
  loss_fn = training.loss(config)
  loss, (metrics, _) = loss_fn(state.params, batch, jax.random.key(1))
  assert loss == pytest.approx(
    float(metrics["absolute_error"] + 0.5 * metrics["divergence"]), rel=1e-5
  )
  # KL(N(mu, s^2) || N(0, 1)), by a sum over samples of log q - log p.
  mu, logvar = vae.moments(cfg, state.params, x)
  mu, sigma = np.asarray(mu), np.exp(0.5 * np.asarray(logvar))
  e = np.random.default_rng(0).standard_normal((20_000, *mu.shape))
  z = mu + sigma * e
  sampled = (-0.5 * e**2 - np.log(sigma) + 0.5 * z**2).mean()
  assert metrics["divergence"] == pytest.approx(sampled, rel=0.02)


def test_a_run_learns_and_leaves_what_an_import_would(run):
  config, workdir, state = run
  rows = [row["absolute_error"] for row in programs.rows(workdir)]
  assert rows[-1] < 0.7 * rows[0]
  cfg = training.finish(config, workdir, state)
  loaded, params = importing.load_vae(workdir)
  assert loaded == cfg
  jax.tree.map(np.testing.assert_array_equal, params, state.ema)
  source = pipeline.make_source(config_lib.typed(DataConfig, config.data))
  clips = [source[i]["video"] for i in range(len(source))]
  clips = jnp.asarray(np.stack(clips))
  latents = np.asarray(vae.encode(loaded, params, clips))
  np.testing.assert_allclose(latents.mean((0, 1, 2, 3)), 0, atol=1e-3)
  np.testing.assert_allclose(latents.std((0, 1, 2, 3)), 1, rtol=1e-3)
  before = (workdir / "vae" / "config.json").stat().st_mtime_ns
  assert training.finish(config, workdir, state) == cfg
  assert (workdir / "vae" / "config.json").stat().st_mtime_ns == before


def test_the_command_shows_held_out_clips(run, config_file, capsys):
  _, workdir, _ = run
  assert (
    main(["train", "--config", config_file, "--workdir", str(workdir)]) == 0
  )
  assert "held-out clips at" in capsys.readouterr().out
  assert (workdir / "reconstruction.mp4").stat().st_size


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("data.frames=4", "1 \\+ a multiple of 2"),
    ("data.height=9", "multiples of 2"),
    ("data.source=latents", "trained on pixels"),
    ("loss.kl=-1.0", "loss.kl"),
    ("evaluation.videos=0", "evaluation.videos"),
    ("stage.vae.steps=0", "stage.vae.steps"),
    ("stages=()", "stages is empty"),
    ("optimizer.ema=1.5", "optimizer.ema"),
    ("vae.base_dim=3", "even number"),
    ("model.dim=3", "unknown config field"),
  ],
)
def test_a_mistake_is_refused_before_any_compute(config_file, change, message):
  with pytest.raises(UserError, match=message):
    config_lib.load(config_file, [f"--config.{change}"])
