"""Files of generated images: a folder of PNG files, or one npz file for the ADM evaluator."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from ant_lightning.data.pictures import is_grey, open_picture
from ant_lightning.data.stored_images import StoredImages
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.atomic import write_atomically
from ant_lightning.files.identity import check_identity
from ant_lightning.files.json_file import read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_NUMBER = re.compile(r"[0-9]{6,}")


class PngSamples:
    """`000000.png`, `000001.png`, ... in a folder, from several ranks and perhaps several calls.

    `identity.json` has everything that the images depend on, by name.

    Args:
        path: The folder.
    """

    setting = "folder"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity_file = path / "identity.json"
        self._folder = path

    def check(self, identity: Mapping[str, Any], *, store: bool) -> None:
        """Compare `identity` with that of existing images, or store it if there are none.

        Raises:
            FileError: If existing images have another identity, or none is stored.
        """
        known = self.identity_file.exists()
        # The file of 0.1 has no format, and hashes only a sample of the weights: not enough.
        if known and "format" in read_json(self.identity_file, kind=dict):
            check_identity(self.identity_file, identity, setting=self.setting, content=self.path)
        elif known or self.holds_images():
            raise FileError(
                f"{self.setting}: {self.path} holds images, or a file of ant_lightning 0.1, but no "
                f"{self.identity_file.name} with their settings; choose another place, or delete "
                "what is there"
            )
        elif store:
            write_json(self.identity_file, identity)

    def holds_images(self) -> bool:
        """Whether there are images of any format: scoring would count them as generated."""
        known = Image.registered_extensions()
        return any(path.suffix.lower() in known for path in self.path.rglob("*"))

    def present(self) -> set[int]:
        """Indices of the images that `write` has written, by their file names."""
        # `0000001.png` is a number too, but not the name that `write` gives image 1.
        numbers = [int(p.stem) for p in self._folder.glob("*.png") if _NUMBER.fullmatch(p.stem)]
        return {number for number in numbers if self._file(number).exists()}

    def write(self, indices: Sequence[int], images: Tensor) -> None:
        """Write uint8 images `[b, c, h, w]`; a file is there whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for index, image in zip(indices, images.permute(0, 2, 3, 1).numpy(), strict=True):
            target = self._file(index)
            # Without an fsync for each: for thousands of small files it would take minutes.
            partial = target.with_suffix(".part")
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
                partial, format="PNG"
            )
            partial.replace(target)

    def finish(self) -> None:
        """Called on one rank when all images are there."""

    def _file(self, index: int) -> Path:
        return self._folder / f"{index:06d}.png"


class NpzSamples(PngSamples):
    """`arr_0 [n, h, w, c]` uint8 in one npz file, as ADM's evaluator reads it.

    Until all images are there, they are PNG files in `<file>.parts`. The identity is in
    `<file>.json`.

    Args:
        path: The npz file.
        num_images: `n`.

    Raises:
        ConfigError: If the file is there with another number of images.
    """

    setting = "npz"

    def __init__(self, path: Path, num_images: int) -> None:
        super().__init__(path)
        self.identity_file = path.with_name(path.name + ".json")
        self._folder = path.with_name(path.name + ".parts")
        self.num_images = num_images
        if path.exists() and (count := StoredImages(path).num_images) != num_images:
            raise ConfigError(
                f"num_images: must be {count} as {path} holds, or choose another file, "
                f"found {num_images}"
            )

    def holds_images(self) -> bool:
        """Whether the file or parts of it exist."""
        return self.path.exists() or self._folder.exists()

    def present(self) -> set[int]:
        """Indices of the images that are there."""
        return set(range(self.num_images)) if self.path.exists() else super().present()

    def finish(self) -> None:
        """Put the images into one file, in the order of their indices; delete the parts."""
        if not self.path.exists():
            write_atomically(self.path, self._write_npz)
            shutil.rmtree(self._folder)

    def _write_npz(self, file: BinaryIO) -> None:
        """Write one image at a time: 50,000 images of 256 x 256 are 10 GB."""
        channels = 1 if is_grey(self._file(0)) else 3
        width, height = size = open_picture(self._file(0), channels=channels).size
        shape = (self.num_images, height, width, channels)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with (
            zipfile.ZipFile(file, "w") as archive,
            # `zipfile` does not know the size beforehand, and more than 4 GiB needs zip64.
            archive.open("arr_0.npy", "w", force_zip64=True) as stream,
        ):
            np.lib.format.write_array_header_1_0(stream, header)  # type: ignore[arg-type]
            for index in range(self.num_images):
                picture = open_picture(self._file(index), channels=channels)
                if picture.size != size:
                    raise FileError(
                        f"{self._file(index)}: must be {width} x {height} as image 0, found "
                        f"{picture.width} x {picture.height}"
                    )
                stream.write(picture.tobytes())
