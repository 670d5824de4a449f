"""Networks of diffusers as backbones: the calls and the conditions of seven classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.json_file import read_json

TEXT, POOLED, MASK = "encoder_hidden_states", "pooled_projections", "encoder_attention_mask"
_PIXELS = 8  # a latent's side in pixels, for networks that take the size of the image


class _Network(NamedTuple):
    """One class of diffusers: its conditions by the config, and its call."""

    call: Callable[[DiffusersBackbone, Tensor, Tensor, Mapping[str, Tensor]], Any]
    conditions: tuple[str, ...] = ()
    takes_mask: bool = False
    labels: str | None = None  # the entry of the config with the rows of the table of labels
    packed: int = 1  # side of the squares of latents that become channels


class DiffusersBackbone(nn.Module):
    """A network of diffusers, called as a backbone.

    | class | conditions | time |
    |---|---|---|
    | `UNet2DModel` | `labels` if it has a table of them | timestep |
    | `UNet2DConditionModel` | `encoder_hidden_states`, SDXL's `pooled_projections` | timestep |
    | `DiTTransformer2DModel` | `labels` | timestep |
    | `PixArtTransformer2DModel` | `encoder_hidden_states` | timestep |
    | `SD3Transformer2DModel` | `encoder_hidden_states`, `pooled_projections` | 1000 sigma |
    | `SanaTransformer2DModel` | `encoder_hidden_states` | 1000 sigma |
    | `FluxTransformer2DModel` | `encoder_hidden_states`, `pooled_projections` | sigma |

    What has no batch is made here: Flux's packed latents and position ids, the embedded guidance of
    distilled networks, PixArt's and SDXL's sizes. `FlowMatching` takes the convention of diffusers
    with such a network (the output is `noise - data`). The null value of text is a zero until the
    data say which embedding no text has. `MultiTaskDiffusion(UNet2DModel(...))` makes the adapter
    by itself.

    Args:
        network: The network; `None` to read it from `folder`.
        folder: What `save_pretrained` of the network wrote, or the folder of its pipeline.
        input_size: Height and width of what is denoised; by default `sample_size` of the config.
        null_class: The label that stands for no class; by default the last row of a DiT, and none
            for a `UNet2DModel`.
        masks: Whether the network gets a mask of the tokens of the text that are padding, as the
            condition `encoder_attention_mask`.
        embedded_guidance: The scale that a distilled network (Flux dev, Sana Sprint) is given.

    Raises:
        ConfigError: If the class is another, the folder holds another, the size is not known, or
            the network is conditioned in a way that is not supported.

    Examples:
        >>> import torch
        >>> from diffusers import UNet2DModel
        >>> from ant_lightning import DiffusersBackbone
        >>> network = UNet2DModel(
        ...     sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ... )
        >>> backbone = DiffusersBackbone(network)
        >>> backbone.in_channels, backbone.input_size, backbone.null_condition
        (3, (8, 8), {})
        >>> backbone(torch.zeros(2, 3, 8, 8), torch.tensor([0, 999]), {}).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        *,
        folder: str | None = None,
        input_size: int | tuple[int, int] | None = None,
        null_class: int | None = None,
        masks: bool = False,
        embedded_guidance: float = 3.5,
    ) -> None:
        super().__init__()
        if folder is not None and network is None:
            network = _pretrained(Path(folder))
        elif folder is not None or network is None:
            raise ConfigError(
                f"folder: needed without a network and left out with one, found {folder!r} and "
                f"{type(network).__name__}"
            )
        self.network: Any = network
        self._kind = _kind_of(network)
        config = self.config
        self.in_channels = config["in_channels"] // self._kind.packed**2
        self.out_channels = (config["out_channels"] or config["in_channels"]) // (
            self._kind.packed**2
        )
        self.input_size = self._size(input_size)
        self.embedded_guidance = embedded_guidance
        self.null_condition = self._null(masks)
        rows = 0 if self._kind.labels is None else config[self._kind.labels] or 0
        self.num_classes = rows
        if rows:
            is_dit = self._kind.labels == "num_embeds_ada_norm"  # its table has one row more
            null = rows if is_dit and null_class is None else null_class
            if null is not None and not 0 <= null < rows + is_dit:
                raise ConfigError(
                    f"null_class: must be a row of the table, 0 to {rows + is_dit - 1}, found "
                    f"{null}"
                )
            if null == rows - 1 and not is_dit:
                self.num_classes -= 1  # the last row is no class of the data
            self.null_condition["labels"] = null
        elif null_class is not None:
            raise ConfigError(
                f"null_class: must be None for a network without labels, found {null_class}"
            )
        self._check_supported()

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the network."""
        return self.network.config  # type: ignore[no-any-return]

    def forward(self, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The network's output, `[b, out_channels, h, w]`.

        Args:
            x_t: Images or latents, `[b, c, h, w]`.
            t: Time in the unit of diffusers' pipelines, `[b]`: timesteps, or 1000 sigma.
            condition: The entries named in `null_condition`.
        """
        return self._kind.call(self, x_t, t, condition).sample  # type: ignore[no-any-return]

    def _size(self, given: int | tuple[int, int] | None) -> tuple[int, int]:
        found: Any = self.config.get("sample_size") if given is None else given
        if found is None:
            raise ConfigError(
                f"input_size: must be given for {type(self.network).__name__}, whose config says "
                "none, as DiffusersBackbone(network, input_size=64), found None"
            )
        height, width = (found, found) if isinstance(found, int) else found
        if height % self._kind.packed or width % self._kind.packed:
            raise ConfigError(
                f"input_size: must be even for {type(self.network).__name__}, found {found}"
            )
        return int(height), int(width)

    def _null(self, masks: bool) -> dict[str, Any]:
        names = list(self._kind.conditions)
        if self.config.get("addition_embed_type") == "text_time":
            names.append(POOLED)
        null: dict[str, Any] = {name: torch.zeros(()) for name in names}
        if masks:
            if not self._kind.takes_mask:
                raise ConfigError(
                    f"masks: must be false for {type(self.network).__name__}, which takes none, "
                    "found true"
                )
            null[MASK] = torch.ones(())
        return null

    def _check_supported(self) -> None:
        """Refuse inputs of a network that nothing here can give, and its own dropout of labels."""
        config, name = self.config, type(self.network).__name__
        for key, allowed in (
            ("class_embed_type", (None,)),
            ("addition_embed_type", (None, "text_time")),
            ("encoder_hid_dim_type", (None, "text_proj")),
        ):
            if config.get(key) not in allowed:
                raise ConfigError(
                    f"backbone: {key} of {name} must be {' or '.join(map(str, allowed))}, "
                    f"found {config[key]!r}"
                )
        if self._kind.labels is None and config.get("num_class_embeds"):
            raise ConfigError(
                f"backbone: num_class_embeds of {name} must be None, found "
                f"{config['num_class_embeds']}"
            )
        for part in self.network.modules():
            if type(part).__name__ == "LabelEmbedding":
                part.dropout_prob = 0.0  # `class_dropout` of the module drops, keyed by image


def as_backbone(network: nn.Module) -> nn.Module:
    """The network, in a `DiffusersBackbone` if it is a class of diffusers that needs one."""
    if hasattr(network, "null_condition") or not _names(network):
        return network
    return DiffusersBackbone(network)


def network_config(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """Folder and config of a stored network; a pipeline's folder holds it in one below.

    Raises:
        ConfigError: If there is none, or it is of another class.
    """
    inside = [folder / name for name in ("transformer", "unet")]
    found = next((each for each in inside if (each / "config.json").is_file()), folder)
    if found is not folder and found.with_name(f"{found.name}_2").is_dir():
        raise ConfigError(
            f"folder: must hold one network (name {found.name} or {found.name}_2 in it), found two"
        )
    try:
        config = read_json(found / "config.json", kind=dict)
    except FileError as error:
        raise ConfigError(f"folder: must hold a network of diffusers, found {error}") from error
    name = config.get("_class_name")
    if name not in _NETWORKS:
        raise ConfigError(f"folder: must hold one of {', '.join(_NETWORKS)}, found {name}")
    return found, config


def _pretrained(folder: Path) -> nn.Module:
    import diffusers  # noqa: PLC0415 - takes seconds

    found, config = network_config(folder)
    try:
        network: nn.Module = getattr(diffusers, config["_class_name"]).from_pretrained(
            found, local_files_only=True, low_cpu_mem_usage=False
        )
        return network.train()  # it comes in evaluation mode
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"folder: {found} cannot be read: {str(error).splitlines()[0]}"
        ) from error


def _names(network: nn.Module) -> list[str]:
    """The classes of a network, also a compiled one, that are known here."""
    bare = getattr(network, "_orig_mod", network)
    return [each.__name__ for each in type(bare).__mro__ if each.__name__ in _NETWORKS]


def _kind_of(network: nn.Module) -> _Network:
    names = _names(network)
    if not names:
        raise ConfigError(
            f"network: must be one of {', '.join(_NETWORKS)}, found {type(network).__name__}"
        )
    return _NETWORKS[names[0]]


def _unet(own: DiffusersBackbone, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    return own.network(x_t, t, class_labels=condition.get("labels"))


def _unet_text(
    own: DiffusersBackbone, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]
) -> Any:  # noqa: ANN401
    added = None
    if POOLED in condition:  # SDXL: original size, corner of the crop, target size
        height, width = (_PIXELS * side for side in x_t.shape[2:])
        sizes = torch.tensor([height, width, 0, 0, height, width]).to(x_t)
        added = {"text_embeds": condition[POOLED], "time_ids": sizes.expand(len(x_t), -1)}
    return own.network(
        x_t,
        t,
        encoder_hidden_states=condition[TEXT],
        encoder_attention_mask=condition.get(MASK),
        added_cond_kwargs=added,
    )


def _dit(own: DiffusersBackbone, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    return own.network(x_t, timestep=t, class_labels=condition["labels"])


def _pixart(own: DiffusersBackbone, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if own.network.use_additional_conditions:
        height, width = (_PIXELS * side for side in x_t.shape[2:])
        added["resolution"] = torch.tensor([height, width]).to(x_t).expand(len(x_t), -1)
        added["aspect_ratio"] = torch.tensor([height / width]).to(x_t).expand(len(x_t), -1)
    return own.network(
        x_t,
        condition[TEXT],
        timestep=t,
        added_cond_kwargs=added,
        encoder_attention_mask=condition.get(MASK),
    )


def _sd3(own: DiffusersBackbone, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    return own.network(x_t, condition[TEXT], condition[POOLED], timestep=t)


def _sana(own: DiffusersBackbone, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    guidance = None
    if own.config["guidance_embeds"]:
        scale = own.embedded_guidance * own.config["guidance_embeds_scale"]
        guidance = torch.full_like(t, scale, dtype=x_t.dtype)
    return own.network(
        x_t,
        condition[TEXT],
        timestep=t * own.config.get("timestep_scale", 1.0),
        guidance=guidance,
        encoder_attention_mask=condition.get(MASK),
    )


class _Output(NamedTuple):
    sample: Tensor


def _flux(
    own: DiffusersBackbone, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]
) -> _Output:
    packed = rearrange(x_t, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    rows, columns = x_t.shape[2] // 2, x_t.shape[3] // 2
    ids = x_t.new_zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows, device=x_t.device)[:, None]
    ids[..., 2] = torch.arange(columns, device=x_t.device)
    text = condition[TEXT]
    guidance = torch.full_like(t, own.embedded_guidance, dtype=torch.float32)
    # The network multiplies time and guidance by 1000 itself.
    output = own.network(
        packed,
        text,
        condition[POOLED],
        timestep=t / 1000,
        img_ids=ids.flatten(0, 1),
        txt_ids=text.new_zeros(text.shape[1], 3),
        guidance=guidance if own.config["guidance_embeds"] else None,
    ).sample
    return _Output(rearrange(output, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=2, q=2))


_NETWORKS = {
    "UNet2DModel": _Network(_unet, labels="num_class_embeds"),
    "UNet2DConditionModel": _Network(_unet_text, (TEXT,), takes_mask=True),
    "DiTTransformer2DModel": _Network(_dit, labels="num_embeds_ada_norm"),
    "PixArtTransformer2DModel": _Network(_pixart, (TEXT,), takes_mask=True),
    "SD3Transformer2DModel": _Network(_sd3, (TEXT, POOLED)),
    "FluxTransformer2DModel": _Network(_flux, (TEXT, POOLED), packed=2),
    "SanaTransformer2DModel": _Network(_sana, (TEXT,), takes_mask=True),
}
