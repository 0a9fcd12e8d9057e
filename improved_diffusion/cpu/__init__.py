"""Fast computing on a CPU: precision and cores, gradients, the optimizer, inference without gradients."""
