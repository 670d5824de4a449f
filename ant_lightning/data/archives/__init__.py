"""Images inside large files: tar shards and zip archives, by an index with random access."""
