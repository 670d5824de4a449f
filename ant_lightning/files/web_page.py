"""One HTML file that holds its pictures: readable anywhere, also on a phone, and after a move."""

from __future__ import annotations

import base64
import re
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto } img { max-width: 100% }
th, td { border: 1px solid #ccc; padding: .2rem .6rem; text-align: right }
td, code { white-space: nowrap } pre { overflow-x: auto }
th { background: #f4f4f4 }
"""


def web_page(title: str, body: str) -> str:
    """A whole HTML file around a body.

    >>> from ant_lightning.files.web_page import web_page
    >>> web_page("a < b", "<p>c</p>").endswith("<body><p>c</p></body></html>")
    True
    """
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html><head>{head}</head><body>{body}</body></html>"


def web_page_of(markdown: str, folder: Path) -> str:
    """The HTML of a Markdown page whose pictures lie in a folder; its first heading is the title.

    Args:
        markdown: The page, with tables and fenced code.
        folder: Where its pictures are.
    """
    from markdown import markdown as as_html  # noqa: PLC0415 - 0.1 s

    body = as_html(markdown, extensions=["tables", "fenced_code"])
    body = re.sub(r'(?<= src=")[\w.-]+\.png(?=")', lambda name: _data(folder / name[0]), body)
    return web_page(markdown.partition("\n")[0].lstrip("# "), body)


def picture(path: Path, text: str) -> str:
    """The HTML of a PNG file, with its bytes."""
    return f'<img src="{_data(path)}" alt="{escape(text)}">'


def _data(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
