"""git ignores what the README's commands write. make clean removes the examples' part of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
# The default outputs of commands that the README shows without --out.
DEFAULTS = {"make bench": "bench-results", "sweep.py emoji": "emoji-results"}
DEFAULTS |= {"finetune_docstrings.py": "finetune-results", "llave evaluate": "results"}
# Where a command names its output.
NAMED = (
    r"--out (\S+)",
    r"--local-dir (\S+)",
    r"build\.py (\S+)",
    r"llave train (\S+)",
    r"unzip .* -d (\S+)",
    r"llave convert \S+ (\S+)",
    r"hf download \S+ ([\w.]+\.zip)",
)
# Files of the user, and results that are committed.
OTHERS = ("benchmarks/", "examples/", ".", "NAME")


def outputs() -> set[str]:
    found = {name for command, name in DEFAULTS.items() if command in README}
    for _, block in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE):
        for pattern in NAMED:
            found |= set(re.findall(pattern, block))
    found |= {f"llave-{size}" for size in re.findall(r"\bllave-(\d\.?\d?b)\b", README)}
    return {name for name in found if name not in OTHERS and not name.startswith(OTHERS[:2])}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@pytest.mark.parametrize("name", sorted(outputs()))
def test_git_ignores_what_commands_write(name: str) -> None:
    path = name if Path(name).suffix == ".zip" else f"{name}/file"
    done = subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT, check=False)
    assert done.returncode == 0, path


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_clean_removes_the_examples_outputs_and_leaves_the_rest(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (examples,) = re.findall(r"^EXAMPLES := (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(examples.split()) >= {"emoji", "tiny", "vectors", "bench-results"}
    gone = [*examples.split(), "build", "dist", "llave.egg-info", ".venv", ".nox"]
    kept = ["results", "llave-0.5b", "LLaVE-0.5B", "mine", "llave_kernels", "examples/emoji"]
    for name in (*gone, *kept):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "file").touch()
    extension = tmp_path / "llave_kernels" / "_cuda.cpython-310-x86_64-linux-gnu.so"
    extension.touch()
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert not [name for name in gone if (tmp_path / name).exists()]
    assert not extension.exists()
    assert [name for name in kept if (tmp_path / name / "file").exists()] == kept
