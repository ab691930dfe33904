"""Lowers the recipes for Wan at full size, each for the 64 devices it names.

A program of its own, since a process has as many CPU devices as it was begun
with. Prints a JSON line a recipe; nothing is allocated or compiled.
"""

import json
import os
import sys
import time
import warnings

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=64"

import jax
import numpy as np

from avd_jax import config as config_lib
from avd_jax import parallel
from avd_jax.training.program import Program
from avd_jax.training.step import Schedule


def lowered(path: str) -> dict:
  """What a recipe trains, each stage's step having been lowered."""
  config = config_lib.load(path, [])
  shape = [config.mesh[axis] for axis in parallel.AXES]
  program = Program(config, parallel.make_mesh(jax.devices(), shape))
  program.check()
  state = program.abstract_state()
  schedule = Schedule(np.float32(1), np.float32(1))
  seconds = {}
  for name in config.stages:
    begun = time.perf_counter()
    step = program.step(name).lower(state, program.batch, schedule)
    seconds[name] = round(time.perf_counter() - begun, 1)
    made = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), step.out_info[0])
    kept = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    assert made == kept, "a step gives the state back as it was"
  params = jax.tree.leaves(state.params)
  shares = [leaf.sharding.shard_shape(leaf.shape) for leaf in params]
  return {
    "mesh": dict(program.mesh.shape),
    "parameters": sum(leaf.size for leaf in params),
    "of a device": sum(int(np.prod(share)) for share in shares),
    "seconds": seconds,
  }


if __name__ == "__main__":
  warnings.simplefilter("ignore")  # attention on CPUs is slow: it does not run
  for recipe in sys.argv[1:]:
    print(json.dumps({"recipe": recipe} | lowered(recipe)), flush=True)
