"""BAgger: rounds of rolling out, reversing, aggregating and training.

`prompts` rewrites captions for reversed videos, `rollouts` makes a round's
trajectories, `rounds` is the loop over rounds.
"""
