"""Lowers and compiles for hardware that is not there."""
