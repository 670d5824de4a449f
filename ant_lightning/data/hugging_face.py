"""Data sets of Hugging Face's `datasets`: on the hub, or local parquet files and folders."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from ant_lightning.errors import ConfigError, extra_for


class HuggingFaceDataset(Dataset[dict[str, Any]]):
    """A data set that `datasets.load_dataset` loads, for `MapStyleData`.

    Images are decoded when they are asked for. Needs `pip install 'ant-lightning[datasets]'`.

    Args:
        path: Name on the hub, or the kind of local files: `parquet`, `imagefolder`, `arrow`, ...
        split: Which part.
        name: Configuration of a data set on the hub.
        data_dir: Folder of local files.
        data_files: Local files, or a pattern of them.
        label: Entry whose feature says how many classes there are; by default the first one that
            has classes.

    Attributes:
        classes: Names of the classes; `None` if there are none.
        fingerprint: Identifies content and transforms, as `datasets` computes it.

    Raises:
        ConfigError: If `datasets` is not installed, or cannot load it.

    Examples:
        With `--data.dataset` of the command line, `{class_path: ant_lightning.HuggingFaceDataset,
        init_args: {path: imagefolder, data_dir: my_folder}}`.

        >>> from ant_lightning import HuggingFaceDataset
        >>> HuggingFaceDataset("parquet", data_files="missing.parquet")
        Traceback (most recent call last):
        ...
        ant_lightning.errors.ConfigError: ...
    """

    def __init__(
        self,
        path: str,
        *,
        split: str = "train",
        name: str | None = None,
        data_dir: str | None = None,
        data_files: str | list[str] | None = None,
        label: str | None = None,
    ) -> None:
        with extra_for("dataset", "datasets"):
            import datasets  # noqa: PLC0415 - an extra
        try:
            self._rows = datasets.load_dataset(
                path, name, split=split, data_dir=data_dir, data_files=data_files
            )
        except Exception as error:  # `datasets` raises errors of many kinds
            raise ConfigError(
                f"path: datasets cannot load {path!r} ({type(error).__name__}: {error})"
            ) from error
        features = self._rows.features
        named = [label] if label else [n for n in features if hasattr(features[n], "names")]
        self.classes: list[str] | None = features[named[0]].names if named else None
        self.fingerprint: str = self._rows._fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self._rows[index]
        return row
