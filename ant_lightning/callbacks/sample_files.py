"""Where drawn images are kept: a folder of PNG files, or one npz file in ADM's format."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import zipfile
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ant_lightning.data.stored_images import num_npz_images
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.identity import check_identity
from ant_lightning.files.json_file import read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

__all__ = ["NpzSamples", "PngSamples", "SampleFiles"]

_NUMBER = re.compile(r"[0-9]{6,}")


class SampleFiles(ABC):
    """Images by index, from several ranks and perhaps several runs, all with the same identity.

    Args:
        path: The folder or the file.
        note: The file that stores the identity.
        setting: The setting that gives `path`, for messages.
    """

    def __init__(self, path: Path, *, note: Path, setting: str) -> None:
        self.path = path
        self.note = note
        self.setting = setting

    def claim(self, identity: Mapping[str, Any], *, write: bool) -> None:
        """Compare `identity` with that of the existing images, or store it if there are none.

        Raises:
            FileError: If existing images have another identity, or none is stored.
        """
        stored = read_json(self.note, kind=dict) if self.note.exists() else {}
        if self.note.exists() and "format" in stored:
            check_identity(self.note, identity, setting=self.setting, content=self.path)
            return
        if self.note.exists() or self.holds_images():
            raise FileError(
                f"{self.setting}: {self.path} holds images, or a note of ant_lightning 0.1, but no "
                f"{self.note.name} that says how every image was made; choose another place, "
                "or delete what is there"
            )
        if write:
            write_json(self.note, identity)

    @abstractmethod
    def holds_images(self) -> bool:
        """Whether there are any images, from any source."""

    @abstractmethod
    def present(self) -> set[int]:
        """Indices of the images that are there already, from whichever rank."""

    @abstractmethod
    def write(self, indices: Sequence[int], images: Tensor) -> None:
        """Keep uint8 images `[b, c, h, w]`; an image is there whole or not at all."""

    def finish(self) -> None:  # noqa: B027 - a folder has nothing left to do
        """Called on one rank, when all images are there."""


class PngSamples(SampleFiles):
    """`000000.png`, `000001.png`, ... in a folder, with `identity.json`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, note=folder / "identity.json", setting="samples.folder")
        folder.mkdir(parents=True, exist_ok=True)

    def holds_images(self) -> bool:
        """Whether there are pictures of any format: scoring would count them as generated."""
        known = Image.registered_extensions()
        return any(path.suffix.lower() in known for path in self.path.rglob("*"))

    def present(self) -> set[int]:
        """The indices in the file names, if they have the form that `write` gives them."""
        numbers = [int(p.stem) for p in self.path.glob("*.png") if _NUMBER.fullmatch(p.stem)]
        return {number for number in numbers if self._file(number).exists()}

    def write(self, indices: Sequence[int], images: Tensor) -> None:
        """One file each."""
        for index, image in zip(indices, images.permute(0, 2, 3, 1).numpy(), strict=True):
            target = self._file(index)
            partial = target.with_suffix(".part")
            grey = image.shape[-1] == 1
            Image.fromarray(image[..., 0] if grey else image).save(partial, format="PNG")
            partial.replace(target)

    def _file(self, index: int) -> Path:
        return self.path / f"{index:06d}.png"


class NpzSamples(SampleFiles):
    """`arr_0 [n, h, w, c]` uint8 in one npz file, as ADM's evaluator reads it.

    Until all images are there each rank appends to a file of its own in `<file>.parts`: eight
    bytes of the index, then the pixels. A record that a killed run left unfinished is cut off.
    The identity is in `<file>.json`.

    Args:
        path: The npz file.
        num_images: `n`.
        rank: Number of this rank.

    Raises:
        ConfigError: If the file is there with another number of images.
    """

    def __init__(self, path: Path, *, num_images: int, rank: int) -> None:
        note = path.with_name(path.name + ".json")
        super().__init__(path, note=note, setting="samples.npz")
        self.num_images = num_images
        self._parts = path.with_name(path.name + ".parts")
        self._own = self._parts / f"rank_{rank}.bin"
        self._finished = path.exists()
        if self._finished:
            count = num_npz_images(path)
            if count != num_images:
                raise ConfigError(
                    f"samples.npz: {path} is finished with {count} images; choose another file "
                    f"for samples.num_images {num_images}"
                )

    def holds_images(self) -> bool:
        """Whether the file or parts of it exist."""
        return self._finished or self._parts.exists()

    def present(self) -> set[int]:
        """By the indices in the parts of all ranks, or all of a finished file."""
        return set(range(self.num_images)) if self._finished else set(self._places())

    def write(self, indices: Sequence[int], images: Tensor) -> None:
        """Append a batch."""
        pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
        self._parts.mkdir(parents=True, exist_ok=True)
        shape = self._image_shape()
        if shape is None:
            partial = self._own.with_suffix(".part")
            partial.write_text(json.dumps(pixels.shape[1:]))
            partial.replace(self._parts / "image_shape.json")
        elif self._own.exists():
            size = self._own.stat().st_size
            os.truncate(self._own, size - size % _record(shape))
        records = (
            index.to_bytes(8, "little") + image.tobytes()
            for index, image in zip(indices, pixels, strict=True)
        )
        with self._own.open("ab") as file:
            file.write(b"".join(records))

    def finish(self) -> None:
        """Put the images into the order of their indices, one at a time; drop the parts."""
        if self._finished:
            return
        places, shape = self._places(), self._image_shape() or (0, 0, 0)
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.num_images, *shape)}
        partial = self.path.with_name(self.path.name + ".part")
        with ExitStack() as stack:
            parts = {part for part, _ in places.values()}
            files = {part: stack.enter_context(part.open("rb")) for part in parts}
            archive = stack.enter_context(zipfile.ZipFile(partial, "w"))
            stream = stack.enter_context(archive.open("arr_0.npy", "w", force_zip64=True))
            np.lib.format.write_array_header_1_0(stream, header)  # type: ignore[arg-type]
            for index in range(self.num_images):
                part, offset = places[index]
                files[part].seek(offset)
                stream.write(files[part].read(math.prod(shape)))
        partial.replace(self.path)
        shutil.rmtree(self._parts)
        self._finished = True

    def _image_shape(self) -> tuple[int, int, int] | None:
        """`(h, w, c)`, once an image was written."""
        note = self._parts / "image_shape.json"
        if not note.exists():
            return None
        sides = read_json(note, kind=list)
        if len(sides) != 3 or any(type(each) is not int or each < 1 for each in sides):
            raise FileError(f"samples: {note} must hold the three sides of an image, found {sides}")
        return sides[0], sides[1], sides[2]

    def _places(self) -> dict[int, tuple[Path, int]]:
        """File and position of the pixels of every image."""
        shape = self._image_shape()
        places: dict[int, tuple[Path, int]] = {}
        if shape is None:
            return places
        record = _record(shape)
        for part in sorted(self._parts.glob("rank_*.bin")):
            size = part.stat().st_size
            with part.open("rb") as file:
                for start in range(0, size - size % record, record):
                    file.seek(start)
                    index = int.from_bytes(file.read(8), "little")
                    if index < self.num_images:
                        places[index] = (part, start + 8)
        return places


def _record(image_shape: tuple[int, int, int]) -> int:
    """Bytes of an index and an image."""
    return 8 + math.prod(image_shape)
