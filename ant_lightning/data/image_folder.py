"""A user's own folder of images."""

from __future__ import annotations

import hashlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from ant_lightning.data.batch import Batch
from ant_lightning.data.class_map import read_class_map, write_class_map
from ant_lightning.data.dataset import ImageDataset
from ant_lightning.data.image_search import find_images
from ant_lightning.data.module import IMAGES_DIGEST, ImageDataModule, check_at_least
from ant_lightning.data.pictures import Crop, open_picture, read_picture
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.files.identity import shortened
from ant_lightning.randomness import keyed_generator, keyed_seed
from ant_lightning.runtime.run_record import run_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["ImageFolderData", "is_flipped"]


class ImageFolderData(ImageDataModule):
    """Images of a folder, in folders of their classes or all in one, as FFHQ and CelebA-HQ come.

    Classes are numbered in the order of their folders' names, unless `class_map` says otherwise.
    The names are written to `class_map.json` in the log folder and to every checkpoint, which
    cannot be loaded with other classes.

    Args:
        root: The folder.
        image_size: Side in pixels of what the network sees.
        batch_size: Images of one optimizer step, over all ranks.
        num_held_out: Images that are never trained on: validation, test, reference of FID.
        labels: `folders`: the first folder below `root` is an image's class. `none`: no classes.
            `auto`: `none` if the images lie in `root` itself, else `folders`.
        class_map: JSON file of class names and numbers; made if it does not exist.
        channels: 3 for colour, 1 for grey.
        crop: `center_adm` as ADM and DiT crop, or `resize`.
        exif_rotation: Whether to apply the EXIF orientation of photos, as viewers do.
        flip: Whether training images are mirrored in half of the epochs.
        validate_images: `raise`: decode every image before training, and refuse broken ones.
            `skip`: leave broken ones out. `off`: a broken image ends the run when it is loaded.
        split_seed: Seed of the split, which belongs to the data set and not to the run.
        num_workers: Loading processes of each rank.
        seed: Order of the images, and flips; by default the seed of the run.

    Attributes:
        num_skipped: Broken images that were left out.

    Raises:
        ConfigError: Naming the setting or the file, if the folder cannot be used.

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
        image_size: int,
        batch_size: int,
        num_held_out: int,
        labels: Literal["auto", "folders", "none"] = "auto",
        class_map: str | None = None,
        channels: Literal[1, 3] = 3,
        crop: Crop = "center_adm",
        exif_rotation: bool = True,
        flip: bool = True,
        validate_images: Literal["raise", "skip", "off"] = "raise",
        split_seed: int = 0,
        num_workers: int = 4,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        check_at_least(1, image_size=image_size)
        if channels not in {1, 3}:
            raise ConfigError(f"channels: must be 1 or 3, found {channels}")
        self.root = Path(root)
        self.image_shape = (channels, image_size, image_size)
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

    def prepare(self) -> tuple[ImageDataset, ImageDataset]:
        """Find, check, number and split the images."""
        paths, names = find_images(self.root, labels=self.labels)
        self._number_classes(names)
        number = {name: i for i, name in enumerate(self.class_names)}
        labels = torch.tensor([number[name] for name in names] or [0] * len(paths))
        # Broken images are left out before the split, which is over what is trained on.
        kept = self._whole_images(paths)
        empty = set(labels.tolist()) - set(labels[kept].tolist())
        if empty and names:
            raise ConfigError(
                "validate_images: every class must have an image that is not broken, "
                f"{self.class_names[min(empty)]} in {self.root} has none"
            )
        if not 1 <= self.num_held_out < len(kept):
            raise ConfigError(
                f"num_held_out: must be at least 1 and below the {len(kept)} images in "
                f"{self.root}, found {self.num_held_out}"
            )
        order = torch.randperm(
            len(kept), generator=keyed_generator(self.split_seed, "folder split")
        )
        held_out = sorted(kept[i] for i in order[: self.num_held_out].tolist())
        train = sorted(set(kept) - set(held_out))
        return (
            _FolderImages(self, [paths[i] for i in train], labels[train], flip=self.flip),
            _FolderImages(self, [paths[i] for i in held_out], labels[held_out], flip=False),
        )

    def digests(self, known: Mapping[str, Any]) -> dict[str, str]:
        """A digest of the names and bytes of all files.

        Bytes are compared because times change in a copy and other images can have the same sizes.
        If names, sizes and times still match `known`, so do the bytes, and they are not read again.
        """
        parts = (self.train_images, self.held_out_images)
        facts = b"".join(part.file_facts() for part in parts)  # type: ignore[attr-defined]
        times = hashlib.sha256(facts).hexdigest()[:16]
        if times == known.get("times") and IMAGES_DIGEST in known:
            return {IMAGES_DIGEST: known[IMAGES_DIGEST], "times": times}
        paths = [path for part in parts for path in part.paths]  # type: ignore[attr-defined]
        names = b"".join(os.fsencode(path.relative_to(self.root)) + b"\0" for path in paths)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # hashing releases the GIL
            content = hashlib.sha256(b"".join(pool.map(_file_digest, paths))).hexdigest()
        images = hashlib.sha256(names + content.encode()).hexdigest()[:16]
        if images == known.get(IMAGES_DIGEST):
            # Copied or touched, but unchanged: the identity must stay equal.
            times = known.get("times", times)
        return {IMAGES_DIGEST: images, "times": times}

    def setup(self, stage: str) -> None:
        """Find the images and write the class names to the log folder, unless a file is there."""
        super().setup(stage)
        if stage == "fit" and self.class_names and self.trainer is not None:
            path = run_folder(self.trainer) / "class_map.json"
            if self.trainer.is_global_zero:
                _record_classes(path, self.class_names)

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
        # Version 0.1 stored no settings and ignored EXIF orientation.
        super().load_state_dict({"settings": {"exif_rotation": False}, **state_dict})

    def _number_classes(self, found: list[str]) -> None:
        """Class names in the order of their numbers."""
        names = sorted(set(found))
        if self.class_map is not None and Path(self.class_map).exists():
            known = read_class_map(self.class_map)
            unknown = sorted(set(names) - set(known))
            if unknown:
                raise ConfigError(
                    f"class_map: {self.class_map} must have the classes of {self.root}, found no "
                    f"class {unknown[0]!r}"
                )
            names = known if found else []
        elif self.class_map is not None:
            write_class_map(self.class_map, names)
        self.class_names = names
        self.num_classes = len(names)

    def _whole_images(self, paths: list[Path]) -> list[int]:
        """Positions of the images that can be decoded."""
        broken = {} if self.validate_images == "off" else _broken_images(paths)
        if broken:
            listed = "; ".join(list(broken.values())[:5])
            more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
            report = f"{len(broken)} broken images: {listed}{more}"
            if self.validate_images == "raise":
                raise ConfigError(f"validate_images: {report} (use 'skip' to leave them out)")
            self.num_skipped = len(broken)
            warnings.warn(f"root: left out {report}", stacklevel=2)
        return [i for i, path in enumerate(paths) if path not in broken]


class _FolderImages(ImageDataset):
    """Image files, decoded when they are asked for."""

    def __init__(
        self, data: ImageFolderData, paths: list[Path], labels: Tensor, *, flip: bool
    ) -> None:
        self.paths = paths
        self.labels = labels
        self._root = data.root
        self._channels, self._size, _ = data.image_shape
        self._crop = data.crop
        self._exif_rotation = data.exif_rotation
        self._flip_seed = data.seed if flip else None

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, indices: list[int], *, epoch: int | None) -> Batch:
        """The images at `indices`, mirrored where `is_flipped` says so."""
        shape = (len(indices), self._size, self._size, self._channels)
        pixels = np.empty(shape, dtype=np.uint8)
        for row, index in enumerate(indices):
            picture = read_picture(
                self.paths[index],
                image_size=self._size,
                channels=self._channels,
                crop=self._crop,
                exif_rotation=self._exif_rotation,
            )
            pixels[row] = picture[:, ::-1] if is_flipped(self._flip_seed, epoch, index) else picture
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
        rows = torch.tensor(indices)
        return Batch(images, self.labels[rows], rows)

    def fingerprint(self) -> str:
        """A hash of the files' names, sizes and times, and of how they are rotated and cropped.

        To hash the pixels, a large folder would have to be decoded.
        """
        rule = f"{(self._channels, self._size, self._size)} {self._crop} {self._exif_rotation};"
        return hashlib.sha256(rule.encode() + self.file_facts()).hexdigest()

    def file_facts(self) -> bytes:
        """Names, sizes and times, including the inode change time, which unpacking cannot set."""
        facts = []
        for path in self.paths:
            found = path.stat()
            name = os.fsencode(path.relative_to(self._root))  # need not be UTF-8
            times = f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
            facts.append(name + f"\0{times};".encode())
        return b"".join(facts)


def is_flipped(seed: int | None, epoch: int | None, index: int) -> bool:
    """Whether the image at `index` is mirrored in `epoch`: a fair coin, keyed by these numbers.

    Without a seed or an epoch it is not.
    """
    if seed is None or epoch is None:
        return False
    return bool(keyed_seed(seed, "flip", epoch, index) & 1)


def _broken_images(paths: list[Path]) -> dict[Path, str]:
    """Decode every image; returns the errors of those that fail.

    With several ranks each decodes its share, and all return the errors of all.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    mine = paths[dist.get_rank() :: ranks] if ranks > 1 else paths
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # decoding releases the GIL
        faults = zip(mine, pool.map(_fault, mine), strict=True)
        found = {path: fault for path, fault in faults if fault is not None}
    if ranks == 1:
        return found
    parts: list[dict[Path, str]] = [{}] * ranks
    dist.all_gather_object(parts, found)
    return dict(sorted((k, v) for part in parts for k, v in part.items()))


def _fault(path: Path) -> str | None:
    try:
        open_picture(path, channels=3)
    except FileError as error:
        return str(error)
    return None


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _record_classes(path: Path, names: list[str]) -> None:
    """Write a class map, but not over a file that may be somebody else's."""
    try:
        known = read_class_map(path) if path.exists() else None
    except FileError:
        known = []
    if known is None:
        write_class_map(path, names)
    elif known != names:
        warnings.warn(
            f"{path}: has other classes and is not overwritten; this run's classes are in its "
            "checkpoints",
            stacklevel=2,
        )
