"""The README and docs/: snippets run, tables are printed by commands, links and lists are right."""

from __future__ import annotations

import builtins
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forks
from tests.browser import BROWSER, opened

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    pytest.param(code, id=f"{page.name}:{page.read_text()[: match.start()].count(chr(10)) + 1}")
    for page in PAGES
    for match in re.finditer(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    for code in [match[1]]
]


# Each table must be what the command above it prints.
TABLES = [
    (page, *match.groups())
    for page in PAGES
    for match in re.finditer(r"<!-- python (.*?) -->\n((?:\|.*\n)+)", page.read_text())
]


@pytest.mark.parametrize(("page", "command", "table"), TABLES, ids=lambda x: str(x)[:60])
def test_figures_are_not_typed(
    page: Path,
    command: str,
    table: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", command.split())
    runpy.run_path(command.split()[0], run_name="__main__")
    assert table == capsys.readouterr().out


def provide_files(folder: Path) -> None:
    """Write the files that the README's snippet reads: a tiny model, an image and a video."""
    for needed in ("sentence_transformers", "torchvision", "av"):
        pytest.importorskip(needed)
    from llave.modeling import build
    from tests.llave import test_video, tiny

    build(tiny.llava_onevision(), device="cpu").save_pretrained(str(folder / "released-0.5b"))
    test_video.noise(1)[0].save(folder / "cat_and_dog.jpg")
    test_video.write_video(folder / "clip.mp4", 20)


def run_snippet(code: str) -> None:
    """Run as ``python -c`` would. Runs in a process of its own."""
    main = sys.modules["__main__"]
    main.__dict__.clear()
    main.__dict__.update(__name__="__main__", __builtins__=builtins)
    exec(compile(code, "<string>", "exec"), main.__dict__)


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippet_runs(code: str, tmp_path: Path) -> None:
    if "released-0.5b" in code:
        provide_files(tmp_path)
    (variables,) = forks.group(1)
    log = tmp_path / "output.txt"
    child = forks.start(run_snippet, code, log=log, folder=tmp_path, **variables)
    child.join()
    output = log.read_text()
    if missing := re.search(r"No module named '(?!llave)(\w+)'", output):
        pytest.skip(f"{missing[1]} is not installed")
    assert child.exitcode == 0, output


def test_links_name_files() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.long
def test_the_site_builds_without_a_warning_and_is_searched(tmp_path: Path) -> None:
    """Sphinx warns of links to pages and headings that are not there."""
    for needed in ("sphinx", "myst_parser", "furo", "sentence_transformers"):
        pytest.importorskip(needed)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "hardness_weighted_contrastive_loss" in (tmp_path / "searchindex.js").read_text()
    if BROWSER is not None:
        for words, page in (("matryoshka", "loss.html"), ("add+a+pair+rule", "architecture.html")):
            wait, query = "--virtual-time-budget=10000", f"?q={words}"
            found = opened(tmp_path / "search.html", tmp_path, wait, query=query)
            assert re.search(f'href="{page}[^"]*" data-score', found), found


def test_the_page_names_every_place_of_a_rule() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.partition("## How to add a pair rule\n")[2].partition("\n## ")[0]
    named = re.findall(r"`((?:llave_kernels|csrc)/\S+)`", section)
    code = [*(ROOT / "llave_kernels").rglob("*.py"), *(ROOT / "csrc").glob("*.*")]
    found = [
        file.relative_to(ROOT).as_posix()
        for file in code
        if "integrations" not in file.parts and "query_ids" in file.read_text()
    ]
    assert sorted(named) == sorted(found)
