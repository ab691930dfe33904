"""The recipes for Wan: at full size, as the papers have them, chained."""

import ast
import json
import math
import re
import shlex
import sys
from pathlib import Path

import jax
import programs
import pytest

from avd_jax import config as config_lib
from avd_jax import parallel
from avd_jax.aot import plan_work
from avd_jax.errors import UserError
from avd_jax.models.dit_config import DiTConfig
from avd_jax.training import loop
from avd_jax.wan import importing, sources

CONFIGS = programs.ROOT / "configs"
FILES = sorted(CONFIGS.glob("wan_*.py"))
# recipe: (init_from, latent frames, batch, {stage: (history, steps)})
RECIPES = {
  "wan_1_3b_teacher_forcing.py": (
    "runs/wan", 21, 64, {"teacher_forcing": ("ground_truth", 10_000)},
  ),
  "wan_1_3b_resampling.py": (
    "runs/wan_tf", 21, 64, {"resampling_forcing": ("self_resampled", 15_000)},
  ),
  "wan_1_3b_resampling.py:15s": (
    "runs/wan_rf", 63, 64, {"resampling_forcing": ("self_resampled", 5_000)},
  ),
  "wan_1_3b_routing.py": (
    "runs/wan_rf_15s", 63, 64, {"routing": ("self_resampled", 1_500)},
  ),
  "wan_1_3b_bagger.py": (
    "runs/wan", 21, 96, {"base": ("ground_truth", 16_000)},
  ),
  "wan_14b_resampling.py": (
    "runs/wan14", 21, 64, {
      "teacher_forcing": ("ground_truth", 10_000),
      "resampling_forcing": ("self_resampled", 15_000),
    },
  ),
}  # fmt: skip


def load(recipe, *overrides):
  return config_lib.load(str(CONFIGS / recipe), list(overrides))


def documentation(recipe):
  source = (CONFIGS / recipe.partition(":")[0]).read_text()
  return ast.get_docstring(ast.parse(source))


def test_every_recipe_is_looked_at():
  assert {file.name for file in FILES} == {r.partition(":")[0] for r in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_the_papers(recipe):
  config = load(recipe)
  start, frames, batch, stages = RECIPES[recipe]
  assert (config.init_from, config.data.frames) == (start, frames)
  assert (config.data.batch_size, config.optimizer.name) == (batch, "adamw")
  found = {n: (s.history, s.steps) for n, s in config.stage.items()}
  if "bagger" in recipe:
    config_lib.check_bagger(config)
    assert found.pop("round") == stages["base"]
    objectives = {stage.objective for stage in config.stage.values()}
    assert objectives == {"diffusion_forcing"}
    assert (config.bagger.rounds, config.bagger.share) == (3, 0.5)
  assert found == stages
  assert {s.learning_rate for s in config.stage.values()} == {5e-5}
  steps = 20 if "bagger" in recipe else 32
  chosen = config.sampling
  assert (chosen.solver, chosen.steps) == ("euler", steps)
  assert (chosen.shift, chosen.guidance) == (5, 5)
  for stage in config.stage.values():
    if stage.history == "self_resampled":
      options = stage.degradation
      assert (options.shift, options.steps, options.clean_prefix) == (0.6, 1, 0)
  routed = config.model.attention.routing_top_k
  assert routed == (5 if "routing" in recipe else None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_takes_what_import_wan_writes(recipe):
  ours = config_lib.to_json(load(recipe))["model"]
  sizes = {k: ours[k] for k in ("dim", "ffn_dim", "num_heads", "num_layers")}
  theirs = config_lib.to_json(importing.run_config(DiTConfig(**sizes)))["model"]
  assert not config_lib.differences(
    theirs, ours, "model.", config_lib.WEIGHTLESS
  )


def test_every_recipe_starts_where_a_command_ends():
  """Whoever runs the commands as they stand needs no --config.init_from."""
  made = set()
  for file in FILES:
    text = documentation(file.name).replace("\\\n", " ")
    for command in re.findall(r"^ +avd (.+)$", text, re.M):
      words = shlex.split(command)
      flag = {"import-wan": "--out", "train": "--workdir"}.get(words[0])
      if flag:
        made.add(words[words.index(flag) + 1])
  assert {row[0] for row in RECIPES.values()} <= made


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_cost_it_tells_is_counted(recipe):
  config, told = load(recipe), documentation(recipe)
  told = re.findall(r"([\d.]+)\s+PFLOP", told)
  for stage in config.stages:
    flops = plan_work.step_flops(config, stage)[0]
    assert f"{flops / 1e15:.3g}" in told


@pytest.fixture(scope="module")
def lowered():
  """Of each recipe, what its program says."""
  script = str(Path(__file__).with_name("recipe_lowering.py"))
  recipes = [str(CONFIGS / recipe) for recipe in RECIPES]
  done = programs.run(sys.executable, script, *recipes, timeout=600)
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  return {row["recipe"].rpartition("/")[2]: row for row in rows}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_step_is_lowered_for_64_devices(lowered, recipe):
  row = lowered[recipe]
  assert math.prod(row["mesh"].values()) == 64
  assert set(row["seconds"]) == set(RECIPES[recipe][3])
  model = config_lib.typed(DiTConfig, load(recipe).model)
  tensors = sources.NAMES["dit"][1](model)
  assert row["parameters"] == sum(math.prod(t.shape) for t in tensors)
  cut = row["mesh"]["fsdp"] * row["mesh"]["tensor"]
  assert row["of a device"] < 1.2 * row["parameters"] / cut
  if "1_3b" in recipe:
    listed = Path(__file__).parent / "wan" / "names_wan13_orig.json"
    shapes = json.loads(listed.read_text()).values()
    assert row["parameters"] == sum(math.prod(shape) for shape, _ in shapes)


def test_what_is_missing_is_named_before_anything_is_made(tmp_path):
  mesh = parallel.make_mesh(jax.devices()[:1], (1, 1, 1, 1))

  def refused(recipe, *overrides):
    config = load(recipe, "--config.mesh.fsdp=1", *overrides)
    with pytest.raises(UserError) as caught:
      loop.train(config, tmp_path / "run", mesh, progress=False)
    return str(caught.value)

  recipe = "wan_1_3b_teacher_forcing.py"
  assert "avd encode" in refused(recipe)
  assert "data.path is empty" in refused(recipe)
  gone = tmp_path / "gone"
  message = refused(recipe, f"--config.data.path={gone}")
  assert f"{gone}: no store of latents" in message
  assert f"avd encode --videos DIR --checkpoint CKPT --out {gone}" in message


def test_a_length_that_there_is_not(tmp_path):
  with pytest.raises(UserError, match=r"20s.*5s, 15s"):
    load("wan_1_3b_resampling.py:20s")
