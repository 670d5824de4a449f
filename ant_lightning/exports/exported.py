"""A folder that an export wrote: safe to write again, and to push to the hub."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelHubMixin, snapshot_download

from ant_lightning.errors import ConfigError
from ant_lightning.files.json_file import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator

MARK = "export.json"  # in every folder that an export wrote, and only there


class Exported(ModelHubMixin):  # type: ignore[misc]
    """The folder of an export. `push_to_hub`, `save_pretrained` and `from_pretrained` are those of
    Hugging Face's mixin.

    Args:
        path: The folder.

    Attributes:
        path: The folder.
        to: The format.
        notes: What the exported model does otherwise than the run, a line each.

    Raises:
        ConfigError: If no export wrote the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / MARK).is_file():
            raise ConfigError(f"{path}: must be a folder that an export wrote, found no {MARK}")
        about = read_json(self.path / MARK, kind=dict)
        self.to = str(about.get("to"))
        self.notes = [str(each) for each in about.get("notes", [])]
        self._hub_mixin_config = None  # the mixin would write our arguments as `config.json`

    def __repr__(self) -> str:
        return f"Exported({str(self.path)!r}, to={self.to!r})"

    def _save_pretrained(self, save_directory: Path) -> None:
        shutil.copytree(self.path, save_directory, dirs_exist_ok=True)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, revision: str | None = None, **options: Any
    ) -> Exported:
        if Path(model_id).is_dir():
            return cls(model_id)
        names = ("cache_dir", "force_download", "local_files_only", "token")
        known = {name: options[name] for name in names if name in options}
        return cls(snapshot_download(model_id, revision=revision, **known))


@contextmanager
def new_folder(path: Path, about: dict[str, Any]) -> Iterator[Path]:
    """A folder to write into; it becomes `path` at the end, whole, in place of an older export.

    Args:
        path: Where the folder will be.
        about: What it is, for its `export.json`; read at the end.

    Raises:
        ConfigError: If there is something at `path` that no export wrote.
    """
    old = path.exists()
    if old and not (path / MARK).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            f"output: must be a new folder or one that an export wrote, found {path} with other "
            "files"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ConfigError(
            f"output: must be a folder that can be written, found {path} ({error.strerror})"
        ) from error
    try:
        yield made
        (made / MARK).write_text(json.dumps(about, indent=2) + "\n", encoding="utf8")
        mask = os.umask(0)
        os.umask(mask)
        for each in (made, *made.rglob("*")):  # temporary folders, and some weights, are private
            each.chmod((0o777 if each.is_dir() else 0o666) & ~mask)
        if old:
            shutil.rmtree(path)
        made.replace(path)
    finally:
        shutil.rmtree(made, ignore_errors=True)
