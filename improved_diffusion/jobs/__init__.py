"""Whole jobs, from flags to an exit code: train, draw, and how runs are opened, resumed and recorded."""
