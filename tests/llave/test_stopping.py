"""A signal ends a command with a one-line message. No work is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

for needed in ("sentence_transformers", "datasets", "torchvision"):
    pytest.importorskip(needed)

from llave import cli  # noqa: E402
from llave.stopping import Stopped, stoppable  # noqa: E402
from tests import drills  # noqa: E402
from tests.drills import embed, evaluate  # noqa: E402

ROOT = Path(__file__).parents[2]


def finished(path: Path) -> bool:
    return path.suffix in (".json", ".parquet")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("made", [embed, evaluate])
def test_a_stopped_command_goes_on(tmp_path: Path, made: object, number: int) -> None:
    arguments = made.arguments(tmp_path)  # type: ignore[attr-defined]
    out, log = tmp_path / "out", tmp_path / "log"
    process = drills.start(arguments(out), log)
    while process.is_alive() and not any(map(finished, out.glob("*"))):
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.join(drills.LIMIT)
    said = log.read_text()
    if process.exitcode:  # 0 if it had already ended
        assert process.exitcode == 128 + number
        last = said.strip().splitlines()[-1]
        assert last == f"llave {arguments(out)[0]}: stopped; the same command goes on"
    assert "Traceback" not in said
    files = {name: held for name, held in drills.contents(out).items() if "/" not in name}
    kept = {name: held for name, held in files.items() if finished(Path(name))}
    drills.finish(arguments(out), log, out)
    assert kept.items() <= drills.contents(out).items()
    drills.finish(arguments(tmp_path / "whole"), log, tmp_path / "whole")
    assert drills.contents(out) == drills.contents(tmp_path / "whole")


@pytest.mark.parametrize("becomes", [None, RuntimeError, SystemError, ImportError])
def test_the_status_is_the_signal_s_whatever_a_library_makes_of_it(
    becomes: type[Exception] | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*_: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Stopped:
            if becomes is None:
                raise
            raise becomes("something else") from None

    monkeypatch.setattr(cli, "_search", run)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["search", "folder", "query", "--model", "model"]) == 143
    assert capsys.readouterr().err == "llave search: stopped\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_in_a_finaliser_is_heard(capfd: pytest.CaptureFixture[str]) -> None:
    class Final:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)
            sum(range(10))  # Python handles signals between instructions

    def wait() -> None:
        final = Final()
        del final
        time.sleep(30)

    with pytest.raises(Stopped), stoppable():
        wait()
    assert capfd.readouterr().err == ""


def test_one_request_may_be_told_twice() -> None:
    def work() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGTERM)  # from torchrun, during cleanup

    with pytest.raises(Stopped) as stopped, stoppable():
        work()
    assert stopped.value.number == signal.SIGINT


@pytest.mark.parametrize(("size", "unbuffered"), [(10, ""), (100_000, "1")])
def test_nobody_reads_the_output(size: int, unbuffered: str) -> None:
    program = (
        f"import sys; from llave import cli; cli._search = lambda *_: print('x' * {size})\n"
        "sys.exit(cli.main(['search', 'folder', 'query', '--model', 'model']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdout=writer,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        text=True,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_takes_no_output() -> None:
    program = (
        "import sys; from llave import cli; cli._search = lambda *_: print('x')\n"
        "sys.exit(cli.main(['search', 'folder', 'query', '--model', 'model']))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr == "llave search: error: [Errno 28] No space left on device\n"
