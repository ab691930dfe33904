"""A tiny Wan2.1 with random weights, in files like the real ones.

So everything that touches Wan's files can be tried, and tested, without its
17 GB. The files are those of the real repositories: safetensors in one piece
or sharded behind an index, and torch's zip archives.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from avd_jax.errors import UserError
from avd_jax.models.dit_config import DiTConfig
from avd_jax.models.umt5 import UMT5Config
from avd_jax.models.vae import VAEConfig
from avd_jax.wan import exporting, sources, tokenizer, writers
from avd_jax.wan.names import Tensor

LAYOUTS = ("original", "diffusers", "self-forcing")
# Heads have Wan's 128 dimensions, so that shapes alone tell their number.
DIT = DiTConfig(
  dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=32, freq_dim=64
)
VAE = VAEConfig(base_dim=8, num_res_blocks=1)
TEXT = UMT5Config(
  vocab_size=320,
  dim=32,
  attention_dim=32,
  ffn_dim=64,
  num_heads=4,
  num_layers=2,
)
_CONFIGS = {"dit": DIT, "vae": VAE, "text": TEXT}
_F32, _BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


def run(out: str | Path, layout: str = "original", seed: int = 0) -> None:
  """Writes a tiny Wan2.1.

  Args:
    out: a directory that does not exist yet.
    layout: one of LAYOUTS; "self-forcing" is a transformer alone, bfloat16,
      with its average beside it.
    seed: of the weights.

  Raises:
    UserError: another layout, a negative seed, or an `out` that exists.
  """
  out = Path(out)
  if layout not in LAYOUTS:
    raise UserError(f"--layout {layout}: give one of {', '.join(LAYOUTS)}")
  if seed < 0:
    raise UserError(f"--seed {seed}: at least 0")
  if out.exists():
    raise UserError(f"--out {out} exists: give a new directory, or delete it")
  # Before anything is written: it needs a library.
  place = {"original": "google/umt5-xxl", "diffusers": "tokenizer"}.get(layout)
  if place:
    tokenizer.make_tiny(out / place / "tokenizer.json", TEXT.vocab_size)
  out.mkdir(parents=True, exist_ok=True)
  {"original": _original, "diffusers": _diffusers, "self-forcing": _forced}[
    layout
  ](out, seed)


def weights(
  component: str, layout: str, seed: int, dtype: np.dtype = _F32
) -> dict[str, np.ndarray]:
  """A tiny component's tensors, named and shaped as in a file of `layout`."""
  tensors = sources.NAMES[component][1](_CONFIGS[component])
  return {getattr(t, layout): random(t, seed).astype(dtype) for t in tensors}


def random(tensor: Tensor, seed: int) -> np.ndarray:
  """Values for a tensor that leave activations about as large as they were.

  Float32, the same in every layout. Nothing is zero or one, so that a swapped
  name or a forgotten bias shows.
  """
  name, shape = tensor.original, tensor.shape
  rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
  x = rng.standard_normal(shape, np.float32)
  if name.endswith(".bias"):
    return 0.02 * x
  if len(shape) == 1 or name.endswith(".gamma"):
    return 1 + 0.1 * x
  return x * np.float32(np.prod(shape[1:]) ** -0.5)


def _original(out: Path, seed: int) -> None:
  dit = weights("dit", "original", seed)
  _safetensors(out / "diffusion_pytorch_model.safetensors", dit)
  config = {
    "_class_name": "WanModel",
    "dim": DIT.dim,
    "eps": DIT.eps,
    "ffn_dim": DIT.ffn_dim,
    "freq_dim": DIT.freq_dim,
    "in_dim": DIT.channels,
    "model_type": "t2v",
    "num_heads": DIT.num_heads,
    "num_layers": DIT.num_layers,
    "out_dim": DIT.channels,
    "text_len": 512,
  }
  (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  vae = weights("vae", "original", seed)
  writers.write_torch(out / "Wan2.1_VAE.pth", vae)
  text = weights("text", "original", seed, _BF16)
  writers.write_torch(out / "models_t5_umt5-xxl-enc-bf16.pth", text)


def _diffusers(out: Path, seed: int) -> None:
  for component, folder in exporting.FOLDERS.items():
    dtype = _BF16 if component == "text" else _F32
    place, stem = out / folder, exporting.FILES[component]
    place.mkdir()
    tensors = weights(component, "diffusers", seed, dtype)
    if component == "vae":
      _safetensors(place / f"{stem}.safetensors", tensors)
    else:
      _sharded(place, stem, tensors)
    exporting.write_config(place, component, _CONFIGS[component])


def _forced(out: Path, seed: int) -> None:
  trained, average = (
    {
      f"model.{name}": x
      for name, x in weights("dit", "original", s, _BF16).items()
    }
    for s in (seed + 1, seed)
  )
  path = out / "self_forcing_dmd.pt"
  writers.write_torch(path, {"generator": trained, "generator_ema": average})


def _safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
  entries = [(name, x.shape, x.dtype) for name, x in tensors.items()]
  with writers.Safetensors(path, entries) as file:
    for name, x in tensors.items():
      file.put(name, x)


def _sharded(
  folder: Path, stem: str, tensors: Mapping[str, np.ndarray]
) -> None:
  """Two files and their index."""
  names = list(tensors)
  places = {}
  for i, mine in enumerate((names[::2], names[1::2]), 1):
    file = f"{stem}-{i:05}-of-00002.safetensors"
    _safetensors(folder / file, {name: tensors[name] for name in mine})
    places |= dict.fromkeys(mine, file)
  size = sum(x.nbytes for x in tensors.values())
  index = {"metadata": {"total_size": size}, "weight_map": places}
  (folder / f"{stem}.safetensors.index.json").write_text(
    json.dumps(index, indent=2) + "\n"
  )
