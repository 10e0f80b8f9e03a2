"""Figures within sentences of the pages are those of the committed CSVs.

Tables have their commands above them (``test_docs.py``).
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
Row = dict[str, str]


def rows(name: str) -> list[Row]:
    (file,) = (RESULTS / name).glob("*.csv")
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def row(name: str, **wanted: object) -> Row:
    (found,) = (r for r in rows(name) if all(r[key] == str(value) for key, value in wanted.items()))
    return found


def step(name: str, impl: str, n: int = 8192, d: int = 384, data: str = "random") -> float:
    return float(row(name, impl=impl, n=n, d=d, data=data)["step_ms"])


def cost(name: str, impl: str, n: int) -> str:
    found = row(name, impl=impl, n=n, d=384, data="random")
    return f"{float(found['step_ms']) / 1000:.0f} s and {float(found['extra_mib']):,.0f} MiB"


def faster(name: str, other: str, d: int) -> str:
    return f"{step(name, other, d=d) / step(name, 'llave-torch', d=d):.1f}"


def wider(other: str, d: int) -> str:
    return f"{step('widths', other, 4096, d) / step('widths', 'llave-torch', 4096, d):.1f}"


def feeding(device: str, delay: float, workers: int) -> str:
    found = row("feeding", device=device, decoder_ms=delay, workers=workers)
    return f"{100 * float(found['busy']):.1f} %, {float(found['pictures_per_s']):.1f}"


def of_loss(name: str, other: str, d: int = 384) -> str:
    ours, theirs = (step(f"losses/{name}", impl, 4096, d) for impl in ("llave-torch", other))
    return f"{theirs / ours:.1f}"


def host(way: str) -> str:
    return f"{float(row('host_time', way=way)['ratio']):.1f}"


# From a page to a part of it, with the figures filled in.
CLAIMS: list[tuple[str, Callable[[], str]]] = [
    (
        "README.md",
        lambda: (
            f"{faster('sizes', 'authors', 384)} to {faster('both', 'authors', 384)} times "
            "as fast as the authors' loss at N = M = 8,192 and D = 384"
        ),
    ),
    (
        "docs/results.md",
        lambda: (
            f"our loss is {faster('both', 'authors', 384)} (D = 384) and "
            f"{faster('both', 'authors', 1024)} (D = 1,024) times as fast as the authors' loss"
        ),
    ),
    (
        "docs/results.md",
        lambda: (
            f"it is {faster('one_direction', 'sentence-transformers', 384)} and "
            f"{faster('one_direction', 'sentence-transformers', 1024)} times as fast as the loss "
            "of sentence-transformers"
        ),
    ),
    (
        "docs/results.md",
        lambda: (
            f"then {faster('both_half_rate', 'authors', 384)} and "
            f"{faster('both_half_rate', 'authors', 1024)} times as fast as the authors'"
        ),
    ),
    (
        "docs/results.md",
        lambda: (
            f"({step('default_half_rate', 'dense-compiled', 1024):.0f} ms against "
            f"{step('default_half_rate', 'llave-torch', 1024):.0f}), at N = 4,096 ours is "
            f"({step('default_half_rate', 'llave-torch', 4096):.0f} ms against "
            f"{step('default_half_rate', 'dense-compiled', 4096):.0f})"
        ),
    ),
    (
        "docs/results.md",
        lambda: (
            f"At N = 8,192 our loss is {faster('sizes', 'authors', 384)} times as fast as the "
            "authors'. At N = 32,768"
        ),
    ),
    (
        "docs/results.md",
        lambda: (
            f"Our loss is {wider('authors', 128)} (D = 128) to {wider('authors', 2048)} "
            f"(D = 2,048) times as fast as the authors'. It is {wider('dense-compiled', 128)} to "
            f"{wider('dense-compiled', 2048)} times as fast as the compiled dense loss"
        ),
    ),
    (
        "docs/results.md",
        lambda: (
            f"Ours takes {cost('sizes', 'llave-torch', 32768)} a step there, OpenCLIP's takes "
            f"{cost('sizes', 'open-clip', 32768)}."
        ),
    ),
    (
        "docs/results.md",
        lambda: (
            f"a step takes {step('default', 'llave-torch', 1024):.1f} ms, and the compiled dense "
            f"loss takes {step('default', 'dense-compiled', 1024):.1f} ms"
        ),
    ),
    (
        "docs/results.md",
        lambda: (
            f"At N = 4,096 our call is {of_loss('supcon', 'pytorch-metric-learning')} (SupCon), "
            f"{of_loss('within', 'sentence-transformers')} (within both sides), "
            f"{of_loss('matryoshka', 'sentence-transformers', 768)} (five lengths) and "
            f"{of_loss('sigmoid', 'open_clip')} (SigLIP) times as fast as the trainer's own class"
        ),
    ),
    (
        "docs/performance.md",
        lambda: (
            f"In eager calls it takes {host('ours')} times as long as the dense loss, and "
            f"{host('ours, by the operator that graphs take')} times as long where a graph"
        ),
    ),
    (
        "docs/when.md",
        lambda: (
            f"{float(row('both', impl='dense', n=8192, d=384)['extra_mib']) / 1024:.1f} GiB "
            "at N = M = 8,192"
        ),
    ),
    *(
        (
            "docs/scale.md",
            lambda device=device, name=name, delay=delay, decoder=decoder: (
                f"| {name} | {decoder} | {feeding(device, delay, 0)} "
                f"| {feeding(device, delay, 2)} |"
            ),
        )
        for device, name in (
            ("cpu", "small model on the CPU"),
            ("stand-in, 500 ms a batch", "stand-in for a GPU"),
        )
        for decoder, delay in (("plain", 0.0), ("slow", 10.0))
    ),
]


@pytest.mark.parametrize(("page", "claim"), CLAIMS)
def test_a_sentence_has_the_figures_of_its_csv(page: str, claim: Callable[[], str]) -> None:
    assert claim() in " ".join((ROOT / page).read_text().split())
