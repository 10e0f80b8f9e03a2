"""Names and messages as text that a terminal, a log or a page can show."""

from __future__ import annotations

LONGEST_NAME = 1000  # characters that ``shown`` keeps


def shown(name: object) -> str:
    """Return a name from data as one line of text for a terminal, a log or a page.

    Characters that do not print become backslash escapes. Examples are control characters, ANSI
    escapes, line ends and direction marks. A name is cut after 1,000 characters.
    """
    text = str(name)
    cut = "..." if len(text) > LONGEST_NAME else ""
    return escaped(text[:LONGEST_NAME]) + cut


def escaped(text: str) -> str:
    """Escape a text of any length as ``shown`` does, without cutting it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
