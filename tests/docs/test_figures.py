"""Every time, size, speed and share on the pages has its CSV, constant or command.

``test_docs.py`` runs the commands above tables. ``claims.py`` has the sentences and other tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.claims import BY_HAND, CLAIMS, ROOT

FIGURE = re.compile(
    r"(?:\d[\d.,]* (?:to|and) )?\d[\d.,]* ?"
    r"(?:%|(?:ms|us|s|MB|MiB|GB|GiB|TB|TFLOP/s|GB/s|TB/s|minutes|seconds|hours|times as)(?!\w))"
)


def unexplained(page: Path) -> list[str]:
    """The figures outside of code, of printed tables, of claims and of ``BY_HAND``."""
    name = page.relative_to(ROOT).as_posix()
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"<!-- python .*? -->\n(?:\|.*\n)+", "", text)
    text = " ".join(text.split())
    for about, claim in CLAIMS:
        if about == name:
            text = text.replace(" ".join(claim().split()), "")
    return [figure for figure in FIGURE.findall(text) if figure not in BY_HAND.get(name, {})]


@pytest.mark.parametrize(("page", "claim"), CLAIMS)
def test_a_sentence_has_the_figures_of_its_csv(page: str, claim: Callable[[], str]) -> None:
    assert " ".join(claim().split()) in " ".join((ROOT / page).read_text().split())


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))],
    ids=lambda page: page.name,
)
def test_every_figure_has_a_source(page: Path) -> None:
    assert not unexplained(page)
