"""The data module for a folder of images with captions, as diffusers' scripts read it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ant_lightning.data.batch import Batch
from ant_lightning.data.dataset import ImageDataset
from ant_lightning.data.image_folder import ImageFolderData
from ant_lightning.data.pictures import Crop
from ant_lightning.data.text.cache import TextCache
from ant_lightning.errors import ConfigError, FileError
from ant_lightning.sizes import Size

if TYPE_CHECKING:
    from torch import Tensor

    from ant_lightning.data.folder_images import FolderImages

_METADATA = "metadata.jsonl"


class CaptionFolderData(ImageFolderData):
    """Images with captions: a text file beside each (`cat.png`, `cat.txt`), or `metadata.jsonl`.

    A line of `metadata.jsonl` is `{"file_name": "cat.png", "text": "a cat"}`, as in the
    `imagefolder` of Hugging Face's datasets. It lies in `root`, and then has all captions.

    Args:
        root: The folder.
        image_size: Height and width in pixels that images are resized and cropped to; one number
            for a square.
        batch_size: Images of one optimizer step, over all ranks.
        embeddings: Cache of the captions' embeddings, which `ant-lightning encode` writes; `None`
            to give images alone, such as to `encode`.
        caption: The name of the caption in a line of `metadata.jsonl`.
        num_held_out: See `ImageFolderData` for this and all arguments below.
        channels: 3 for colour, 1 for grey.
        crop: `center_adm` or `resize`.
        exif_rotation: Whether to apply the EXIF orientation of photos.
        flip: Whether training images are mirrored; captions that say left or right do not turn.
        validate_images: `auto`, `raise`, `skip` or `off`.
        split_seed: Seed of the split.
        num_workers: Loading processes of each rank.
        seed: Order of the images, and flips; by default the seed of the run.

    Raises:
        ConfigError: If an image has no caption, or a caption no embedding; names the first.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from ant_lightning import CaptionFolderData
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for i, text in enumerate(["a cat", "a dog", "two cats"]):
        ...         Image.new("RGB", (20, 16), (60 * i, 0, 0)).save(f"{root}/{i}.png")
        ...         _ = Path(f"{root}/{i}.txt").write_text(text)
        ...     data = CaptionFolderData(root, image_size=8, batch_size=2, num_held_out=1)
        ...     sorted(data.captions())
        ['a cat', 'a dog', 'two cats']
    """

    def __init__(
        self,
        root: str,
        *,
        image_size: Size,
        batch_size: int,
        embeddings: str | None = None,
        caption: str = "text",
        num_held_out: int | None = None,
        channels: Literal[1, 3] = 3,
        crop: Crop = "center_adm",
        exif_rotation: bool = True,
        flip: bool = False,
        validate_images: Literal["auto", "raise", "skip", "off"] = "auto",
        split_seed: int = 0,
        num_workers: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            root,
            image_size=image_size,
            batch_size=batch_size,
            num_held_out=num_held_out,
            labels="none",
            channels=channels,
            crop=crop,
            exif_rotation=exif_rotation,
            flip=flip,
            validate_images=validate_images,
            split_seed=split_seed,
            num_workers=num_workers,
            seed=seed,
        )
        self.embeddings = embeddings
        self.caption = caption

    @cached_property
    def cache(self) -> TextCache | None:
        """The embeddings; `None` without any."""
        if self.embeddings is None:
            return None
        try:
            return TextCache(self.embeddings)
        except FileError as error:
            raise ConfigError(f"embeddings: must be a cache of embeddings: {error}") from error

    @property
    def null_condition(self) -> dict[str, Tensor]:
        """The entries of no text, for one image."""
        return {} if self.cache is None else self.cache.null

    def prepare(self) -> tuple[ImageDataset, ImageDataset]:
        """Find and split the images, and the caption of each."""
        metadata = self._metadata()
        super().prepare()
        train, held_out = (
            _Captioned(part, [self._caption_of(path, metadata) for path in part.paths], self.cache)
            for part in self._images
        )
        if self.cache is not None:
            for part in (train, held_out):
                missing = self.cache.missing(part.captions)
                if missing:
                    first = part.images.paths[missing[0]].name
                    raise ConfigError(
                        f"embeddings: must hold every caption, found none of {len(missing)}, such "
                        f"as {part.captions[missing[0]][:60]!r} of {first}; encode again, finished "
                        "files are kept"
                    )
        return train, held_out

    def captions(self) -> list[str]:
        """The captions of all images."""
        return [text for part in self._parts for text in part.captions]  # type: ignore[attr-defined]

    def _metadata(self) -> Mapping[str, str] | None:
        """Captions by the path of their image below `root`; `None` without the file."""
        path = self.root / _METADATA
        if not path.is_file():
            return None
        found = {}
        for number, line in enumerate(path.read_text(encoding="utf8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                found[Path(entry["file_name"]).as_posix()] = str(entry[self.caption])
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(
                    f"root: each line of {path} must have file_name and {self.caption}, found "
                    f"{line[:60]!r} in line {number}"
                ) from error
        return found

    def _caption_of(self, path: Path, metadata: Mapping[str, str] | None) -> str:
        if metadata is not None:
            found = metadata.get(path.relative_to(self.root).as_posix())
            where = f"line of {self.root / _METADATA}"
        else:
            beside = path.with_suffix(".txt")
            found = beside.read_text(encoding="utf8").strip() if beside.is_file() else None
            where = f"file {beside.name}"
        if found is None:
            raise ConfigError(f"root: every image must have a caption, found no {where} for {path}")
        return found


class _Captioned(ImageDataset):
    """Images of a folder with the embeddings of their captions."""

    def __init__(self, images: FolderImages, captions: list[str], cache: TextCache | None) -> None:
        self.images = images
        self.captions = captions
        self.labels = images.labels
        self._cache = cache

    def __len__(self) -> int:
        return len(self.images)

    def load(self, indices: list[int], *, epoch: int | None) -> Batch:
        """The images at `indices` and their embeddings."""
        return self.images.load(indices, epoch=epoch)._replace(condition=self.conditions(indices))

    def conditions(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The embeddings of the captions."""
        if self._cache is None:
            return {}
        return self._cache([self.captions[index] for index in indices])

    def fingerprint(self) -> str:
        """That of the images."""
        return self.images.fingerprint()
