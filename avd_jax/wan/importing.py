"""Wan2.1's weights, from its files to this project's checkpoints.

A checkpoint made here is a directory that training starts from (`init_from`)
and that sampling loads:

  checkpoints/     the transformer, as the averaged weights of step 0
  config.json      a run's config whose model is this one
  vae/, text/      config.json and the parameters in params/
  tokenizer.json   as it was shipped

All names and shapes are checked before anything is written. Values are copied
as they are, in the type they have in the files (float32 where the layers of a
leaf differ); loading casts.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from avd_jax import config as config_lib
from avd_jax import parallel
from avd_jax.disk import read_json, write_json
from avd_jax.errors import UserError
from avd_jax.models import denoiser, umt5, vae
from avd_jax.models.dit_config import DiTConfig
from avd_jax.models.umt5 import UMT5Config
from avd_jax.models.vae import VAEConfig
from avd_jax.typing import Params
from avd_jax.wan import shapes, sources, trees
from avd_jax.wan.names import Tensor
from avd_jax.wan.readers import Stored
from avd_jax.wan.sources import Source, some

T = TypeVar("T")
_FLOATS = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))
# What a component's import makes in the checkpoint's directory.
PLACES = {"dit": "checkpoints", "vae": "vae", "text": "text"}


@dataclasses.dataclass(frozen=True)
class Assembled:
  """A leaf of our tree, in the files it comes from; see `trees.Leaf`.

  Attributes:
    parts: the leaf's tensors and where they lie, layer by layer.
    shape: of the leaf.
    dtype: of the leaf.
  """

  parts: tuple[tuple[Tensor, Stored], ...]
  shape: tuple[int, ...]
  dtype: np.dtype

  def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
    """The leaf, or a part of it; no more than the part is read."""
    tensor, stored = self.parts[0]
    if tensor.layer is None:
      return np.array(tensor.ours(stored.view())[index], self.dtype, order="C")
    layers, rest = slice(None), ()
    if index:
      layers, *rest = index
    out = None
    for i, (tensor, stored) in enumerate(self.parts[layers]):
      layer = tensor.ours(stored.view())[tuple(rest)]
      if out is None:
        out = np.empty((len(self.parts[layers]), *layer.shape), self.dtype)
      out[i] = layer
    return out


def leaves(source: Source, tensors: list[Tensor]) -> dict[str, Assembled]:
  """The leaves of a component, none of them read.

  Args:
    source: where it lies.
    tensors: what it must consist of.

  Raises:
    UserError: a tensor that is missing, that has no place here, or that has
      another shape or a type that is no float.
  """
  _check_names(source, {getattr(t, source.layout) for t in tensors})
  parts: dict[str, list[tuple[Tensor, Stored]]] = {}
  for tensor in tensors:
    name = getattr(tensor, source.layout)
    stored = source.tensors[name]
    if stored.shape != tensor.shape:
      raise UserError(
        f"{source.path}: {name} is {stored.shape}, but this {source.title} has"
        f" {tensor.shape} there"
      )
    if stored.dtype not in _FLOATS:
      raise UserError(
        f"{source.path}: {name} is {stored.dtype}; give the float32 or bfloat16"
        " weights"
      )
    parts.setdefault(tensor.path, []).append((tensor, stored))
  return {path: _assembled(found) for path, found in parts.items()}


def _assembled(parts: list[tuple[Tensor, Stored]]) -> Assembled:
  parts = sorted(parts, key=lambda part: part[0].layer or 0)
  tensor = parts[0][0]
  # Of nothing: a turn needs no values to tell the shape.
  shape = tensor.ours(np.broadcast_to(np.int8(0), tensor.shape)).shape
  if tensor.layer is not None:
    shape = (len(parts), *shape)
  kinds = {stored.dtype for _, stored in parts}
  dtype = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
  return Assembled(tuple(parts), shape, dtype)


def _check_names(source: Source, wanted: set[str]) -> None:
  found = set(source.tensors)
  missing, strange = wanted - found, found - wanted
  if missing:
    raise UserError(
      f"{source.path} lacks {len(missing)} of the {len(wanted)} tensors of a"
      f" {source.title}: {some(missing)}"
    )
  if strange:
    raise UserError(
      f"{source.path} has {len(strange)} tensors that a {source.title} does"
      f" not have: {some(strange)}"
    )


def read(source: Source) -> tuple[Any, dict[str, Assembled]]:
  """(config, leaves) of a component.

  Raises:
    UserError: it is not whole, or not Wan2.1's.
  """
  cfg = shapes.config(source)
  return cfg, leaves(source, sources.NAMES[source.component][1](cfg))


# How models that Self Forcing trained are sampled there.
FEW_STEPS = dict(solver="consistency", steps=4, guidance=1.0, shift=5.0)


def run_config(cfg: DiTConfig, few_steps: bool = False) -> ConfigDict:
  """A run's config around an imported model, with the paper's settings.

  Args:
    cfg: the model.
    few_steps: whether it was made for few; see `sources.Source`.
  """
  values = config_lib.default().to_dict()
  # As Wan itself computes; what needs float32 has it, and weights keep theirs.
  values["model"] = dataclasses.asdict(cfg) | {"dtype": "bfloat16"}
  # 81 frames of 832x480, as latents.
  values["data"] |= dict(frames=21, height=60, width=104, text_length=512)
  # A chunk is seconds of work: each is handed over as soon as it is made.
  values["sampling"] |= dict(steps=32, shift=5.0, guidance=5.0, segment=1)
  if few_steps:
    values["sampling"] |= FEW_STEPS
  values["evaluation"] |= dict(given=3, frames=21)
  for stage in values["stage"].values():
    stage["learning_rate"] = 5e-5
  return config_lib.from_json(values)


def run(
  source: str | Path,
  out: str | Path,
  component: str | None = None,
  say: Callable[[str], None] = lambda line: None,
) -> None:
  """Imports what `source` holds, or one component of it, into `out`.

  Args:
    source: a directory or a file; see `sources`.
    out: the checkpoint's directory. It may hold other components.
    component: only this one.
    say: hears of each component.

  Raises:
    UserError: nothing to import, wrong or damaged files, or an `out` that has
      the component already.
  """
  out = Path(out)
  found = {s.component: (s, *read(s)) for s in sources.find(source, component)}
  _check_free(out, found)
  out.mkdir(parents=True, exist_ok=True)
  for name, (where, cfg, parts) in found.items():
    if name == "dit":
      _save_dit(out, run_config(cfg, where.few_steps), parts, str(where.path))
    else:
      _save_beside(out / PLACES[name], cfg, parts)
    say(f"{name}: {summary(parts)} from {where.path}")
    if where.few_steps:
      settings = ", ".join(f"sampling.{k}={v}" for k, v in FEW_STEPS.items())
      say(f"{name}: Self Forcing's, a few-step model: it gets {settings}")
  if "text" in found:
    file = sources.tokenizer(source)
    if file is None:
      say(
        f"no tokenizer.json found: put umT5's into {out} before giving prompts"
      )
    else:
      shutil.copyfile(file, out / file.name)


def summary(parts: Mapping[str, Any]) -> str:
  """How much and of which type, by leaves' shapes and types."""
  size = sum(int(np.prod(leaf.shape)) for leaf in parts.values())
  types = " and ".join(sorted({str(leaf.dtype) for leaf in parts.values()}))
  return f"{size:,} parameters, {types},"


def _check_free(out: Path, components: Mapping[str, Any]) -> None:
  if out.exists() and not out.is_dir():
    raise UserError(f"--out {out} is a file: give a directory")
  for name in components:
    if (out / PLACES[name]).exists():
      raise UserError(
        f"--out {out} already has {PLACES[name]}: give another directory, or"
        " delete that one"
      )
  mine = {*PLACES.values(), "config.json", *sources.TOKENIZER_FILES}
  strange = {p.name for p in out.iterdir()} - mine if out.exists() else set()
  if strange:
    raise UserError(
      f"--out {out} exists and is no imported checkpoint (it holds"
      f" {some(strange)}): give another directory"
    )


def _save_dit(
  out: Path, run: ConfigDict, parts: Mapping[str, trees.Leaf], origin: str
) -> None:
  config = config_lib.to_json(run)
  record = {"step": 0, "config": config, "metrics": [], "imported": origin}
  items = {"ema": trees.handler(), "record": ocp.JsonCheckpointHandler()}
  options = ocp.CheckpointManagerOptions(
    create=True, enable_async_checkpointing=False
  )
  path = out.absolute() / PLACES["dit"]
  with ocp.CheckpointManager(
    path, options=options, item_handlers=items
  ) as manager:
    args = ocp.args.Composite(
      ema=trees.to_save("ema", parts), record=ocp.args.JsonSave(record)
    )
    manager.save(0, args=args)
  write_json(out / "config.json", config)


def _save_beside(
  folder: Path,
  cfg: VAEConfig | UMT5Config,
  parts: Mapping[str, trees.Leaf],
) -> None:
  trees.save(folder / "params", "params", parts)
  write_json(folder / "config.json", dataclasses.asdict(cfg))


@dataclasses.dataclass(frozen=True)
class _Held:
  """A leaf that is in memory already; see `trees.Leaf`."""

  array: np.ndarray

  @property
  def shape(self) -> tuple[int, ...]:
    return self.array.shape

  @property
  def dtype(self) -> np.dtype:
    return self.array.dtype

  def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
    return self.array[index]


def save_vae(workdir: str | Path, cfg: VAEConfig, params: Params) -> None:
  """Writes a VAE that was trained here where `run` would have put one."""
  leaves = trees.flat(params).items()
  parts = {path: _Held(np.asarray(leaf)) for path, leaf in leaves}
  # Without a config.json, whoever began to write here was killed.
  shutil.rmtree(Path(workdir) / PLACES["vae"] / "params", ignore_errors=True)
  _save_beside(Path(workdir) / PLACES["vae"], cfg, parts)


def config_of(source: str | Path) -> ConfigDict:
  """The run's config of a transformer in Wan's own files.

  Raises:
    UserError: as `run`; no values are read.
  """
  found = sources.find(source, "dit")[0]
  return run_config(read(found)[0], found.few_steps)


def load_dit(
  source: str | Path, mesh: Mesh | None = None
) -> tuple[DiTConfig, Params]:
  """A transformer straight from its files, float32, each device its share.

  Args:
    source: a directory or a file; see `sources`.
    mesh: what the parameters are spread over; None is the default device.

  Raises:
    UserError: as `run`.
  """
  cfg, parts = read(sources.find(source, "dit")[0])
  x = jax.ShapeDtypeStruct(
    (1, cfg.chunk_frames, cfg.patch, cfg.patch, cfg.channels), np.float32
  )
  text = jax.ShapeDtypeStruct((1, 1, cfg.text_dim), np.float32)
  boxed = jax.eval_shape(
    lambda key: denoiser.init(cfg, key, x, text), jax.random.key(0)
  )

  def place(leaf, sharding):
    return jax.make_array_from_callback(
      leaf.shape,
      sharding,
      lambda i: leaf.read(i).astype(np.float32, copy=False),
    )

  where = trees.flat(_shardings(boxed, mesh))
  return cfg, trees.nested(
    {path: place(parts[path], where[path]) for path in where}
  )


def load_vae(workdir: str | Path) -> tuple[VAEConfig, Params]:
  """The VAE of an imported checkpoint, float32, on the default device.

  Raises:
    UserError: there is none, or it is damaged.
  """
  folder = component(workdir, "vae")
  cfg = read_config(VAEConfig, folder)
  target = jax.eval_shape(lambda key: vae.init(cfg, key), jax.random.key(0))
  return cfg, trees.restore(folder / "params", "params", target)


def load_text_encoder(
  workdir: str | Path, mesh: Mesh | None = None
) -> tuple[UMT5Config, Params]:
  """The text encoder of an imported checkpoint, in its config's dtype.

  Args:
    workdir: the checkpoint.
    mesh: what the parameters are spread over; None is the default device.

  Raises:
    UserError: there is none, or it is damaged.
  """
  folder = component(workdir, "text")
  cfg = read_config(UMT5Config, folder)
  boxed = jax.eval_shape(lambda key: umt5.init(cfg, key), jax.random.key(0))
  target = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    umt5.abstract_params(cfg),
    _shardings(boxed, mesh),
  )
  return cfg, trees.restore(folder / "params", "params", target)


def _shardings(boxed: Any, mesh: Mesh | None) -> Any:
  if mesh is not None:
    return parallel.state_shardings(boxed, mesh)
  here = jax.numpy.zeros(()).sharding
  return jax.tree.map(lambda _: here, nn.meta.unbox(boxed))


def component(workdir: str | Path, name: str) -> Path:
  """Where an imported checkpoint has its "vae" or its "text".

  Raises:
    UserError: it has none.
  """
  folder = Path(workdir) / PLACES[name]
  if not folder.is_dir():
    raise UserError(
      f"{workdir} has no {PLACES[name]}: avd import-wan --component {name}"
      f" --out {workdir} puts one there"
    )
  return folder


def remedy(workdir: str | Path) -> str:
  """What to do with a directory that has no whole checkpoint to sample from.

  Empty where it is neither Wan's own files nor an import that is not finished.
  """
  path = Path(workdir)
  if sources.among(path):
    return (
      f"{path} holds Wan's own files: first avd import-wan --source {path}"
      " --out CKPT, then give CKPT"
    )
  # Its own config.json comes last; training writes one first.
  if (path / "config.json").exists():
    return ""
  if any(path.glob(f"{PLACES['dit']}/0.*")):
    return (
      f"{path} holds an import that was not finished: delete it and run avd"
      f" import-wan --source DIR --out {path} again"
    )
  if any((path / PLACES[name]).is_dir() for name in ("vae", "text")):
    return (
      f"{path} has no transformer: avd import-wan --component dit --source DIR"
      f" --out {path} puts one there"
    )
  return ""


def read_config(cls: type[T], folder: Path) -> T:
  """The config that lies beside an imported component's parameters.

  Raises:
    UserError: there is none, or it is another component's.
  """
  values = read_json(
    folder / "config.json",
    f"{folder / 'config.json'} is missing: delete {folder} and import it again,"
    f" avd import-wan --component {folder.name} --source DIR --out"
    f" {folder.parent}",
  )
  known = {field.name for field in dataclasses.fields(cls)}
  if not isinstance(values, dict) or set(values) - known:
    raise UserError(f"{folder / 'config.json'} is no {cls.__name__}")
  lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
  return cls(**values | lists)
