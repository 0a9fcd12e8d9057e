"""Fast computing on a CPU: choice of precision and cores, gradients, optimizer, inference."""
