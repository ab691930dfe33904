"""Notebooks: kept without outputs, and run from top to bottom, tiny."""

import nbformat
import programs
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((programs.ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_some():
  assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_clean(path):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  first = notebook.cells[0].source
  assert f"avd_jax/blob/main/notebooks/{path.name}" in first
  for cell in notebook.cells:
    assert not cell.get("outputs")
    assert cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path):
  notebook = nbformat.read(path, as_version=4)
  client = NotebookClient(
    notebook, timeout=240, resources={"metadata": {"path": path.parent}}
  )
  client.execute(env=programs.environment() | {"AVD_NB_FAST": "1"})
  shown = [
    kind
    for cell in notebook.cells
    for output in cell.get("outputs", [])
    for kind in output.get("data", {})
  ]
  assert shown.count("image/png") >= 5
  assert "text/html" in shown  # a film
