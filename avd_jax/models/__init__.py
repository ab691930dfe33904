"""Flax networks, handed on as a `Denoiser`."""
