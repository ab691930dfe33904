"""What a step needs, by arithmetic alone, before any compiler is asked."""

import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from avd_jax import config as config_lib
from avd_jax import parallel
from avd_jax.aot.chips import Chip
from avd_jax.models import denoiser as denoiser_lib
from avd_jax.models.dit_config import DiTConfig


def _model(config: ConfigDict) -> DiTConfig:
  return config_lib.typed(DiTConfig, config.model)


def _forward(config: ConfigDict, frames: int, streams: int) -> int:
  size = config.data.height, config.data.width
  if not frames:
    return 0
  return denoiser_lib.forward_flops(_model(config), frames, *size, streams)


def chunk_flops(config: ConfigDict, index: int) -> int:
  """A pass of the chunk with this index against those before it."""
  size = config.model.chunk_frames
  whole, before = ((index + more) * size for more in (1, 0))
  return _forward(config, whole, 1) - _forward(config, before, 1)


def _detached(stage: ConfigDict, local: int) -> bool:
  every = stage.degradation.full_every
  full = every and local % every == every - 1
  return stage.degradation.detached and not full


def _gradient_flops(config: ConfigDict, name: str, local: int) -> int:
  """The forward pass of a video that gradients are taken of."""
  stage, frames = config.stage[name], config.data.frames
  one, two = (_forward(config, frames, streams) for streams in (1, 2))
  if stage.objective == "diffusion_forcing":
    return one
  if stage.objective == "dmd":
    return two - one + stage.dmd.critic_updates * two
  return two - one if _detached(stage, local) else two


def _linear(config: ConfigDict, name: str, local: int) -> int:
  """The part of it that linear layers take, without attention."""
  model, data, stage = _model(config), config.data, config.stage[name]
  rows, columns = model.grid(data.height, data.width)
  widths = 4 * model.dim**2 + 2 * model.dim * model.ffn_dim
  if model.text != "none":
    widths += 2 * model.dim**2
  all_tokens = _streams(stage, local) * data.frames * rows * columns
  return 2 * model.num_layers * all_tokens * widths


def _streams(stage: ConfigDict, local: int = 0) -> int:
  """Streams of tokens that gradients are taken of."""
  if stage.objective == "dmd":
    return 1 + 2 * stage.dmd.critic_updates
  one = stage.objective == "diffusion_forcing" or _detached(stage, local)
  return 1 if one else 2


def _other_flops(config: ConfigDict, name: str) -> int:
  """The passes of a video without gradient: its history, its target."""
  stage, frames = config.stage[name], config.data.frames
  options, two = stage.degradation, _forward(config, frames, 2)
  flops = 2 * two if stage.objective == "consistency" else 0
  if stage.objective == "dmd":
    guided = stage.dmd.guidance != 1
    chunks = frames // config.model.chunk_frames
    flops += (2 + guided) * two
    flops += _rollout_flops(config, stage, chunks, stage.dmd.steps)
  if stage.history == "parallel_resampled":
    flops += options.steps * two
  elif stage.history == "self_resampled":
    chunks = frames // config.model.chunk_frames
    flops += _rollout_flops(config, stage, chunks - 1, options.steps)
  return flops


def _rollout_flops(
  config: ConfigDict, stage: ConfigDict, chunks: int, steps: int
) -> int:
  """Of a video's first chunks, solved and taken into a cache."""
  options, flops = stage.degradation, 0
  given = 0 if options.random_prefix else options.clean_prefix
  if stage.objective == "dmd":
    given = max(given, config.loss.skip_chunks)
  given = min(given, config.data.frames // config.model.chunk_frames - 1)
  for index in range(chunks):
    flops += (1 + steps * (index >= given)) * chunk_flops(config, index)
  return flops


def step_flops(
  config: ConfigDict, name: str, local: int = 0
) -> tuple[int, int]:
  """FLOPs of a training step: what it needs, and that with recomputing.

  Linear layers and visible attention, as `denoiser.forward_flops` counts them:
  gradients take twice a forward pass, histories and targets forward passes
  alone.
  """
  gradient = _gradient_flops(config, name, local)
  needed = 3 * gradient + _other_flops(config, name)
  again = {"none": 0, "dots": gradient - _linear(config, name, local)}
  done = needed + again.get(config.model.remat, gradient)
  videos = config.data.batch_size
  return videos * needed, videos * done


def held(tree: Any) -> int:
  """Bytes that a device holds of a tree of sharded shapes."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def state_bytes(state: Any) -> dict[str, int]:
  """What a device holds of a training state, by part."""
  parts = {
    "parameters": state.params,
    "EMA": state.ema,
    "optimizer": state.optimizer,
    "objective": state.memory,
  }
  return {name: held(part) for name, part in parts.items()}


def _shards(mesh: Mesh) -> tuple[int, int, int]:
  """Parts of the batch, of tokens and of heads."""
  shape = mesh.shape
  return shape["data"] * shape["fsdp"], shape["context"], shape["tensor"]


def tokens(config: ConfigDict, name: str, mesh: Mesh) -> float:
  """Tokens of a microbatch, of all streams with gradients, on a device."""
  model, data, stage = _model(config), config.data, config.stage[name]
  rows, columns = model.grid(data.height, data.width)
  videos, context, _ = _shards(mesh)
  batch = data.batch_size / config.optimizer.accumulation / videos
  # A critic's updates come one after another.
  streams = min(_streams(stage), 2)
  return batch * streams * data.frames * rows * columns / context


def count(params: Any) -> int:
  """Weights of a tree, boxed or not."""
  return sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(params)))


def cut(state: Any, mesh: Mesh) -> dict[str, int]:
  """What a device of a mesh holds of a training state, by part.

  Args:
    state: its shapes, boxed with logical axes.
    mesh: to cut it by.

  Raises:
    UserError: a mesh that does not cut the weights evenly.
  """
  place = lambda s, sharding: jax.ShapeDtypeStruct(
    s.shape, s.dtype, sharding=sharding
  )
  shardings = parallel.state_shardings(state, mesh)
  return state_bytes(jax.tree.map(place, nn.meta.unbox(state), shardings))


def least_memory(
  config: ConfigDict, name: str, parts: dict[str, int], mesh: Mesh
) -> int:
  """Bytes that a training step cannot do without on a device.

  The state, and the larger of its gradients and what the backward pass needs
  of the forward one: a block's input, and what its linear layers gave where
  those are not run again. Logits, norms and whatever a compiler keeps besides
  come on top.

  Args:
    config: with the mesh's remat and accumulation.
    name: of the stage.
    parts: what `cut` gives.
    mesh: of the devices.
  """
  model, (_, _, tensor) = _model(config), _shards(mesh)
  # The residual stream is float32.
  kept = 0 if model.remat == "offload" else 4 * model.dim
  if model.remat in ("none", "dots"):
    size = 2 if model.dtype == "bfloat16" else 4
    kept += size * (3 * model.dim + model.ffn_dim) // tensor
  kept = int(model.num_layers * tokens(config, name, mesh) * kept)
  gradients = parts["parameters"]
  if config.optimizer.accumulation > 1:
    return sum(parts.values()) + gradients + kept
  return sum(parts.values()) + max(gradients, kept)


def guess_seconds(
  config: ConfigDict, name: str, weights: int, mesh: Mesh, chip: Chip
) -> tuple[float, float]:
  """(computing, exchange): seconds of a step, by rules of thumb.

  They say what to try first, no more.
  Weights are gathered over fsdp in every pass, gradients summed over data and
  fsdp; two sums a layer over tensor; over context travel keys and values, or,
  where history is routed, queries and what they found.
  """
  model, shape = _model(config), mesh.shape
  fsdp, data, tensor = shape["fsdp"], shape["data"], shape["tensor"]
  size = 2 if model.dtype == "bfloat16" else 4
  _, done = step_flops(config, name)
  compute = done / (mesh.size * chip.peak[model.dtype])
  times = config.optimizer.accumulation
  passes = done / (config.data.batch_size * _gradient_flops(config, name, 0))
  share = weights / tensor
  sent = passes * times * size * share * (fsdp - 1) / fsdp
  sent += times * 4 * share * (fsdp - 1) / fsdp
  sent += 2 * 4 * share / fsdp * (data - 1) / data
  row = tokens(config, name, mesh) * times * model.dim * model.num_layers
  sent += passes * row * 4 * 4 * (tensor - 1) / tensor
  routed = model.attention.routing_top_k is not None
  sent += (
    passes
    * row
    * (size + 4 if routed else 2 * size)
    * (shape["context"] - 1)
    / tensor
  )
  return compute, sent / chip.ring
