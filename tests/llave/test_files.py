"""Errors name files. Names from data stay on one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("safetensors")

from llave import files
from llave.files import create, publish, read_json, regular
from llave.printable import shown


@given(st.text(st.characters(exclude_categories=())))
def test_a_name_is_shown_on_one_line(name: str) -> None:
    said = shown(name)
    assert said.isprintable()
    if name.isprintable():
        assert said == name


def test_what_a_terminal_acts_on_is_escaped() -> None:
    assert shown("a\x1b[2J\r\nb\u202ec\u2028\x9b\x00") == (r"a\x1b[2J\r\nb\u202ec\u2028\x9b\x00")
    assert shown("x" * 5000) == "x" * 1000 + "..."
    assert shown(Path("möve/猫.png")) == "möve/猫.png"


@pytest.mark.parametrize("make", [publish, create])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, make: Any) -> None:
    def fill(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "there").write_text("mine")
    with pytest.raises(OSError, match=r"there cannot be written \(No space left") as error:
        make(tmp_path / "there", fill)
    assert error.value.errno == errno.ENOSPC
    assert "\n" not in str(error.value)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    "contents", [b"", b"{", b"\xff", b"[]", b"3", b"null", b"[" * 100_000, b"1" * 5000]
)
def test_json_that_cannot_be_used_is_named(tmp_path: Path, contents: bytes) -> None:
    file = tmp_path / "some.json"
    file.write_bytes(contents)
    with pytest.raises(ValueError, match=r"^[^\n]*some\.json cannot be read[^\n]*$"):
        read_json(file)


def test_nothing_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="not a regular file"):
            regular(path)
    with pytest.raises(ValueError, match="pipe' is a FIFO"):
        files.refuse_pipes(tmp_path)
