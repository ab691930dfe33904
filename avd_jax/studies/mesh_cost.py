"""What cutting a step another way than by batch costs, axis by axis.

Every mesh works on the same global batch; plain data parallelism is what the
others are measured against, in the same rounds (`race`).
"""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from avd_jax import config as config_lib
from avd_jax import parallel
from avd_jax.errors import UserError
from avd_jax.studies import race, steps
from avd_jax.training.program import Program

STAGES = ("teacher_forcing", "resampling_forcing")
_OTHERS = parallel.AXES[1:]


def meshes(
  config: ConfigDict, devices: Sequence[Any]
) -> dict[str, tuple[int, ...]]:
  """Shapes to race, by name: all data, then each axis as large as it can be.

  Args:
    config: of the run; an axis must divide its model and its batch.
    devices: what the meshes are of.

  Raises:
    UserError: fewer than 2 devices, or a batch that they do not divide.
  """
  if len(devices) < 2:
    raise UserError(
      "--meshes needs 2 devices and more; on a CPU give --devices 8"
    )
  plain = (len(devices), 1, 1, 1)
  Program(config, parallel.make_mesh(devices, plain)).check()
  found = {f"data {len(devices)}": plain}
  for place, axis in enumerate(_OTHERS):
    for size in range(len(devices), 1, -1):
      if len(devices) % size:
        continue
      others = [1] * len(_OTHERS)
      others[place] = size
      shape = (len(devices) // size, *others)
      try:
        Program(config, parallel.make_mesh(devices, shape)).check()
      except UserError:
        continue
      found[f"{axis} {size}"] = shape
      break
  return found


def measure(
  config: ConfigDict,
  devices: Sequence[Any],
  rounds: int = 20,
  progress: bool = True,
) -> dict[str, Any]:
  """Times the steps of both stages on every mesh, interleaved.

  Args:
    config: has the stages teacher_forcing and resampling_forcing.
    devices: what the meshes are of.
    rounds: of every contender in turn.
    progress: show a bar.

  Returns:
    "meshes": name -> {stage: time over that of plain data parallelism}, medians
    of ratios within a round; "ms": the same, milliseconds; "rounds".

  Raises:
    UserError: a stage is missing, no rounds, or as `meshes`.
  """
  missing = [name for name in STAGES if name not in config.stage]
  if missing or rounds < 1:
    raise UserError(
      f"bench step needs the stages {', '.join(STAGES)} and at least 1 round"
    )
  shapes = meshes(config, devices)
  contenders = {}
  for name, shape in shapes.items():
    own = config_lib.from_json(config_lib.to_json(config))
    program, batch = steps.prepare(own, parallel.make_mesh(devices, shape))
    for stage in STAGES:
      contenders[name, stage] = steps.step(program, batch, stage)
  times = race.run(contenders, rounds, progress)
  plain = next(iter(shapes))
  of = lambda value: {
    name: {stage: value(name, stage) for stage in STAGES} for name in shapes
  }
  return {
    "meshes": of(lambda n, s: race.ratio(times, (n, s), (plain, s))),
    "ms": of(lambda n, s: 1e3 * race.median(times[n, s])),
    "rounds": rounds,
  }


def table(numbers: dict[str, Any]) -> str:
  """A line for each mesh."""
  lines = [f"{'mesh':<12}" + "".join(f"{stage:>30}" for stage in STAGES)]
  for name, ratios in numbers["meshes"].items():
    cells = (
      f"{ratios[stage]:>18.2f}x {numbers['ms'][name][stage]:>7.1f} ms"
      for stage in STAGES
    )
    lines.append(f"{name:<12}" + "".join(f"{cell:>30}" for cell in cells))
  return "\n".join(lines)
