"""Images as EDM's `dataset_tool.py` stores them, as a map-style data set."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from ant_lightning.data.archives.store import open_store
from ant_lightning.data.pictures import SUFFIXES


class EDMImages(Dataset[dict[str, Any]]):
    """A zip archive or a folder that EDM's `dataset_tool.py` wrote, for `MapStyleData`.

    Images are `NNNNN/imgNNNNNNNN.png`, in the order of their names, and `dataset.json` has their
    labels. An archive is read by an index that is made once (see `archive_index`), and nothing is
    decoded for it; each file's checksum is compared when it is read.

    Args:
        path: The archive or the folder.

    Attributes:
        num_classes: The largest label plus one; `None` without labels.
        fingerprint: Identifies names and content, of a folder also the times.

    Raises:
        ConfigError: If there are no images.
        FileError: If the archive or its labels are damaged.

    Reference:
        Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models",
        arXiv 2206.00364; its `dataset_tool.py`.

    Examples:
        >>> import json, tempfile, zipfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from ant_lightning import EDMImages, MapStyleData
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     names = [f"00000/img{i:08}.png" for i in range(4)]
        ...     Image.new("L", (8, 8)).save(f"{folder}/one.png")
        ...     with zipfile.ZipFile(f"{folder}/data.zip", "w") as archive:
        ...         for name in names:
        ...             archive.write(f"{folder}/one.png", name)
        ...         labels = [[name, i % 2] for i, name in enumerate(names)]
        ...         archive.writestr("dataset.json", json.dumps({"labels": labels}))
        ...     data = MapStyleData(EDMImages(f"{folder}/data.zip"), batch_size=2)
        >>> data.image_shape, data.num_classes
        ((1, 8, 8), 2)
    """

    def __init__(self, path: str) -> None:
        self._store = open_store(path, suffixes=SUFFIXES)
        labels = self._store.labels
        self.num_classes = None if labels is None else int(labels.max()) + 1
        self.fingerprint = self._store.fingerprint

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        sample: dict[str, Any] = {"image": self._store.read(index)}
        labels = self._store.labels
        return sample if labels is None else {**sample, "label": int(labels[index])}
