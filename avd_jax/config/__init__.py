"""Configs: one base that every file in configs/ changes.

Rooms below never see a ConfigDict: they get the frozen dataclass that `typed`
makes of a section. Everything a user can get wrong in a config is refused by
`check`, before any compute is spent.
"""

import runpy
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from avd_jax.config.base import (
  FREE,
  OPTIONAL,
  WEIGHTLESS,
  complete,
  default,
  differences,
  from_json,
  stage,
  to_json,
  typed,
  vae_default,
  vae_stage,
)
from avd_jax.config.checks import HISTORIES, OBJECTIVES, check, check_bagger
from avd_jax.errors import UserError

__all__ = [
  "FREE",
  "HISTORIES",
  "OBJECTIVES",
  "WEIGHTLESS",
  "check",
  "check_bagger",
  "complete",
  "default",
  "differences",
  "from_json",
  "load",
  "override",
  "stage",
  "to_json",
  "typed",
  "vae_default",
  "vae_stage",
]


def load(path: str, overrides: list[str]) -> ConfigDict:
  """Reads a config file and applies `--config.field=value` arguments.

  Raises:
    UserError: no such file, an unknown field, a value of another type.
  """
  file, *argument = path.split(":", 1)
  if not Path(file).is_file():
    raise UserError(f"config {file} does not exist; see configs/ for examples")
  try:
    config = runpy.run_path(file)["get_config"](*argument)
  except Exception as error:  # it is a program: anything may be wrong with it
    kind = type(error).__name__
    raise UserError(f"config {file}: {kind}: {_line(error)}") from error
  if not isinstance(config, ConfigDict):
    raise UserError(f"config {file}: get_config must return a ConfigDict")
  override(config, overrides)
  check(config)
  return config


def override(
  config: ConfigDict,
  overrides: list[str],
  may: tuple[str, ...] = ("",),
) -> None:
  """Applies `--config.field=value` arguments.

  Args:
    config: changed in place.
    overrides: the arguments.
    may: how the names of fields that may change begin.

  Raises:
    UserError: an unknown field, one that may not change, or a wrong value.
  """
  for argument in overrides:
    name, equals, _ = argument.partition("=")
    path, section = name.removeprefix("--config.").split("."), config
    for field in path[:-1]:
      section = section.get(field) if isinstance(section, ConfigDict) else None
    if not isinstance(section, ConfigDict) or path[-1] not in section:
      raise UserError(f"{name}: unknown config field")
    if not ".".join(path).startswith(may):
      raise UserError(
        f"{name}: cannot change in a trained run; {', '.join(may)} can"
      )
    if not equals:
      raise UserError(f"{name}: write {name}=VALUE")
  for argument in overrides:
    name, _, value = argument.partition("=")
    name = name.removeprefix("--config.")
    if name in OPTIONAL and value.lower() in ("none", ""):
      section, _, field = name.rpartition(".")
      config[section][field] = placeholder(OPTIONAL[name])
      overrides = [other for other in overrides if other != argument]
  values, argv = flags.FlagValues(), ["avd", *overrides]
  # Without sys_argv, overrides would be looked for in this process's own.
  config_flags.DEFINE_config_dict(
    "config", config, flag_values=values, sys_argv=argv
  )
  try:
    values(argv)
  except (flags.Error, ValueError, TypeError) as error:
    raise UserError(_line(error)) from error


def _line(error: Exception) -> str:
  return " ".join(str(error).split())[:300]
