"""Trained models for others' programs: diffusers, the official code, safetensors, torch.export."""
