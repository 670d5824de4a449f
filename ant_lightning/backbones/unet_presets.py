"""The published UNets of ADM, P2 weighting and LDM."""

from __future__ import annotations

from ant_lightning.backbones.unet import UNet

__all__ = ["adm_imagenet64", "adm_imagenet256", "adm_p2_light", "ldm_cin256", "ldm_ffhq256"]


def adm_imagenet256(
    *,
    input_size: int = 256,
    model_channels: int = 256,
    num_classes: int = 0,
    class_dropout_prob: float = 0.0,
    learn_sigma: bool = True,
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
    channels_last: bool = False,
    compiled: bool = False,
) -> UNet:
    """ADM at 256 pixels (``256x256_diffusion_uncond.pt``; with 1000 classes, the conditional one).

    Args:
        input_size: height and width of the images.
        model_channels: channels at the highest resolution; 256 for the published weights.
        num_classes: number of classes, 0 for the unconditional model.
        class_dropout_prob: above 0, one more row for a null class (not in published weights).
        learn_sigma: twice the output channels, the second half for the variance.
        dropout: probability of dropping a unit inside residual blocks.
        gradient_checkpointing: recompute each block in the backward pass.
        channels_last: keep feature maps with the channels innermost, as GPUs convolve fastest.
        compiled: run through ``torch.compile``, which compiles at the first call.

    Reference:
        Dhariwal and Nichol, arXiv 2105.05233.
    """
    return UNet(
        input_size=input_size,
        out_channels=6 if learn_sigma else 3,
        model_channels=model_channels,
        channel_mult=(1, 1, 2, 2, 4, 4),
        attention_resolutions=(8, 16, 32),
        num_head_channels=64,
        use_scale_shift_norm=True,
        resblock_updown=True,
        num_classes=num_classes,
        class_dropout_prob=class_dropout_prob,
        dropout=dropout,
        gradient_checkpointing=gradient_checkpointing,
        channels_last=channels_last,
        compiled=compiled,
    )


def adm_imagenet64(
    *,
    input_size: int = 64,
    model_channels: int = 192,
    num_classes: int = 1000,
    class_dropout_prob: float = 0.0,
    learn_sigma: bool = True,
    dropout: float = 0.1,
    gradient_checkpointing: bool = False,
    channels_last: bool = False,
    compiled: bool = False,
) -> UNet:
    """ADM at 64 pixels, class-conditional (``64x64_diffusion.pt``).

    Args:
        input_size: height and width of the images.
        model_channels: channels at the highest resolution; 192 for the published weights.
        num_classes: number of classes, 0 for an unconditional model.
        class_dropout_prob: above 0, one more row for a null class (not in published weights).
        learn_sigma: twice the output channels, the second half for the variance.
        dropout: probability of dropping a unit inside residual blocks.
        gradient_checkpointing: recompute each block in the backward pass.
        channels_last: keep feature maps with the channels innermost, as GPUs convolve fastest.
        compiled: run through ``torch.compile``, which compiles at the first call.

    Reference:
        Dhariwal and Nichol, arXiv 2105.05233.
    """
    return UNet(
        input_size=input_size,
        out_channels=6 if learn_sigma else 3,
        model_channels=model_channels,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=3,
        attention_resolutions=(2, 4, 8),
        num_head_channels=64,
        use_new_attention_order=True,
        use_scale_shift_norm=True,
        resblock_updown=True,
        num_classes=num_classes,
        class_dropout_prob=class_dropout_prob,
        dropout=dropout,
        gradient_checkpointing=gradient_checkpointing,
        channels_last=channels_last,
        compiled=compiled,
    )


def adm_p2_light(
    *,
    input_size: int = 256,
    model_channels: int = 128,
    learn_sigma: bool = True,
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
    channels_last: bool = False,
    compiled: bool = False,
) -> UNet:
    """The lightweight ADM of P2 weighting, for FFHQ and CelebA-HQ at 256 pixels.

    Args:
        input_size: height and width of the images.
        model_channels: channels at the highest resolution; 128 for the published weights.
        learn_sigma: twice the output channels, the second half for the variance.
        dropout: probability of dropping a unit inside residual blocks.
        gradient_checkpointing: recompute each block in the backward pass.
        channels_last: keep feature maps with the channels innermost, as GPUs convolve fastest.
        compiled: run through ``torch.compile``, which compiles at the first call.

    Reference:
        Choi et al., "Perception Prioritized Training of Diffusion Models", arXiv 2204.00227.
    """
    return UNet(
        input_size=input_size,
        out_channels=6 if learn_sigma else 3,
        model_channels=model_channels,
        channel_mult=(1, 1, 2, 2, 4, 4),
        num_res_blocks=1,
        attention_resolutions=(16,),
        num_head_channels=64,
        use_scale_shift_norm=True,
        resblock_updown=True,
        dropout=dropout,
        gradient_checkpointing=gradient_checkpointing,
        channels_last=channels_last,
        compiled=compiled,
    )


def ldm_ffhq256(
    *,
    input_size: int = 64,
    model_channels: int = 224,
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
    channels_last: bool = False,
    compiled: bool = False,
) -> UNet:
    """LDM's UNet for FFHQ and CelebA-HQ at 256 pixels: 3-channel latents of 64 x 64 (f=4, VQ).

    Args:
        input_size: height and width of the latents.
        model_channels: channels at the highest resolution; 224 for the published weights.
        dropout: probability of dropping a unit inside residual blocks.
        gradient_checkpointing: recompute each block in the backward pass.
        channels_last: keep feature maps with the channels innermost, as GPUs convolve fastest.
        compiled: run through ``torch.compile``, which compiles at the first call.

    Reference:
        Rombach et al., arXiv 2112.10752.
    """
    return UNet(
        input_size=input_size,
        model_channels=model_channels,
        channel_mult=(1, 2, 3, 4),
        attention_resolutions=(2, 4, 8),
        num_head_channels=32,
        dropout=dropout,
        gradient_checkpointing=gradient_checkpointing,
        channels_last=channels_last,
        compiled=compiled,
    )


def ldm_cin256(
    *,
    input_size: int = 64,
    model_channels: int = 192,
    num_classes: int = 1000,
    class_dropout_prob: float = 0.1,
    context_dim: int = 512,
    dropout: float = 0.0,
    gradient_checkpointing: bool = False,
    channels_last: bool = False,
    compiled: bool = False,
) -> UNet:
    """LDM's class-conditional UNet for ImageNet at 256 pixels (``cin256-v2``).

    Args:
        input_size: height and width of the latents (f=4, VQ, 3 channels).
        model_channels: channels at the highest resolution; 192 for the published weights.
        num_classes: number of classes; 0 leaves the class embedder out, and the caller passes
            the context.
        class_dropout_prob: above 0, the table has a null class, as the published one has.
        context_dim: features of the context token.
        dropout: probability of dropping a unit inside residual blocks.
        gradient_checkpointing: recompute each block in the backward pass.
        channels_last: keep feature maps with the channels innermost, as GPUs convolve fastest.
        compiled: run through ``torch.compile``, which compiles at the first call.

    Reference:
        Rombach et al., arXiv 2112.10752.
    """
    return UNet(
        input_size=input_size,
        model_channels=model_channels,
        channel_mult=(1, 2, 3, 5),
        attention_resolutions=(2, 4, 8),
        num_classes=num_classes,
        class_dropout_prob=class_dropout_prob,
        use_spatial_transformer=True,
        context_dim=context_dim,
        dropout=dropout,
        gradient_checkpointing=gradient_checkpointing,
        channels_last=channels_last,
        compiled=compiled,
    )
