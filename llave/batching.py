"""Plan batches of inputs of like length, which pad each other little, before they are read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from sentence_transformers import SentenceTransformer

from llave.media import pictures


class Lengths:
    """Estimates the tokens of inputs from texts and image sizes, to make batches of like length.

    Args:
        model: its processor counts an image's tokens. Without such a processor 1,000 pixels count
            as one token.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        processor = getattr(model[0], "processor", None)
        count: Any = getattr(processor, "_get_num_multimodal_tokens", None)

        @lru_cache(maxsize=1 << 16)
        def image(width: int, height: int) -> int:
            try:
                return int(count(image_sizes=[(height, width)])["num_image_tokens"][0])
            except Exception:  # it is an estimate, and an image's refusal comes later
                return width * height // 1000

        self._image = image

    def __call__(self, text: str, size: tuple[int, int] | None) -> int:
        """Return an input's approximate number of tokens.

        Args:
            text: its text.
            size: its image's (width, height) in pixels, or None.
        """
        return len(text) // 4 + (0 if size is None else 1 + self._image(*size))

    def of(self, item: Any) -> int:
        """Return the approximate number of tokens of an input for ``encode``."""
        text = item.get("text") if isinstance(item, dict) else item
        sizes = [picture.size for picture in pictures(item)]
        whole = sum(self("", size) for size in sizes)
        return whole + (self(text, None) if isinstance(text, str) else 0)


def planned(items: Sequence[Any], lengths: Sequence[int], size: int) -> list[list[Any]]:
    """Cut items into batches of at most ``size``, each of items of like length, the longest first.

    Args:
        items: the items.
        lengths: their lengths.
        size: the most items in a batch.
    """
    order = sorted(range(len(items)), key=lambda place: -lengths[place])
    return [
        [items[place] for place in order[first : first + size]]
        for first in range(0, len(order), size)
    ]
