"""Where the documentation is: the URL of a release, from the metadata of the installed package."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, metadata


def documentation(page: str) -> str:
    """URL of a page of `docs/`; its path in the repository if the package names no repository.

    >>> from ant_lightning.files.documentation import documentation
    >>> documentation("results.md").endswith("docs/results.md")
    True
    """
    url = _repository()
    return f"{url}/blob/HEAD/docs/{page}" if url else f"docs/{page}"


@cache
def _repository() -> str | None:
    """The URL that `hatch_build.py` wrote; one setting of pyproject.toml."""
    try:
        urls = metadata("ant-lightning").get_all("Project-URL") or []
    except PackageNotFoundError:  # the code alone, on the path
        return None
    return dict(each.split(", ", 1) for each in urls).get("Repository")
