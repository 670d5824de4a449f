"""LightningDataModules: real images, drawn ones, and cached latents."""
