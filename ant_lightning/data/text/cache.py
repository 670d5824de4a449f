"""A cache of embeddings of captions: written once by `ant-lightning encode`, read in training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ant_lightning.data.text.encoder import TextEncoder, encoder_identity, text_encodings
from ant_lightning.errors import ConfigError, FileError, check_at_least
from ant_lightning.files.identity import check_identity
from ant_lightning.files.json_file import read_json, write_json
from ant_lightning.files.safetensors_file import read_safetensors, read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

_INDEX = "index.json"
_KEYS = "captions"  # digests of the captions of a shard, [n, 16] uint8


def caption_key(caption: str) -> bytes:
    """What a caption is found by."""
    return hashlib.blake2b(caption.encode(), digest_size=16).digest()


class TextWriter:
    """Writes the embeddings of all captions, each once, and of no text.

    Rank r of N writes the shards r, r + N, ... without communication. It may be interrupted at any
    time: the next call writes the missing shards. A folder that holds the embeddings of other
    encoders is refused.

    Args:
        output: Folder of the cache.
        encoders: The text encoders, in the order in which their hidden states are joined.
        shard_size: Number of captions in a file.
        batch_size: Number of captions encoded at once.
        dtype: Of the stored values.

    Raises:
        ConfigError: If there is no encoder, or a size is below 1.

    Examples:
        >>> from ant_lightning import TextEncoder, TextWriter
        >>> writer = TextWriter("embeddings", encoders=[TextEncoder("sd/text_encoder")])
        >>> writer.shard_size
        4096
    """

    def __init__(
        self,
        output: str,
        *,
        encoders: list[TextEncoder],
        shard_size: int = 4096,
        batch_size: int = 32,
        dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    ) -> None:
        check_at_least(1, shard_size=shard_size, batch_size=batch_size)
        if not encoders:
            raise ConfigError("encoders: must be at least one, found none")
        self.output = Path(output)
        self.encoders = encoders
        self.shard_size = shard_size
        self.batch_size = batch_size
        self.dtype: Literal["float32", "float16", "bfloat16"] = dtype

    def write(
        self,
        captions: Iterable[str],
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        on_progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Write the missing shards of this rank; returns how many were missing.

        `on_progress` is called with the number of shards written, and of those to write.

        Raises:
            ConfigError: If the folder holds the embeddings of other encoders, or an embedding is
                not finite.
        """
        identity: dict[str, Any] = {
            f"encoders.{i}.{name}": value
            for i, each in enumerate(self.encoders)
            for name, value in encoder_identity(each).items()
        }
        identity |= {"format_version": 1, "dtype": self.dtype}
        path = self.output / _INDEX
        if not check_identity(path, identity, setting="output"):
            write_json(path, identity)
        every = ["", *sorted(set(captions) - {""})]  # no text first: the null value
        starts = range(0, len(every), self.shard_size)
        mine = [(n, every[s : s + self.shard_size]) for n, s in enumerate(starts)][rank::world_size]
        missing = [(n, part) for n, part in mine if not self._is_whole(n, part)]
        if missing:
            encode = text_encodings(self.encoders, device)
            for count, (number, part) in enumerate(missing):
                if on_progress is not None:
                    on_progress(count, len(missing))
                batches = [
                    encode(part[s : s + self.batch_size])
                    for s in range(0, len(part), self.batch_size)
                ]
                entries = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
                self._check_finite(entries, part)
                stored = {
                    name: each.to(getattr(torch, self.dtype)) for name, each in entries.items()
                }
                stored[_KEYS] = _digests(part)
                write_tensors(self._shard(number), stored, {"shard": number})
        return len(missing)

    def _shard(self, number: int) -> Path:
        return self.output / f"text_{number:05d}.safetensors"

    def _is_whole(self, number: int, captions: list[str]) -> bool:
        try:
            found, _ = read_tensors(
                self._shard(number), {_KEYS: (torch.uint8, (len(captions), 16))}, {"shard": number}
            )
        except FileError:
            return False  # missing, damaged, or of other captions: written again
        return torch.equal(found[_KEYS], _digests(captions))

    def _check_finite(self, entries: dict[str, Tensor], captions: list[str]) -> None:
        for name, each in entries.items():
            bad = ~each.to(getattr(torch, self.dtype)).flatten(1).isfinite().all(1)
            if bool(bad.any()):
                raise ConfigError(
                    f"dtype: {name} must be finite in {self.dtype}, found a NaN or an infinity for "
                    f"the caption {captions[int(bad.int().argmax())][:60]!r}"
                )


class TextCache:
    """Embeddings of captions that `TextWriter` wrote, mapped into memory.

    Args:
        folder: The cache.

    Attributes:
        null: The entries of no text, for one image.

    Raises:
        FileError: If the folder holds no cache, or a file is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        version = read_json(self.folder / _INDEX, kind=dict).get("format_version")
        if version != 1:
            raise FileError(f"{self.folder / _INDEX}: format_version must be 1, found {version!r}")
        self._shards: list[dict[str, Tensor]] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        for path in sorted(self.folder.glob("text_*.safetensors")):
            tensors, _ = read_safetensors(path)
            keys = tensors.pop(_KEYS, None)
            if keys is None or any(len(each) != len(keys) for each in tensors.values()):
                raise FileError(f"{path}: must hold one entry for each caption; encode again")
            for row, key in enumerate(keys.numpy()):
                self._places[key.tobytes()] = (len(self._shards), row)
            self._shards.append(tensors)
        if not self.missing([""]) == []:
            raise FileError(f"{self.folder}: must hold the embedding of no text; encode again")
        self.null = {name: each[0] for name, each in self([""]).items()}

    def missing(self, captions: Sequence[str]) -> list[int]:
        """Positions of the captions that have no embedding."""
        return [i for i, each in enumerate(captions) if caption_key(each) not in self._places]

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The entries of captions, `[n, ...]` float32."""
        places = [self._places[caption_key(each)] for each in captions]
        return {
            name: torch.stack([self._shards[shard][name][row] for shard, row in places]).float()
            for name in self._shards[0]
        }


def _digests(captions: list[str]) -> Tensor:
    return torch.frombuffer(
        bytearray(b"".join(map(caption_key, captions))), dtype=torch.uint8
    ).view(-1, 16)
