"""LightningDataModules: image files, images drawn by a program, and cached latents."""
