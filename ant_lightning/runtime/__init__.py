"""What long runs need: checkpoints, stop signals, agreement of ranks, records of settings."""
