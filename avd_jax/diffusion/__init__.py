"""Flow matching, solvers, guidance and the one autoregressive rollout."""
