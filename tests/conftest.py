"""What every test shares: eight CPU devices, checked types, a compile cache."""

import gc
import os
import signal
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".jax_cache"

# Before jax is imported, and in the environment, so that the processes which
# tests start run alike. Compiling costs these tests more than computing.
for _name, _value in {
  "JAX_PLATFORMS": "cpu",
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  "JAX_COMPILATION_CACHE_DIR": str(CACHE),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}.items():
  os.environ.setdefault(_name, _value)

# A shell has what it starts in the background ignore Ctrl-C, and children
# inherit that; tests of interrupts send it to themselves and to children.
signal.signal(signal.SIGINT, signal.default_int_handler)

import chex  # noqa: E402

chex.set_n_cpu_devices(8)

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402

# Shapes and types are checked here and nowhere else: a user pays nothing.
jaxtyping.install_import_hook("avd_jax", "typecheck.check")

if not flags.FLAGS.is_parsed():
  flags.FLAGS.mark_as_parsed()


@pytest.fixture(autouse=True, scope="module")
def _programs_end_with_their_file():
  """Compiled programs are let go: each is a dozen memory maps, and a process
  that reaches the kernel's limit of 65,530 dies without a word."""
  yield
  jax.clear_caches()
  gc.collect()


@pytest.fixture(scope="session")
def wan_ckpt(tmp_path_factory):
  """A tiny Wan of random weights, imported; to be read only."""
  from avd_jax.wan import importing, tiny

  root = tmp_path_factory.mktemp("wan")
  tiny.run(root / "files", "diffusers")
  importing.run(root / "files", root / "ckpt")
  return root / "ckpt"
