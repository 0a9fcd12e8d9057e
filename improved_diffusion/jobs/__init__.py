"""Whole jobs, from flags to an exit code: training, drawing, measuring, and opening and resuming runs."""
