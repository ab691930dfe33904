"""Wan2.1's files: names, layouts, tokens."""
