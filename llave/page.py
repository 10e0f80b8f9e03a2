"""A static HTML page: each query beside what was found, with pictures, texts and scores.

The page is one file and works without scripts. Small copies of the pictures are embedded. Texts
from data are escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from PIL import Image

from llave.files import create_file
from llave.media import pictures
from llave.printable import shown

SIDE = 256  # the most pixels of an embedded picture's width or height


class Item(NamedTuple):
    """An input on a page.

    Attributes:
        label: what it is on the page, such as its place and score.
        name: its id or path.
        text: its text.
        picture: its picture as a data URI. Empty where it has none.
    """

    label: str
    name: str
    text: str
    picture: str

    @property
    def alt(self) -> str:
        return f"picture {self.name}".rstrip()


class Answer(NamedTuple):
    """A query and what was found, best first."""

    query: Item
    found: list[Item]


class Section(NamedTuple):
    """A part of a page: its title, a note and its answers."""

    title: str
    note: str
    answers: Iterable[Answer]


def make_item(label: str, name: str, value: Any) -> Item:
    """Make an item of an input for ``model.encode``.

    Args:
        label: what it is on the page.
        name: its id or path.
        value: a text, an image, or a dict of ``text``, ``image`` and ``video``. Of several pictures
            the middle one is shown.
    """
    text = value if isinstance(value, str) else ""
    if isinstance(value, dict):
        text = value.get("text", "")
    listed = pictures(value)
    picture = _data_uri(listed[len(listed) // 2]) if listed else ""
    return Item(label, shown(name), text, picture)


def write_page(file: str | Path, title: str, sections: Iterable[Section]) -> None:
    """Write a page to a new file.

    Raises:
        ValueError: the file exists.
        OSError: it cannot be written.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    source = Path(__file__).with_name("page.html.jinja").read_text(encoding="utf-8")
    page = environment.from_string(source).stream(title=shown(title), sections=sections)
    # An argument of a command may have bytes that are no text.
    write = partial(page.dump, encoding="utf-8", errors="backslashreplace")
    create_file("html", Path(file), lambda path: write(str(path)))


def _data_uri(picture: Image.Image) -> str:
    small = picture.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
