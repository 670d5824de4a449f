"""Tasks: clusters of timesteps, and the methods that find them; each is also `ant_lightning.NAME`.

Nothing is imported here, so that figures of clusters can be drawn without waiting for PyTorch.
"""
