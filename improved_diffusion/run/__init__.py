"""What surrounds a training run: checkpoints, the lock of its directory, signals, cloud storage, the heartbeat."""
