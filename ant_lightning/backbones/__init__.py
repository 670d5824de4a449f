"""The networks, DiT and UNet, their published sizes and their published files."""

from ant_lightning.backbones.checkpoints import (
    CheckpointReport,
    first_stage_state_dict,
    load_official_checkpoint,
)
from ant_lightning.backbones.dit import DiT
from ant_lightning.backbones.dit_presets import (
    dit_b_2,
    dit_b_4,
    dit_b_8,
    dit_l_2,
    dit_l_4,
    dit_l_8,
    dit_s_2,
    dit_s_4,
    dit_s_8,
    dit_xl_2,
    dit_xl_4,
    dit_xl_8,
)
from ant_lightning.backbones.unet import ClassEmbedder, UNet
from ant_lightning.backbones.unet_presets import (
    adm_imagenet64,
    adm_imagenet256,
    adm_p2_light,
    ldm_cin256,
    ldm_ffhq256,
)

__all__ = [
    "CheckpointReport",
    "ClassEmbedder",
    "DiT",
    "UNet",
    "adm_imagenet64",
    "adm_imagenet256",
    "adm_p2_light",
    "dit_b_2",
    "dit_b_4",
    "dit_b_8",
    "dit_l_2",
    "dit_l_4",
    "dit_l_8",
    "dit_s_2",
    "dit_s_4",
    "dit_s_8",
    "dit_xl_2",
    "dit_xl_4",
    "dit_xl_8",
    "first_stage_state_dict",
    "ldm_cin256",
    "ldm_ffhq256",
    "load_official_checkpoint",
]
