"""Autoregressive video diffusion that does not drift, in JAX."""
