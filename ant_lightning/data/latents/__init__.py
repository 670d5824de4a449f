"""Cached latents."""
