"""Build hook: URLs of the package, and the README with links that work outside the repository."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_IMAGES = {".gif", ".jpg", ".png", ".svg"}


class RepositoryLinks(MetadataHookInterface):
    """Fills in `readme` and `urls` from the URL of the repository."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        """Take the URL from `REPOSITORY_URL`, or else from `repository-url` of the hook."""
        url = (os.environ.get("REPOSITORY_URL") or self.config["repository-url"]).rstrip("/")
        text = Path(self.root, "README.md").read_text(encoding="utf8")
        metadata["urls"] = {}
        if url:
            text = with_absolute_links(text, url)
            metadata["urls"] = {
                "Repository": url,
                "Documentation": f"{url}/blob/HEAD/docs/index.md",
                "Changelog": f"{url}/blob/HEAD/CHANGELOG.md",
                "Issues": f"{url}/issues",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def with_absolute_links(text: str, url: str) -> str:
    """A page whose links to files of the repository lead there, and images to their content."""

    def absolute(found: re.Match[str]) -> str:
        target = found[1]
        kind = "raw" if Path(target).suffix in _IMAGES else "blob"
        return f"]({url}/{kind}/HEAD/{target})"

    return re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", absolute, text)
