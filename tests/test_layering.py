"""The house rules: who may import whom, and what a file may be.

Read from the syntax trees, so that a lazy import counts as much as one at the
top of a file.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import avd_jax

PACKAGE = Path(avd_jax.__file__).parent
# Rows from the ground up; a row's rooms are neighbours and do not know each
# other.
ROWS = (
  ("typing", "errors"),
  ("disk", "parallel", "checkpoint"),
  ("ops",),
  ("diffusion", "models", "data"),
  ("algorithms",),
  ("config",),
  ("wan",),
  ("training", "sampling", "evaluation"),
  ("bagger",),
  ("studies",),
  ("aot",),
  ("cli",),
)
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]
LONGEST = 450  # lines
# No purpose, so anything ends up in them.
DRAWERS = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}
PURE = (
  "typing",
  "errors",
  "parallel",
  "ops",
  "diffusion",
  "models",
  "algorithms",
)
HEAVY = ("grain", "tensorflow_datasets", "av", "ml_collections")


def room_of(path):
  """The first part of a file's path in the package, without suffix."""
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
  """Full names of what a file imports: modules, or names in them."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: relative import"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_rooms(path):
  """Rooms of this package that a file imports from."""
  for name in imports(path):
    parts = name.split(".")
    if parts[0] == "avd_jax" and len(parts) > 1:
      yield parts[1]


def test_there_is_something_to_check():
  assert len(FILES) > 30
  assert {room_of(path) for path in FILES} - {"__init__"} <= set(ROW_OF)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_go_down_only(path):
  room = room_of(path)
  if room == "__init__":
    assert not list(own_rooms(path))
    return
  for other in own_rooms(path):
    assert other == room or ROW_OF[other] < ROW_OF[room], f"imports {other}"
    assert (room, other) != ("algorithms", "models"), (
      "an algorithm is handed a Denoiser"
    )


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_config_dicts_stay_at_config_and_above(path):
  if ROW_OF.get(room_of(path), 0) < ROW_OF["config"]:
    assert not [n for n in imports(path) if n.startswith("ml_collections")]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_only_programs_ask_which_devices_there_are(path):
  if room_of(path) == "cli":
    return
  asking = {"devices", "local_devices", "device_count", "local_device_count"}
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      assert not (node.value.id == "jax" and node.attr in asking), node.lineno
  assert not {f"jax.{name}" for name in asking} & set(imports(path))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_is_short_and_has_a_purpose(path):
  assert len(path.read_text().splitlines()) <= LONGEST
  assert path.name not in DRAWERS


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_what_is_public_is_documented(path):
  tree = ast.parse(path.read_text())
  bare = [] if ast.get_docstring(tree) else ["the module"]
  definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
  for node in tree.body:
    if isinstance(node, definitions) and not node.name.startswith("_"):
      # A subcommand's two functions are the interface cli/main.py documents.
      program = room_of(path) == "cli" and node.name in ("add_arguments", "run")
      if not (program or ast.get_docstring(node)):
        bare.append(node.name)
  assert not bare


def test_the_pure_rooms_need_no_data_library():
  modules = [
    ".".join(("avd_jax", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in FILES
    if room_of(path) in PURE
  ]
  script = (
    "import importlib, sys\n"
    f"sys.modules.update(dict.fromkeys({HEAVY!r}))\n"
    f"for name in {modules!r}: importlib.import_module(name)\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0, done.stderr


def test_the_rules_can_fail(tmp_path):
  path = tmp_path / "bad.py"
  path.write_text(
    "from avd_jax import models\nimport avd_jax.data.video as v\n"
    "def f():\n  from avd_jax.models import dit\n"
  )
  assert list(own_rooms(path)) == ["models", "data", "models"]
