"""Latents that are encoded once, stored in a cache, and trained on."""
