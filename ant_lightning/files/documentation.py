"""Where the documentation is: the URL of a release, from the metadata of the installed package."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, metadata


def documentation(page: str) -> str:
    """URL of a page of `docs/`, or of a section of it; words to find it by without a repository.

    A wheel has no folder `docs`, so a path would lead nowhere.

    >>> from ant_lightning.files.documentation import documentation
    >>> "results" in documentation("results.md#reading-the-evidence").lower()
    True
    """
    url = _repository()
    if url:
        return f"{url}/blob/HEAD/docs/{page}"
    name, _, section = page.replace("-", " ").partition(".md")
    part = f'"{section[1:].capitalize()}" on ' if section else ""
    return f'{part}the page "{name.capitalize()}" in the documentation of ant_lightning'


@cache
def _repository() -> str | None:
    """The URL that `hatch_build.py` wrote; one setting of pyproject.toml."""
    try:
        urls = metadata("ant-lightning").get_all("Project-URL") or []
    except PackageNotFoundError:  # the code alone, on the path
        return None
    return dict(each.split(", ", 1) for each in urls).get("Repository")
