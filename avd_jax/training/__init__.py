"""Training: a pure step, the program around it, and the host loop."""
