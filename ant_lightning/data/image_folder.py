"""The data module for a user's own folder of images."""

from __future__ import annotations

import hashlib
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ant_lightning.data.class_map import number_classes
from ant_lightning.data.dataset import ImageDataset
from ant_lightning.data.folder_images import FolderImages, broken_images
from ant_lightning.data.image_faults import broken_images_error, report_of
from ant_lightning.data.image_search import find_images
from ant_lightning.data.module import IMAGES_DIGEST, ImageDataModule
from ant_lightning.data.pictures import Crop, is_grey, read_picture
from ant_lightning.data.split import split_positions
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.identity import shortened
from ant_lightning.sizes import Size, height_and_width

if TYPE_CHECKING:
    from collections.abc import Mapping

_MANY_IMAGES, _SPOT_CHECKS = 100_000, 1000


class ImageFolderData(ImageDataModule):
    """Images in one folder (FFHQ, CelebA-HQ), or in one folder for each class (ImageNet).

    Classes are numbered in the order of their folders' names, unless `class_map` says otherwise.
    The class names are written to `class_map.json` in the log folder and to every checkpoint. A
    checkpoint cannot be loaded with other classes.

    Args:
        root: The folder.
        image_size: Height and width in pixels that images are resized and cropped to; one number
            for a square.
        batch_size: Images of one optimizer step, over all ranks.
        num_held_out: Images that are never trained on: validation, test, reference of FID. By
            default a tenth of them, at most 1,000.
        labels: `folders`: the first folder below `root` is an image's class. `none`: no classes.
            `auto`: `none` if the images lie in `root` itself, else `folders`.
        class_map: JSON file of class names and numbers; made if it does not exist.
        channels: 3 for colour, 1 for grey; `None`: 1 if all images are grey (1,000 of many are
            looked at), else 3.
        crop: `center_adm` as ADM and DiT crop, or `resize`.
        exif_rotation: Whether to apply the EXIF orientation of photos, as viewers do.
        flip: Whether training images are mirrored in half of the epochs.
        validate_images: `auto`: decode the images before training and refuse broken ones, all of up
            to 100,000, else 1,000 of them. `raise`: always all. `skip`: leave broken ones out.
            `off`: a broken image ends the run when it is loaded.
        split_seed: Seed of the split; part of the data set, so separate from the run's seed.
        num_workers: Loading processes of each rank; by default four, or the cores of this machine.
        seed: Order of the images, and flips; by default the seed of the run.

    Attributes:
        num_skipped: Broken images that were left out.

    Raises:
        ConfigError: If a setting is wrong or the folder cannot be used; names the setting.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from ant_lightning import ImageFolderData
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for i, name in enumerate(["cat", "cat", "dog", "dog"]):
        ...         (Path(root) / name).mkdir(exist_ok=True)
        ...         Image.new("RGB", (20, 16), (60 * i, 0, 0)).save(f"{root}/{name}/{i}.png")
        ...     data = ImageFolderData(root, image_size=8, batch_size=2, num_held_out=1)
        ...     batch = data.train_images.load([0, 1, 2], epoch=None)
        >>> batch.images.shape, data.class_names
        (torch.Size([3, 3, 8, 8]), ['cat', 'dog'])
    """

    identity_settings = ("crop", "exif_rotation", "num_held_out", "split_seed", "class_names")

    def __init__(
        self,
        root: str,
        *,
        image_size: Size,
        batch_size: int,
        num_held_out: int | None = None,
        labels: Literal["auto", "folders", "none"] = "auto",
        class_map: str | None = None,
        channels: Literal[1, 3] | None = 3,
        crop: Crop = "center_adm",
        exif_rotation: bool = True,
        flip: bool = True,
        validate_images: Literal["auto", "raise", "skip", "off"] = "auto",
        split_seed: int = 0,
        num_workers: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if channels not in {1, 3, None}:
            raise ConfigError(f"channels: must be 1, 3 or None, found {channels}")
        self.root = Path(root)
        if channels is None:
            channels = _channels(find_images(self.root, labels=labels)[0])
        self.image_shape = (channels, *height_and_width(image_size, name="image_size"))
        self.num_held_out = num_held_out
        self.labels = labels
        self.class_map = class_map
        self.crop = crop
        self.exif_rotation = exif_rotation
        self.flip = flip
        self.validate_images = validate_images
        self.split_seed = split_seed
        self.class_names: list[str] = []
        self.num_skipped = 0

    def shape_and_classes(self) -> tuple[tuple[int, int, int], int]:
        """Shape of the images, and the number of their classes, from the names of the files."""
        _, names = find_images(self.root, labels=self.labels)
        return self.image_shape, len(number_classes(names, self.class_map))

    def prepare(self) -> tuple[ImageDataset, ImageDataset]:
        """Find, check, number and split the images."""
        paths, names = find_images(self.root, labels=self.labels)
        self.class_names = number_classes(names, self.class_map)
        self.num_classes = len(self.class_names)
        number = {name: i for i, name in enumerate(self.class_names)}
        labels = torch.tensor([number[name] for name in names] or [0] * len(paths))
        # Broken images are left out before the split, so that `num_held_out` counts whole images.
        kept = self._whole_images(paths)
        empty = set(labels.tolist()) - set(labels[kept].tolist())
        if empty and names:
            raise ConfigError(
                "validate_images: every class must have an image that is not broken, "
                f"found none of {self.class_names[min(empty)]} in {self.root}"
            )
        # Which images are held out is random; the order inside a part is that of the paths.
        train, held_out = split_positions(
            len(kept),
            self.num_held_out,
            seed=self.split_seed,
            stream="folder split",
            setting="root",
            place=self.root,
        )
        self.num_held_out = len(held_out)
        channels, *size = self.image_shape
        read = partial(
            read_picture,
            image_size=(size[0], size[1]),
            channels=channels,
            crop=self.crop,
            exif_rotation=self.exif_rotation,
        )
        flip_seed = self.seed if self.flip else None
        whole = torch.tensor(kept)
        parts = ((whole[train].tolist(), flip_seed), (whole[held_out].tolist(), None))
        self._images = tuple(
            FolderImages(self.root, [paths[i] for i in part], labels[part], read=read, flip_seed=s)
            for part, s in parts
        )
        return self._images[0], self._images[1]

    def digests(self, known: Mapping[str, Any]) -> dict[str, str]:
        """A digest of the names and bytes of all files, and one of their sizes and times.

        The digest of bytes decides: a copy changes the times, and other images can have the same
        sizes. It is not computed again if names, sizes and times match those in `known`.
        """
        times = hashlib.sha256(b"".join(part.file_facts() for part in self._images)).hexdigest()[
            :16
        ]
        if times == known.get("times") and IMAGES_DIGEST in known:
            return {IMAGES_DIGEST: known[IMAGES_DIGEST], "times": times}
        content = b"".join(part.file_digests() for part in self._images)
        images = hashlib.sha256(content).hexdigest()[:16]
        if images == known.get(IMAGES_DIGEST):
            # The files were copied or touched, but have the same bytes. Keep the known times, so
            # that the identity stays equal.
            times = known.get("times", times)
        return {IMAGES_DIGEST: images, "times": times}

    def state_dict(self) -> dict[str, Any]:
        """The class names, and the settings that determine the images."""
        return {**super().state_dict(), "class_names": list(self.class_names)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint with other class names, and report what else differs."""
        saved = state_dict["class_names"]
        if saved != self.class_names:
            raise ConfigError(
                f"root: must have the {len(saved)} classes of the checkpoint, {shortened(saved)}, "
                f"found {len(self.class_names)}, {shortened(self.class_names)}, in {self.root}; "
                "give the checkpoint's class_map.json as class_map"
            )
        # Version 0.1 stored no settings, and ignored the EXIF orientation.
        super().load_state_dict({"settings": {"exif_rotation": False}, **state_dict})

    def _whole_images(self, paths: list[Path]) -> list[int]:
        """Positions of the images that can be decoded."""
        checked = [] if self.validate_images == "off" else paths
        if self.validate_images == "auto" and len(paths) > _MANY_IMAGES:
            checked = paths[:: len(paths) // _SPOT_CHECKS]  # decoding all would take hours
        broken = broken_images(checked)
        if broken:
            if self.validate_images != "skip":
                raise broken_images_error(broken)
            self.num_skipped = len(broken)
            warnings.warn(f"root: left out {report_of(broken)}", stacklevel=2)
        return [i for i, path in enumerate(paths) if path not in broken]


def _channels(paths: list[Path]) -> Literal[1, 3]:
    """1 if the headers of all images say grey; a file that cannot be read says nothing."""
    for path in paths[:: max(1, len(paths) // _SPOT_CHECKS)]:
        try:
            if not is_grey(path):
                return 3
        except FileError:
            continue  # `validate_images` decides about it
    return 1
