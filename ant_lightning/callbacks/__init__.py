"""Callbacks of training; each is also `ant_lightning.NAME`."""
