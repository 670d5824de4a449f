"""What keeps a run alive: checkpoints, signals, ranks."""
