"""Where Wan's components lie in a download, and in which layout.

Read are the original repository's directory, diffusers' (with transformers'
text encoder), a component's own directory, and single files; among the latter
what Self Forcing saves, `generator_ema` preferred, since that is what it
samples with. Whose tensors a file holds is told by their names, not by its own.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avd_jax.disk import read_json
from avd_jax.errors import UserError
from avd_jax.models.dit_config import DiTConfig
from avd_jax.models.umt5 import UMT5Config
from avd_jax.models.vae import VAEConfig
from avd_jax.wan import dit_names, readers, umt5_names, vae_names
from avd_jax.wan.readers import Stored

NAMES = {
  "dit": (DiTConfig, dit_names.tensors, "Wan2.1 transformer"),
  "vae": (VAEConfig, vae_names.tensors, "Wan2.1 VAE"),
  "text": (UMT5Config, umt5_names.tensors, "umT5 encoder"),
}
COMPONENTS = tuple(NAMES)
LAYOUTS = ("original", "diffusers")
# Of a component's config.json.
_CLASSES = {
  "WanModel": "dit",
  "WanTransformer3DModel": "dit",
  "AutoencoderKLWan": "vae",
  "UMT5EncoderModel": "text",
}
_FOLDERS = ("transformer", "vae", "text_encoder", ".")
_SHARDED = ("diffusion_pytorch_model", "model")
_SINGLE = ("*VAE*.pth", "models_t5*.pth", "*.pt")
_TOKENIZERS = ("google/umt5-xxl", "tokenizer", ".", "../tokenizer")
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
# What wrappers of a model put into its tensors' names.
_WRAPPERS = (
  "_fsdp_wrapped_module.",
  "_checkpoint_wrapped_module.",
  "_orig_mod.",
)
_IMAGE = ("img_emb.", "image_embedder.", "k_img.", "add_k_proj.")


@dataclasses.dataclass(frozen=True)
class Source:
  """A component, found.

  Attributes:
    component: one of COMPONENTS.
    layout: one of LAYOUTS, whose names `tensors` have.
    path: the file or directory, for messages.
    tensors: by name.
    config: its config.json; None where there is none.
    few_steps: whether it is what Self Forcing saves.
  """

  component: str
  layout: str
  path: Path
  tensors: Mapping[str, Stored]
  config: Mapping[str, Any] | None
  few_steps: bool = False

  @property
  def title(self) -> str:
    """What it is, for people."""
    return NAMES[self.component][2]


def find(source: str | Path, component: str | None = None) -> list[Source]:
  """The components of a file or a directory.

  Args:
    source: the file or directory.
    component: only this one, of COMPONENTS.

  Raises:
    UserError: nothing there, nothing known, or damaged files.
  """
  source = Path(source)
  if source.is_file():
    found = [_classified(source, readers.read(source))]
  elif source.is_dir():
    found = _in_directory(source)
  else:
    raise UserError(f"no Wan weights at {source}: it does not exist")
  there = ", ".join(f.component for f in found) or "nothing"
  if component is not None:
    found = [f for f in found if f.component == component]
  if not found:
    raise UserError(
      f"{source}: no {component or 'Wan2.1 weights'} there (found:"
      f" {there}); give the directory that was downloaded, original or"
      f" diffusers, or a file of {', '.join(readers.SUFFIXES)}"
    )
  return found


def among(path: str | Path) -> bool:
  """Whether files of the kinds that `find` reads lie at a path."""
  path = Path(path)
  if path.is_file():
    return path.suffix in readers.SUFFIXES
  patterns = [
    f"{place}/*{end}" for place in _FOLDERS for end in readers.SUFFIXES
  ]
  return any(next(path.glob(pattern), None) for pattern in patterns)


def tokenizer(source: str | Path) -> Path | None:
  """The tokenizer's file that belongs to a source, if there is one."""
  source = Path(source)
  folder = source if source.is_dir() else source.parent
  for place in _TOKENIZERS:
    for name in TOKENIZER_FILES:
      if (folder / place / name).is_file():
        return folder / place / name
  return None


def _in_directory(folder: Path) -> list[Source]:
  found: dict[str, Source] = {}
  for name in _FOLDERS:
    place = folder / name
    for stem in _SHARDED:
      tensors = _sharded(place, stem)
      if tensors:
        source = _classified(place, tensors)
        found.setdefault(source.component, source)
  for pattern in _SINGLE:
    paths = sorted(folder.glob(pattern))
    if len(paths) > 1:
      raise UserError(
        f"{folder} holds {len(paths)} files {pattern}: give one of them"
      )
    for path in paths:
      source = _classified(path, readers.read(path))
      found.setdefault(source.component, source)
  return [found[name] for name in COMPONENTS if name in found]


def _sharded(folder: Path, stem: str) -> dict[str, Stored]:
  """The tensors of a file, or of the files that an index names."""
  index, whole = (
    folder / f"{stem}.safetensors{end}" for end in (".index.json", "")
  )
  if whole.is_file():
    return readers.read(whole)
  if not index.is_file():
    if list(folder.glob(f"{stem}-*.safetensors")):
      raise UserError(f"{index} is missing: download it too")
    return {}
  places = _weight_map(index)
  files = {
    name: readers.read(folder / Path(name).name)
    for name in sorted(set(places.values()))
  }
  for tensor, name in places.items():
    if tensor not in files[name]:
      raise UserError(f"{index} says that {name} holds {tensor}: it does not")
  return {tensor: s for held in files.values() for tensor, s in held.items()}


def _weight_map(index: Path) -> dict[str, str]:
  """{tensor: file} of an index."""
  values = read_json(index)
  places = values.get("weight_map") if isinstance(values, dict) else None
  if not (
    isinstance(places, dict)
    and places
    and all(isinstance(name, str) and name for name in places.values())
  ):
    raise UserError(
      f"{index} is damaged: it has no weight_map of tensors to files; download"
      " it again"
    )
  return places


def _classified(path: Path, content: Any) -> Source:
  nested, tensors = _state_dict(path, content)
  tensors = {_unwrapped(name): stored for name, stored in tensors.items()}
  for alias, name in umt5_names.ALIASES.items():
    if alias in tensors:  # tied: files have both names, or either
      tensors.setdefault(name, tensors.pop(alias))
  _refuse_relatives(path, tensors)
  common = {}
  for component, (config, names, _) in NAMES.items():
    known = names(config())
    for layout in LAYOUTS:
      ours = {getattr(t, layout) for t in known}
      common[component, layout] = len(ours & set(tensors))
  component, layout = max(common, key=common.__getitem__)
  if not common[component, layout]:
    raise UserError(
      f"{path} holds no Wan2.1 transformer, VAE or umT5 encoder: its tensors"
      f" are {some(tensors)}"
    )
  config = _config(path, component)
  few_steps = nested and component == "dit"
  return Source(component, layout, path, tensors, config, few_steps)


def some(names: Any) -> str:
  """The first few names, and how many there are."""
  names = sorted(names)
  more = f" and {len(names) - 3} more" if len(names) > 3 else ""
  return ", ".join(names[:3]) + more


def _state_dict(path: Path, content: Any) -> tuple[bool, Mapping[str, Stored]]:
  """(whether it is Self Forcing's, tensors by name) of what a file holds."""
  nested = False
  if isinstance(content, Mapping):
    for key in ("generator_ema", "generator"):
      if isinstance(content.get(key), Mapping):
        nested, content = True, content[key]
        break
    if content and all(isinstance(v, Stored) for v in content.values()):
      return nested, content
  keys = some(map(str, content)) if isinstance(content, Mapping) else "no names"
  raise UserError(
    f"{path} is no state dict: it holds {keys}; of nested files only those of"
    " Self Forcing are read (generator, generator_ema)"
  )


def _unwrapped(name: str) -> str:
  for wrapper in _WRAPPERS:
    name = name.replace(wrapper, "")
  return name.removeprefix("model.")


def _refuse_relatives(path: Path, tensors: Mapping[str, Stored]) -> None:
  """Names models that look like Wan2.1's text-to-video and are not."""
  patches = tensors.get("patch_embedding.weight")
  out = tensors.get("head.head.weight") or tensors.get("proj_out.weight")
  # An image's latents and mask come in beside the video's, and do not go out.
  wide = (
    patches is not None
    and out is not None
    and math.prod(patches.shape[1:]) >= 2 * out.shape[0]
  )
  if wide or any(mark in name for name in tensors for mark in _IMAGE):
    raise UserError(
      f"{path} is an image-to-video Wan, which is not supported: give a"
      " text-to-video one (Wan2.1-T2V)"
    )
  if any(name.startswith("vace_") for name in tensors):
    raise UserError(
      f"{path} is a VACE Wan, which is not supported: give a text-to-video one"
      " (Wan2.1-T2V)"
    )


def config_file(path: Path) -> Path:
  """Where the config.json of weights at `path` would lie."""
  return (path if path.is_dir() else path.parent) / "config.json"


def _config(path: Path, component: str) -> Mapping[str, Any] | None:
  """The config.json beside a component's weights, if it is its own."""
  file = config_file(path)
  if not file.is_file():
    return None
  config = read_json(file)
  if not isinstance(config, dict):
    raise UserError(f"{file} is not a JSON object")
  names = [config.get("_class_name"), *(config.get("architectures") or [])]
  return config if component in map(_CLASSES.get, map(str, names)) else None
