"""Programs: flags and devices, nothing else."""
