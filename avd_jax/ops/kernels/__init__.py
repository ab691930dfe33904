"""Attention kernels written in Pallas, one module a family."""
