"""How DiT and UNet are written as networks of diffusers."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ant_lightning.backbones.diffusers_weights import DiffusersLayout, Row
from ant_lightning.backbones.dit import DiT
from ant_lightning.backbones.spatial_transformer import SpatialTransformer
from ant_lightning.backbones.unet import UNet
from ant_lightning.backbones.unet_blocks import AttentionBlock, Downsample, ResBlock, Stage
from ant_lightning.errors import ConfigError
from ant_lightning.sizes import height_and_width

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

_RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_DIT_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}


def diffusers_layout(network: nn.Module) -> DiffusersLayout:
    """The network of diffusers that computes the same as this one.

    Raises:
        ConfigError: If there is none; says why.

    Examples:
        >>> from ant_lightning import UNet
        >>> from ant_lightning.backbones.diffusers_layouts import diffusers_layout
        >>> unet = UNet(input_size=8, model_channels=32, channel_mult=(1, 2), num_res_blocks=1)
        >>> layout = diffusers_layout(unet)
        >>> layout.class_name, layout.config["down_block_types"]
        ('UNet2DModel', ['DownBlock2D', 'DownBlock2D'])
        >>> layout.rows[0]
        ('time_embedding.linear_1.weight', 'time_embed.0.weight', 'copy')
    """
    if isinstance(network, DiT):
        return _of_dit(network)
    if isinstance(network, UNet):
        return _of_unet(network)
    raise ConfigError(
        f"backbone: must be a DiT or a UNet to become a network of diffusers, found "
        f"{type(network).__name__}"
    )


def _of_dit(dit: DiT) -> DiffusersLayout:
    width, heads = dit.pos_embed.shape[-1], dit.blocks[0].get_submodule("attn").num_heads
    mlp_size = len(dit.blocks[0].get_parameter("mlp.fc1.bias"))
    height, columns = height_and_width(dit.input_size)
    if mlp_size != 4 * width:
        raise ConfigError(
            f"backbone.mlp_ratio: must be 4, as DiTTransformer2DModel has, found {mlp_size / width}"
        )
    # Their table always has a row for the null class.
    num_classes = max(1, dit.num_classes)
    rows = list(_named("pos_embed.proj", "x_embedder.proj"))
    for i in range(len(dit.blocks)):
        theirs, ours = f"transformer_blocks.{i}", f"blocks.{i}"
        # Their blocks repeat what embeds time and class.
        for j, k in ((1, 0), (2, 2)):
            place = f"{theirs}.norm1.emb.timestep_embedder.linear_{j}"
            rows += _named(place, f"t_embedder.mlp.{k}")
        table = f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"
        if dit.y_embedder is None:
            rows.append((table, None, f"zeros {num_classes + 1}x{width}"))
        else:
            operation = "copy" if dit.null_class is not None else f"pad_rows {num_classes + 1}"
            rows.append((table, "y_embedder.embedding_table.weight", operation))
        for suffix in ("weight", "bias"):
            for j, part in enumerate("qkv"):
                place = f"{theirs}.attn1.to_{part}.{suffix}"
                rows.append((place, f"{ours}.attn.qkv.{suffix}", f"rows {j}/3"))
        for mine, own in _DIT_BLOCK.items():
            rows += _named(f"{theirs}.{mine}", f"{ours}.{own}")
    rows += _named("proj_out_1", "final_layer.adaLN_modulation.1")
    rows += _named("proj_out_2", "final_layer.linear")
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": width // int(heads),  # type: ignore[arg-type]
        "in_channels": dit.in_channels,
        "out_channels": dit.out_channels,
        "num_layers": len(dit.blocks),
        "sample_size": height if height == columns else [height, columns],
        "patch_size": dit.patch_size,
        "num_embeds_ada_norm": num_classes,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }
    if dit.routing is not None:
        config["routing"] = list(dit.routing)
    return DiffusersLayout("DiTTransformer2DModel", config, tuple(rows))


def _of_unet(unet: UNet) -> DiffusersLayout:
    levels = _levels(unet)
    widths = [len(level[-1][1].get_parameter("out_layers.3.bias")) for level in levels]
    features = unet.time_embed[0].in_features
    spread, rest = divmod(widths[0], features)  # type: ignore[operator]
    if rest or spread not in {1, 2, 4}:
        raise ConfigError(
            "backbone.channel_mult: must begin with 1, 2 or 4, as UNet2DModel takes the features "
            f"of the time from the first width, found {widths[0] / features}"  # type: ignore[operator]
        )
    rows: list[Row] = [
        ("time_embedding.linear_1.weight", "time_embed.0.weight", f"spread {spread}"),
        ("time_embedding.linear_1.bias", "time_embed.0.bias", "copy"),
    ]
    if spread == 1:
        rows[0] = (*rows[0][:2], "copy")
    rows += _named("time_embedding.linear_2", "time_embed.2")
    if unet.label_emb is not None:
        rows.append(("class_embedding.weight", "label_emb.weight", "copy"))
    rows += _named("conv_in", "input_blocks.0.0")
    attends, resampled, index = [], "conv", 1
    for i, level in enumerate(levels):
        for j, (name, block) in enumerate(level):
            rows += _res_block(f"down_blocks.{i}.resnets.{j}", f"{name}.0", block)
            rows += _attention(f"down_blocks.{i}.attentions.{j}", name, unet)
        attends.append(_attends(unet, level[0][0]))
        index += len(level)
        if i < len(levels) - 1:
            rows += _resampling(f"down_blocks.{i}.downsamplers.0", f"input_blocks.{index}.0", unet)
            resampled = _kind(unet, f"input_blocks.{index}.0")
            index += 1
    for j, k in ((0, 0), (1, 2)):
        name = f"middle_block.{k}"
        rows += _res_block(f"mid_block.resnets.{j}", name, unet.get_submodule(name))
    rows += _attention("mid_block.attentions.0", "middle_block", unet)
    per_level, index = len(levels[0]) + 1, 0
    for i in range(len(levels)):
        for j in range(per_level):
            name = f"output_blocks.{index}"
            block = unet.get_submodule(f"{name}.0")
            rows += _res_block(f"up_blocks.{i}.resnets.{j}", f"{name}.0", block)
            rows += _attention(f"up_blocks.{i}.attentions.{j}", name, unet)
            index += 1
        if i < len(levels) - 1:
            last = f"{name}.{len(unet.get_submodule(name)) - 1}"  # type: ignore[arg-type]
            rows += _resampling(f"up_blocks.{i}.upsamplers.0", last, unet)
    rows += [*_named("conv_norm_out", "out.0"), *_named("conv_out", "out.2")]
    config = _unet_config(unet, widths, attends, resampled, len(levels[0]), spread)
    name = "UNet2DModel" if unet.context_dim is None else "UNet2DConditionModel"
    return DiffusersLayout(name, config, tuple(rows))


def _unet_config(
    unet: UNet, widths: list[int], attends: list[bool], resampled: str, depth: int, spread: int
) -> dict[str, Any]:
    """The arguments of `UNet2DModel` or `UNet2DConditionModel`."""
    crossed = unet.context_dim is not None
    plain = "Resnet{}sampleBlock2D" if resampled == "resnet" else "{}Block2D"
    attending = "CrossAttn{}Block2D" if crossed else "Attn{}Block2D"
    if crossed and resampled == "resnet":
        raise ConfigError(
            "backbone.resblock_updown: must be false with use_spatial_transformer, as "
            "UNet2DConditionModel has no such blocks with cross-attention, found true"
        )
    kinds = [attending if each else plain for each in attends]
    height, columns = height_and_width(unet.input_size)
    first = unet.get_submodule("middle_block.0")
    heads = [_heads(module) for module in unet.modules()]
    found = [each for each in heads if each is not None]
    config: dict[str, Any] = {
        "sample_size": height if height == columns else [height, columns],
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "layers_per_block": depth,
        "block_out_channels": widths,
        "down_block_types": [kind.format("Down") for kind in kinds],
        "up_block_types": [kind.format("Up") for kind in reversed(kinds)],
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "act_fn": "silu",
        "downsample_padding": 1,
        "resnet_time_scale_shift": ("scale_shift" if first.use_scale_shift_norm else "default"),
    }
    if dropout := float(first.dropout):  # type: ignore[arg-type]
        config["dropout"] = dropout
    if spread > 1:
        config["time_embedding_dim"] = 4 * widths[0] // spread
    if crossed:
        # The argument's name notwithstanding, this class takes the number of heads of each level.
        # A level without attention ignores it.
        by_level = [dict(found).get(width, 1) for width in widths]
        middle = unet.get_submodule("middle_block.1")
        return config | {
            "cross_attention_dim": unet.context_dim,
            "attention_head_dim": by_level,
            "transformer_layers_per_block": len(middle.transformer_blocks),  # type: ignore[arg-type]
            "use_linear_projection": False,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
        }
    single = all(count == 1 for _, count in found)
    sizes = {channels // count for channels, count in found}
    if len(sizes) > 1 and not single:
        raise ConfigError(
            "backbone.num_heads: must give one size of heads at all widths, as UNet2DModel has one "
            f"attention_head_dim, found heads of {', '.join(map(str, sorted(sizes)))} channels"
        )
    config |= {
        "attention_head_dim": sizes.pop() if len(sizes) == 1 else None,
        "attn_norm_num_groups": 32,
        "downsample_type": resampled,
        "upsample_type": resampled,
    }
    if unet.label_emb is not None:
        config["num_class_embeds"] = unet.label_emb.num_embeddings
    return config


def _levels(unet: UNet) -> list[list[tuple[str, nn.Module]]]:
    """The residual blocks of each level on the way down, each with the name of its stage."""
    levels: list[list[tuple[str, nn.Module]]] = [[]]
    for index, stage in enumerate(unet.input_blocks):
        first = stage[0]  # type: ignore[index]
        if isinstance(first, Downsample) or getattr(first, "resample", None) is not None:
            levels.append([])
        elif isinstance(first, ResBlock):
            levels[-1].append((f"input_blocks.{index}", first))
    return levels


def _named(theirs: str, ours: str) -> Iterator[Row]:
    for suffix in ("weight", "bias"):
        yield f"{theirs}.{suffix}", f"{ours}.{suffix}", "copy"


def _res_block(theirs: str, ours: str, block: nn.Module) -> Iterator[Row]:
    for mine, own in _RES_BLOCK.items():
        if own != "skip_connection" or any(True for _ in block.get_submodule(own).parameters()):
            yield from _named(f"{theirs}.{mine}", f"{ours}.{own}")


def _attends(unet: UNet, stage: str) -> bool:
    layers = unet.get_submodule(stage)
    assert isinstance(layers, Stage)
    return any(isinstance(each, AttentionBlock | SpatialTransformer) for each in layers)


def _attention(theirs: str, stage: str, unet: UNet) -> Iterator[Row]:
    """The rows of the attention at place 1 of a stage, if it has one."""
    if not _attends(unet, stage):
        return
    name = f"{stage}.1"
    block = unet.get_submodule(name)
    if isinstance(block, SpatialTransformer):  # the same names
        for own in block.state_dict():
            yield f"{theirs}.{own}", f"{name}.{own}", "copy"
        return
    assert isinstance(block, AttentionBlock)
    new_order = block.pattern.startswith("b n (three")
    yield from _named(f"{theirs}.group_norm", f"{name}.norm")
    for suffix in ("weight", "bias"):
        for j, part in enumerate("qkv"):
            operation = f"new_order {j}" if new_order else f"legacy {j} heads={block.num_heads}"
            yield f"{theirs}.to_{part}.{suffix}", f"{name}.qkv.{suffix}", operation
    yield f"{theirs}.to_out.0.weight", f"{name}.proj_out.weight", "squeeze"
    yield f"{theirs}.to_out.0.bias", f"{name}.proj_out.bias", "copy"


def _kind(unet: UNet, name: str) -> str:
    return "resnet" if isinstance(unet.get_submodule(name), ResBlock) else "conv"


def _resampling(theirs: str, ours: str, unet: UNet) -> Iterator[Row]:
    layer = unet.get_submodule(ours)
    if isinstance(layer, ResBlock):
        yield from _res_block(theirs, ours, layer)
        return
    down = isinstance(layer, Downsample)
    own = "op" if down else "conv"
    if getattr(layer, own) is not None:
        yield from _named(f"{theirs}.conv", f"{ours}.{own}")
        return
    # Without a convolution of ours: the mean of 2x2 values, or nothing, as a convolution.
    channels = _channels_before(unet, ours)
    kernel = "avg_kernel" if down else "identity_kernel"
    yield f"{theirs}.conv.weight", None, f"const {kernel} {channels}"
    yield f"{theirs}.conv.bias", None, f"const zero_bias {channels}"


def _channels_before(unet: UNet, name: str) -> int:
    """Channels of the features that enter a layer without weights."""
    found = 0
    for (_, _), (place, layer) in pairwise([("", unet), *unet.named_modules()]):
        if place == name:
            return found
        if isinstance(layer, ResBlock):
            found = len(layer.get_parameter("out_layers.3.bias"))
    raise AssertionError(name)


def _heads(module: nn.Module) -> tuple[int, int] | None:
    """Channels and heads of an attention layer."""
    if isinstance(module, AttentionBlock):
        return module.norm.num_channels, module.num_heads
    if isinstance(module, SpatialTransformer):
        heads = module.get_submodule("transformer_blocks.0.attn1").num_heads
        return module.norm.num_channels, int(heads)  # type: ignore[arg-type]
    return None
