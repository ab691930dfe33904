"""What the README says is true: equations, commands, configs, numbers."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

from avd_jax import config as config_lib
from avd_jax.cli import main as cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TAG = re.compile(r"\[((?:RF|BAgger) [^\]]+)\]")


def tagged() -> set[tuple[str, str]]:
  """(tag, "room/file.py: name") for every tag in a docstring's last line."""
  found = set()
  for path in sorted((ROOT / "avd_jax").rglob("*.py")):
    tree = ast.parse(path.read_text())
    where = path.relative_to(ROOT / "avd_jax").as_posix()
    for node in ast.walk(tree):
      if not isinstance(node, ast.FunctionDef | ast.ClassDef):
        continue
      doc = ast.get_docstring(node) or ""
      for tag in TAG.findall(doc.splitlines()[-1] if doc else ""):
        found.add((tag, f"{where}: {node.name}"))
  return found


def test_equation_table_is_the_tags_in_the_code():
  rows = re.findall(
    r"^\| ((?:RF|BAgger) [^|]+?) \|[^|]*\| `([^`]+)` \|$", README, re.M
  )
  assert rows
  assert set(rows) == tagged()


def test_tags_stand_in_last_lines_only():
  """A tag elsewhere would be missing from the table without notice."""
  total = sum(
    len(TAG.findall(path.read_text()))
    for path in (ROOT / "avd_jax").rglob("*.py")
  )
  assert total == len(tagged())


def _commands() -> list[str]:
  text = README.replace("\\\n", " ")
  return re.findall(r"^ {4}(avd .+)$", text, re.M)


def test_readme_has_commands():
  assert len(_commands()) >= 5


@pytest.mark.parametrize("command", _commands())
def test_command_parses(command):
  words = shlex.split(command.partition("#")[0])[1:]
  args, rest = cli.parser().parse_known_args(words)
  assert all(word.startswith("--config.") for word in rest)
  if getattr(args, "config", None):
    config_lib.load(str(ROOT / args.config), rest)


def test_make_targets_exist():
  makefile = (ROOT / "Makefile").read_text()
  for target in re.findall(r"^ {4}make ([\w-]+)", README, re.M):
    assert re.search(rf"^{target}:", makefile, re.M), target


@pytest.mark.parametrize(
  "path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem
)
def test_every_config_loads_and_is_listed(path):
  config_lib.load(str(path), [])
  assert f"`configs/{path.name}`" in README
  docstring = ast.get_docstring(ast.parse(path.read_text()))
  assert "avd " in docstring, "a config opens with its command"


def test_files_that_the_readme_names_exist():
  for name in re.findall(r"\]\(([\w/.]+)\)", README):
    assert (ROOT / name).exists(), name


def test_measured_table_is_the_committed_evidence():
  """The README's table is made from docs/evidence/demo.json, not by hand."""
  evidence = json.loads((ROOT / "docs/evidence/demo.json").read_text())
  runs = [evidence[m] for m in ("teacher_forcing", "resampling_forcing")]
  cells = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in README.splitlines()
    if line.startswith("|")
  ]
  rows = {row[0]: row[1:3] for row in cells}
  for label, key, scale, digits in (
    ("failed frames, last third", "failed", 100, 1),
    ("background error, last third", "background_error", 1, 3),
  ):
    shown = [float(re.match(r"[\d.]+", cell)[0]) for cell in rows[label]]
    assert shown == [round(scale * m[key][2], digits) for m in runs]
  shown = [float(re.match(r"[\d.]+", c)[0]) for c in rows["drift Delta (dB)"]]
  assert shown == [round(m["delta_db"], 2) for m in runs]
