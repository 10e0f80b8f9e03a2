"""Each step of the workflows is a make target or a nox session, and their versions are ours."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llave_kernels.version import __version__

yaml = pytest.importorskip("yaml")
pytest.importorskip("nox")
tomllib = pytest.importorskip("tomllib")  # part of Python from 3.11

ROOT = Path(__file__).parents[1]
WORKFLOWS = {
    path.name: yaml.safe_load(path.read_text()) for path in ROOT.glob(".github/workflows/*.yml")
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
PREFIX = "Programming Language :: Python :: "
PYTHONS = [
    name.removeprefix(PREFIX)
    for name in PROJECT["project"]["classifiers"]
    if name.startswith(PREFIX)
]


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, workflow in WORKFLOWS.items():
        for job, content in workflow["jobs"].items():
            yield f"{name}:{job}", content


def commands(job: dict[str, Any]) -> Iterator[str]:
    """Each ``run`` of a job, once for each combination of its matrix."""
    matrix = job.get("strategy", {}).get("matrix", {})
    for values in itertools.product(*matrix.values()):
        for step in job["steps"]:
            command = step.get("run", "")
            for key, value in zip(matrix, values, strict=True):
                command = command.replace(f"${{{{ matrix.{key} }}}}", value)
            yield from command.splitlines()


COMMANDS = sorted({command for _, job in jobs() for command in commands(job)})


@pytest.fixture(scope="module")
def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.fixture(scope="module")
def sessions() -> set[str]:
    command = [sys.executable, "-m", "nox", "--list"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(re.findall(r"^[*-] (\S+)", run.stdout, re.MULTILINE))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_step_is_a_make_target_or_a_nox_session(
    command: str, targets: set[str], sessions: set[str]
) -> None:
    match shlex.split(command):
        case ["make", target]:
            assert target in targets
        case ["nox", "-s", session]:
            assert session in sessions
        case _:
            pytest.fail(f"{command!r} is neither")


def test_make_calls_sessions_that_exist(sessions: set[str]) -> None:
    (names,) = re.findall(r"nox --session (.*)", (ROOT / "Makefile").read_text())
    assert set(names.split()) <= sessions
    for name in re.findall(r'nox -s "(.*?)"', (ROOT / ".ci" / "run").read_text()):
        assert name in sessions


def test_the_matrix_is_what_pyproject_claims(sessions: set[str]) -> None:
    project = PROJECT["project"]
    assert f">={PYTHONS[0]}" == project["requires-python"]
    matrix = WORKFLOWS["tests.yml"]["jobs"]["kernels"]["strategy"]["matrix"]
    assert matrix["python"] == PYTHONS
    found = {name for name in sessions if name.startswith("kernels")}
    assert found == {f"kernels-{p}({v})" for p in PYTHONS for v in matrix["versions"]}
    built = {name.split("-")[0] for name in PROJECT["tool"]["cibuildwheel"]["build"].split()}
    assert built == {f"cp{version.replace('.', '')}" for version in PYTHONS}
    (lowest,) = re.findall(r"torch>=(\S+)", " ".join(project["dependencies"]))
    assert f'"oldest": ["torch=={lowest}.' in (ROOT / "noxfile.py").read_text()


def test_pinned_tools_have_our_versions() -> None:
    text = "\n".join(path.read_text() for path in ROOT.glob(".github/workflows/*.yml"))
    assert set(re.findall(r"nox@(\S+)", text)) == {PINS["nox"]}
    assert set(re.findall(r"cibuildwheel@v(\S+)", text)) == {PINS["cibuildwheel"]}
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    found = dict(re.findall(r"\[([\w-]+)==(\S+)\]", hooks))
    assert found == {name: PINS[name] for name in ("ruff", "clang-format")}


def test_the_citation_names_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
