"""This project's checkpoints, as diffusers and transformers read them.

Leaf by leaf, as importing does it, and the way back from it: what was imported
comes out as it was, bit by bit, whatever layout it came in.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from avd_jax import checkpoint
from avd_jax import config as config_lib
from avd_jax.errors import UserError
from avd_jax.models.dit_config import DiTConfig
from avd_jax.models.umt5 import UMT5Config
from avd_jax.models.vae import VAEConfig
from avd_jax.wan import importing, sources, trees
from avd_jax.wan.names import Tensor
from avd_jax.wan.writers import Safetensors

FOLDERS = {"dit": "transformer", "vae": "vae", "text": "text_encoder"}
FILES = {
  "dit": "diffusion_pytorch_model",
  "vae": "diffusion_pytorch_model",
  "text": "model",
}


def dit_config(cfg: DiTConfig) -> dict[str, Any]:
  """diffusers' config.json of a transformer."""
  return {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.33.0",
    "added_kv_proj_dim": None,
    "attention_head_dim": cfg.head_dim,
    "cross_attn_norm": True,
    "eps": cfg.eps,
    "ffn_dim": cfg.ffn_dim,
    "freq_dim": cfg.freq_dim,
    "image_dim": None,
    "in_channels": cfg.channels,
    "num_attention_heads": cfg.num_heads,
    "num_layers": cfg.num_layers,
    "out_channels": cfg.channels,
    "patch_size": [1, cfg.patch, cfg.patch],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": cfg.text_dim,
  }


def vae_config(cfg: VAEConfig) -> dict[str, Any]:
  """diffusers' config.json of a VAE."""
  return {
    "_class_name": "AutoencoderKLWan",
    "_diffusers_version": "0.33.0",
    "attn_scales": [],
    "base_dim": cfg.base_dim,
    "dim_mult": list(cfg.dim_mult),
    "dropout": 0.0,
    "latents_mean": list(cfg.latents_mean),
    "latents_std": list(cfg.latents_std),
    "num_res_blocks": cfg.num_res_blocks,
    "temperal_downsample": list(cfg.temporal_downsample),
    "z_dim": cfg.z_dim,
  }


def text_config(cfg: UMT5Config) -> dict[str, Any]:
  """transformers' config.json of a text encoder."""
  return {
    "architectures": ["UMT5EncoderModel"],
    "model_type": "umt5",
    "d_ff": cfg.ffn_dim,
    "d_kv": cfg.attention_dim // cfg.num_heads,
    "d_model": cfg.dim,
    "dense_act_fn": "gelu_new",
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": cfg.eps,
    "num_heads": cfg.num_heads,
    "num_layers": cfg.num_layers,
    "pad_token_id": 0,
    "relative_attention_max_distance": cfg.max_distance,
    "relative_attention_num_buckets": cfg.num_buckets,
    "torch_dtype": cfg.dtype,
    "vocab_size": cfg.vocab_size,
  }


CONFIGS = {"dit": dit_config, "vae": vae_config, "text": text_config}


def run(
  workdir: str | Path,
  out: str | Path,
  component: str | None = None,
  say: Callable[[str], None] = lambda line: None,
) -> None:
  """Writes a checkpoint's components in the diffusers layout.

  Args:
    workdir: an imported checkpoint, or a run that was trained from one, whose
      averaged weights are taken.
    out: a directory that does not exist yet.
    component: only this one, of sources.COMPONENTS.
    say: hears of each component.

  Raises:
    UserError: nothing to export, a model that is not Wan's, or an `out` that
      exists.
  """
  workdir, out = Path(workdir), Path(out)
  if out.exists():
    raise UserError(f"--out {out} exists: give a new directory, or delete it")
  if not workdir.is_dir():
    raise UserError(f"--workdir {workdir} does not exist")
  names = [component] if component else list(FOLDERS)
  found = {n: _OPEN[n](workdir) for n in names if _has(workdir, n)}
  if not found:
    raise UserError(
      f"--workdir {workdir} holds no {component or 'Wan2.1 weights'}"
    )
  out.parent.mkdir(parents=True, exist_ok=True)
  # Beside it, so that a rename makes it whole.
  with tempfile.TemporaryDirectory(dir=out.parent, prefix="export-") as beside:
    part = Path(beside) / out.name
    for name, (cfg, tree) in found.items():
      folder = part / FOLDERS[name]
      folder.mkdir(parents=True)
      _write(folder / f"{FILES[name]}.safetensors", name, cfg, tree)
      write_config(folder, name, cfg)
      say(f"{name}: {importing.summary(tree.kinds)} to {out / FOLDERS[name]}")
    if "text" in found:
      for file in map(workdir.joinpath, sources.TOKENIZER_FILES):
        if file.is_file():
          (part / "tokenizer").mkdir(exist_ok=True)
          shutil.copyfile(file, part / "tokenizer" / file.name)
    part.rename(out)


def write_config(folder: Path, name: str, cfg: Any) -> None:
  """Writes a component's config.json."""
  values = CONFIGS[name](cfg)
  (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def _has(workdir: Path, name: str) -> bool:
  return (workdir / importing.PLACES[name]).is_dir()


def _open_dit(workdir: Path) -> tuple[DiTConfig, trees.Saved]:
  checkpoints, step = checkpoint.open_existing(workdir)
  try:
    recorded = checkpoints.record(step)["config"]
    config = config_lib.from_json(config_lib.complete(recorded))
    path = checkpoints.path / str(step) / "ema"
  finally:
    checkpoints.close()
  cfg = config_lib.typed(DiTConfig, config.model)
  for field, value in (
    ("text", "embeddings"),
    ("prediction", "v"),
    ("spatial_embedding", None),
  ):
    if getattr(cfg, field) != value:
      raise UserError(
        f"--workdir {workdir}: model.{field} is {getattr(cfg, field)!r}, but"
        f" Wan's layout has no place for other than {value!r}"
      )
  return cfg, trees.saved(path, "ema")


def _open_vae(workdir: Path) -> tuple[VAEConfig, trees.Saved]:
  folder = workdir / importing.PLACES["vae"]
  cfg = importing.read_config(VAEConfig, folder)
  return cfg, trees.saved(folder / "params", "params")


def _open_text(workdir: Path) -> tuple[UMT5Config, trees.Saved]:
  folder = workdir / importing.PLACES["text"]
  cfg = importing.read_config(UMT5Config, folder)
  return cfg, trees.saved(folder / "params", "params")


_OPEN = {"dit": _open_dit, "vae": _open_vae, "text": _open_text}


def _write(path: Path, name: str, cfg: Any, tree: trees.Saved) -> None:
  tensors: dict[str, list[Tensor]] = {}
  for tensor in sources.NAMES[name][1](cfg):
    tensors.setdefault(tensor.path, []).append(tensor)
  entries = [
    (tensor.diffusers, tensor.shape, tree.kinds[leaf].dtype)
    for leaf, found in tensors.items()
    for tensor in found
  ]
  with Safetensors(path, entries) as file:
    for leaf, x in tree.each():
      for tensor in tensors[leaf]:
        file.put(
          tensor.diffusers,
          tensor.theirs(x[... if tensor.layer is None else tensor.layer]),
        )
      del x  # before the next one comes
