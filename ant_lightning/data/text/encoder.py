"""Text encoders of transformers, read from folders, and the entries that they give together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional as F

from ant_lightning.errors import ConfigError, FileError, check_at_least
from ant_lightning.files.json_file import read_json

if TYPE_CHECKING:
    from torch import Tensor

TEXT, POOLED, MASK = "encoder_hidden_states", "pooled_projections", "encoder_attention_mask"
# Models with more than an encoder of text, and the part of them that is one.
_PARTS = {
    "CLIPModel": "CLIPTextModelWithProjection",
    "T5Model": "T5EncoderModel",
    "T5ForConditionalGeneration": "T5EncoderModel",
    "UMT5Model": "UMT5EncoderModel",
    "UMT5ForConditionalGeneration": "UMT5EncoderModel",
}


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder, and which of its outputs are used.

    The hidden states of all encoders become the entry `encoder_hidden_states`, the pooled ones
    `pooled_projections`. SD3 has two CLIPs joined by `width` and T5 joined by `length`; Flux takes
    CLIP's pooled output alone (`hidden: false`) and T5's hidden states.

    Args:
        folder: Config and safetensors weights, as transformers stores them.
        tokenizer: Folder of the tokenizer; by default the same folder, or the one called
            `tokenizer...` beside one called `text_encoder...`, as in a pipeline of diffusers.
        max_length: Tokens of a caption: longer ones are cut, shorter ones padded.
        hidden: Whether the hidden states are used.
        pooled: Whether the pooled output is used.
        mask: Whether padding is masked in the encoder, and `encoder_attention_mask` is stored.
        layer: Which hidden states, as an index: -2 are those before the last layer (SD3's CLIPs);
            `None` for the encoder's output.
        join: How hidden states are added to those of the encoders before: as further channels, or
            as further tokens, narrower ones padded with zeros.

    Raises:
        ConfigError: If nothing is used, or `max_length` is below 1.

    Examples:
        >>> from ant_lightning import TextEncoder
        >>> TextEncoder("sd3/text_encoder", max_length=77, pooled=True, layer=-2).hidden
        True
    """

    folder: str
    _: KW_ONLY
    tokenizer: str | None = None
    max_length: int = 77
    hidden: bool = True
    pooled: bool = False
    mask: bool = False
    layer: int | None = None
    join: Literal["width", "length"] = "length"

    def __post_init__(self) -> None:
        check_at_least(1, max_length=self.max_length)
        if not (self.hidden or self.pooled):
            raise ConfigError("hidden: must be true without pooled, found false")

    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is."""
        folder = Path(self.folder)
        beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
        is_pair = folder.name.startswith("text_encoder") and beside.is_dir()
        return Path(self.tokenizer) if self.tokenizer else beside if is_pair else folder


def encoder_identity(encoder: TextEncoder) -> dict[str, Any]:
    """What determines the embeddings: the settings, and a digest of weights and tokenizer.

    Raises:
        ConfigError: If the folder holds no safetensors weights.
    """
    folder = Path(encoder.folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"folder: must hold a text encoder of transformers, found {folder}")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError(f"folder: must hold weights as .safetensors, found none in {folder}")
    digest = hashlib.sha256()
    for path in [*weights, *sorted(encoder.tokenizer_folder().glob("*.json"))]:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    names = ("max_length", "hidden", "pooled", "mask", "layer", "join")
    return {name: getattr(encoder, name) for name in names} | {"digest": digest.hexdigest()[:16]}


def text_encodings(encoders: Sequence[TextEncoder], device: torch.device | str) -> _Encodings:
    """A function from captions to entries `[n, ...]`; holds the models."""
    return _Encodings([_Loaded(each, device) for each in encoders])


class _Encodings:
    def __init__(self, loaded: list[_Loaded]) -> None:
        self._loaded = loaded

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        """The entries of some captions, float32 on the CPU."""
        hidden: Tensor | None = None
        pooled, masks = [], []
        for each in self._loaded:
            states, vector, mask = each(captions)
            if vector is not None:
                pooled.append(vector)
            if states is None:
                continue
            masks.append(mask)
            hidden = states if hidden is None else _joined(hidden, states, each.encoder.join)
        entries: dict[str, Tensor] = {}
        if hidden is not None:
            entries[TEXT] = hidden
        if pooled:
            entries[POOLED] = torch.cat(pooled, 1)
        if any(each.encoder.mask for each in self._loaded):
            entries[MASK] = torch.cat(masks, 1)
        return entries


def _joined(one: Tensor, two: Tensor, join: str) -> Tensor:
    if join == "width":
        if one.shape[1] != two.shape[1]:
            raise ConfigError(
                f"join: must be length for encoders of {one.shape[1]} and {two.shape[1]} tokens, "
                "found width"
            )
        return torch.cat([one, two], 2)
    width = max(one.shape[2], two.shape[2])
    return torch.cat([F.pad(each, (0, width - each.shape[2])) for each in (one, two)], 1)


class _Loaded:
    """A tokenizer and a model in memory."""

    def __init__(self, encoder: TextEncoder, device: torch.device | str) -> None:
        import transformers  # noqa: PLC0415 - an extra, and seconds of imports

        self.encoder, self.device = encoder, device
        try:
            config = read_json(Path(encoder.folder) / "config.json", kind=dict)
            name = (config.get("architectures") or [""])[0]
            name = _PARTS.get(name, name)
            is_whole = not hasattr(transformers, name) or name.endswith("LM")
            kind = transformers.AutoModel if is_whole else getattr(transformers, name)
            self.model = kind.from_pretrained(
                encoder.folder, local_files_only=True, use_safetensors=True
            )
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                encoder.tokenizer_folder(), local_files_only=True
            )
        except (OSError, ValueError, RuntimeError, FileError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"folder: {encoder.folder} cannot be read: {reason}") from error
        self.model.eval().requires_grad_(False).to(device)

    def __call__(self, captions: list[str]) -> tuple[Tensor | None, Tensor | None, Tensor]:
        encoder = self.encoder
        tokens = self.tokenizer(
            captions,
            padding="max_length",
            max_length=encoder.max_length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        masked = {"attention_mask": tokens["attention_mask"]} if encoder.mask else {}
        output = self.model(tokens["input_ids"], output_hidden_states=True, **masked)
        states = vector = None
        if encoder.hidden:
            by_layer = output.hidden_states
            states = output.last_hidden_state if encoder.layer is None else by_layer[encoder.layer]
        if encoder.pooled:
            vector = getattr(output, "text_embeds", getattr(output, "pooler_output", None))
            if vector is None:
                raise ConfigError(
                    f"pooled: must be false for {type(self.model).__name__}, which has no pooled "
                    "output, found true"
                )
        mask = tokens["attention_mask"].float().cpu()
        return (
            None if states is None else states.float().cpu(),
            None if vector is None else vector.float().cpu(),
            mask,
        )
