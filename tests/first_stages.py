"""Random first stages of a size that tests can afford."""

import torch

__all__ = ["save_dc", "save_first_stages"]


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


def save_dc(folder, levels):
    """Write a folder of diffusers with an `AutoencoderDC` like Sana's, f = 2^(levels - 1)."""
    from diffusers import AutoencoderDC

    torch.manual_seed(0)
    AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8,) * levels,
        decoder_block_out_channels=(8,) * levels,
        encoder_layers_per_block=(1,) * levels,
        decoder_layers_per_block=(1,) * levels,
        encoder_qkv_multiscales=((),) * levels,
        decoder_qkv_multiscales=((),) * levels,
        scaling_factor=0.41407,
    ).save_pretrained(folder)
    return folder
