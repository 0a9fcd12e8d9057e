"""The files and processes of a run: checkpoints, the lock, signals, remote folders, other processes."""
