"""Random first stages of a size that tests can afford."""

import torch

__all__ = ["save_first_stages"]


def save_first_stages(root):
    """Write folders of diffusers with autoencoders of 3-channel images, `kl` and `vq`, f = 2."""
    from diffusers import AutoencoderKL, VQModel

    common = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
    }
    torch.manual_seed(0)
    AutoencoderKL(latent_channels=4, **common).save_pretrained(root / "kl")
    vq = VQModel(latent_channels=3, num_vq_embeddings=16, **common)
    torch.nn.init.normal_(vq.quantize.embedding.weight)
    vq.save_pretrained(root / "vq")
    return root
