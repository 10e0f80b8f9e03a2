"""Training after damage, signals, kills and a full disk, and beside files of other programs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

for needed in ("sentence_transformers", "datasets", "accelerate", "yaml", "torchvision"):
    pytest.importorskip(needed)

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from llave import runs, sealing  # noqa: E402
from llave.stopping import Stopped  # noqa: E402
from llave.trainer import EmbeddingTrainer  # noqa: E402
from llave_kernels.atomic_files import leftovers  # noqa: E402
from tests.llave import train_worker  # noqa: E402
from tests.llave.test_training import ROOT, contents, logged, words  # noqa: E402

EPOCHS = ("--trainer.eval_strategy", "epoch", "--trainer.eval_steps", "null")
LORA = ("--model.lora", "{r: 2, target_modules: [q_proj]}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of twelve steps."""
    out = tmp_path_factory.mktemp("durability") / "whole"
    train_worker.train(str(out))
    return out


class KilledError(Exception):
    """Stands for a kill. The process lives on."""


def killed(out: Path, point: str, times: int, *overrides: str) -> None:
    """Run until a point and end there as if killed."""

    def die() -> None:
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        # A kill would skip the cleanup.
        patch.setattr("llave.checkpointing._clear", lambda place: None)
        train_worker.die_at(point, times, die, patch.setattr)
        with pytest.raises((KilledError, OSError)):
            train_worker.train(str(out), *overrides)


def copied(run: Path, out: Path, *but: str) -> Path:
    shutil.copytree(run, out, ignore=shutil.ignore_patterns(*but))
    return out


# Files that another program wrote


def test_a_model_or_checkpoint_that_another_changed_is_kept(whole: Path, tmp_path: Path) -> None:
    longer = ("--trainer.max_steps", "14", "--trainer.save_total_limit", "1")
    model = copied(whole, tmp_path / "model")
    (model / "model" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt was not written with it; move it away"):
        train_worker.train(str(model), *longer)
    foreign = copied(whole, tmp_path / "foreign")
    sealing.seal(foreign / "checkpoint-4", run="another", step=4)
    with pytest.raises(ValueError, match="holds checkpoint-4, which this run did not write"):
        train_worker.train(str(foreign), *longer)
    own = copied(whole, tmp_path / "own")
    (own / "checkpoint-8" / "notes.txt").write_text("mine")
    train_worker.train(str(own), *longer)
    assert sorted(path.name for path in own.glob("checkpoint-*")) == [
        "checkpoint-14",
        "checkpoint-8",
    ]
    assert (own / "checkpoint-8" / "notes.txt").read_text() == "mine"
    assert sealing.facts(own / "model")["step"] == 14  # it replaces its own model


def test_what_a_killed_run_left_is_removed_by_its_next_start(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    killed(out, "seal", 2)
    left = leftovers(runs.workplace(out, sealing.facts(out / "checkpoint-4")["run"]))
    assert any((path / "checkpoint-8").exists() for path in left)
    (anothers := out / f".another.{'0' * 32}.tmp").mkdir()
    train_worker.train(str(out))
    assert not any(path.exists() for path in left)
    anothers.rmdir()  # the run has left it in place
    assert sorted(contents(out)) == sorted(contents(whole))
    assert logged(out) == logged(whole)


def test_a_run_waits_for_no_other_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with runs.alone(out):
            os.write(ready[1], b".")
            os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    monkeypatch.setattr(runs, "_PATIENCE", 0)
    try:
        with pytest.raises(ValueError, match=r"another process trains in trainer\.output_dir="):
            train_worker.train(str(out))
    finally:
        os.write(done[1], b".")
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("point", "times", "overrides"),
    [
        ("model", 1, ()),
        pytest.param("rename", 4, (), marks=pytest.mark.long),
        pytest.param("model", 1, ("--trainer.max_steps", "10", *LORA), marks=pytest.mark.long),
        ("rename", 3, ("--trainer.max_steps", "8", "--trainer.save_total_limit", "1", "best")),
        pytest.param(
            *("model", 1, ("--trainer.max_steps", "-1", "--trainer.num_train_epochs", "1.5")),
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_finished_checkpoint_only_gets_its_model_saved(
    tmp_path: Path, point: str, times: int, overrides: tuple[str, ...]
) -> None:
    if "--model.lora" in overrides:
        pytest.importorskip("peft")
    if overrides[-1:] == ("best",):  # the first model is best, so the last checkpoint differs
        best = {"load_best_model_at_end": "true", "metric_for_best_model": "plus_positive_mean"}
        best |= {"greater_is_better": "true", "eval_steps": "4"}
        overrides = (*overrides[:-1], *words(best))
    first, second = tmp_path / "first", tmp_path / "second"
    train_worker.train(str(first), *overrides)
    killed(second, point, times, *overrides)
    assert not (second / "model").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmbeddingTrainer, "training_step", None)  # a step would fail
        train_worker.train(str(second), *overrides)
    assert contents(second / "model") == contents(first / "model")
    assert sorted(contents(second)) == sorted(contents(first))


def test_a_kill_between_the_renames_of_models_leaves_one(whole: Path, tmp_path: Path) -> None:
    out = copied(whole, tmp_path / "run")
    longer = ("--trainer.max_steps", "16")
    killed(out, "replaced", 1, *longer)
    assert not (out / "model").exists()
    run = json.loads((out / "run.json").read_text())["run"]
    there = runs.take_up(out, best=False)
    assert (there["run"], there["saved"]) == (run, 16)
    assert sealing.problem(out / "model") is None
    assert not list(out.glob(".*.tmp"))


@pytest.mark.long
def test_a_short_drill(tmp_path: Path) -> None:
    """The drill runs in its own process, because a fork of one that ran autograd cannot train."""
    command = [sys.executable, "-m", "tests.drills", "train", "--kills", "4"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("train: 4 kills, every run ended with the same files")


# Damage


def damage(file: Path, kind: str, place: float) -> None:
    content = file.read_bytes()
    at = int(place * len(content))
    if kind == "missing":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(content[:at])
    elif kind == "longer":
        file.write_bytes(content + b"\0")
    elif kind == "link":
        file.rename(file.with_name("elsewhere"))
        file.symlink_to("elsewhere")
    elif kind == "extra":
        (file.parent / "extra").touch()
    else:
        flipped = bytes([content[at] ^ (1 << int(kind))])
        file.write_bytes(content[:at] + flipped + content[at + 1 :])


KINDS = st.sampled_from(["missing", "cut", "longer", "link", "extra", *"01234567"])


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_damage_of_a_checkpoint_is_noticed(
    whole: Path, tmp_path: Path, data: st.DataObject
) -> None:
    out = tmp_path / "run"
    shutil.rmtree(out, ignore_errors=True)
    copied(whole, out, "checkpoint-4", "model")
    files = sorted(path for path in (out / "checkpoint-12").rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    damage(file, data.draw(KINDS), data.draw(st.floats(0, 1, exclude_max=True)))
    before = contents(out / "checkpoint-12")
    found, (line,) = runs.newest(out)
    assert found == out / "checkpoint-8"
    assert line.startswith(f"{out / 'checkpoint-12'} is passed over: ")
    (aside,) = out.glob("*-checkpoint-12-*")
    assert line.endswith(f"it is kept as {aside.name}")
    assert contents(aside) == before


def test_a_run_goes_on_from_before_a_damaged_checkpoint(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(whole, tmp_path / "run", "model")
    for step in (12, 8):
        damage(out / f"checkpoint-{step}" / "optimizer.pt", "3", 0.5)
    train_worker.train(str(out))
    said = capsys.readouterr().out
    for step in (12, 8):
        assert f"checkpoint-{step} is passed over: optimizer.pt has other contents than" in said
    assert logged(out) == logged(whole)
    assert contents(out / "model") == contents(whole / "model")
    assert len(list(out.glob("damaged-checkpoint-*"))) == 2


def test_a_damaged_best_checkpoint_is_made_again(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": "true", "metric_for_best_model": "plus_positive_mean"}
    best |= {"greater_is_better": "true", "eval_steps": "4"}
    first, second = tmp_path / "first", tmp_path / "second"
    train_worker.train(str(first), *words(best))
    state = json.loads((first / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 4
    copied(first, second, "model")
    damage(second / "checkpoint-4" / "model.safetensors", "0", 0.9)
    train_worker.train(str(second), *words(best))
    assert contents(second / "model") == contents(first / "model")
    assert logged(second) == logged(first)


def test_a_damaged_model_of_a_finished_run_is_named(whole: Path, tmp_path: Path) -> None:
    out = copied(whole, tmp_path / "run")
    damage(out / "model" / "model.safetensors", "5", 0.7)
    with pytest.raises(ValueError, match=r"model\.safetensors has other contents .* move it away"):
        train_worker.train(str(out))


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(bit=st.integers(0, 7), place=st.floats(0, 1, exclude_max=True))
def test_a_damaged_record_is_named(whole: Path, tmp_path: Path, bit: int, place: float) -> None:
    out = tmp_path / "run"
    out.mkdir(exist_ok=True)
    shutil.copy(whole / "run.json", out)
    before = runs._read(out)
    damage(out / "run.json", str(bit), place)
    try:
        found = runs._read(out)
    except ValueError as error:
        found = str(error)
    assert found == before or found.startswith(f"{out / 'run.json'} is damaged")


def test_a_run_from_before_runs_had_ids_goes_on(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(whole, tmp_path / "run", "model", "seal.json", "progress.json")
    there = runs._read(out)
    for name in ("run", "models"):
        del there[name]
    (out / "run.json").write_text(json.dumps(there | {"finished": 0}))
    damage(out / "checkpoint-12" / "optimizer.pt", "3", 0.5)
    train_worker.train(str(out))
    assert "checkpoint-12 is passed over" in capsys.readouterr().out
    assert sealing.problem(out / "checkpoint-8") is None
    assert logged(out) == logged(whole)


# Signals


@pytest.mark.parametrize(
    ("number", "step", "overrides"),
    [
        (signal.SIGINT, 5, ()),
        pytest.param(
            *(signal.SIGTERM, 6, ("--trainer.logging_steps", "4", *EPOCHS)), marks=pytest.mark.long
        ),
        pytest.param(
            *(signal.SIGTERM, 7, ("--trainer.save_strategy", "no", *EPOCHS)), marks=pytest.mark.long
        ),
    ],
)
def test_a_stopped_run_keeps_a_checkpoint_and_goes_on(
    tmp_path: Path, number: signal.Signals, step: int, overrides: tuple[str, ...]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train_worker.train(str(first), *overrides)
    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        train_worker.die_at("step", step, partial(signal.raise_signal, number), patch.setattr)
        with pytest.raises(Stopped) as stopped:
            train_worker.train(str(second), *overrides)
    assert stopped.value.number == number
    assert signal.getsignal(number) == before
    assert sealing.problem(second / f"checkpoint-{step}") is None
    assert not (second / "model").exists()
    train_worker.train(str(second), *overrides)
    assert contents(second / "model") == contents(first / "model")
    assert history(second) == history(first)


def history(out: Path) -> list[dict[str, float]]:
    """The log without durations."""
    file = out / "checkpoint-12" / "trainer_state.json"
    rows = json.loads(file.read_text())["log_history"] if file.exists() else []
    return [
        {key: x for key, x in row.items() if not re.search("runtime|second", key)} for row in rows
    ]


# A full disk


@pytest.mark.parametrize(
    "file",
    [
        pytest.param("tokenizer.json", marks=pytest.mark.long),
        "model.safetensors",
        pytest.param("optimizer.pt", marks=pytest.mark.long),
    ],
)
def test_a_full_disk_is_one_line_and_the_command_goes_on(
    whole: Path, tmp_path: Path, file: str
) -> None:
    resource = pytest.importorskip("resource")
    out = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (whole / "checkpoint-4" / file).stat().st_size - 1
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, limits[1]))
    with pytest.MonkeyPatch.context() as patch:
        train_worker.die_at("step", 6, full, patch.setattr)
        try:
            with pytest.raises(
                OSError, match=r"checkpoint-8 could not be saved \(.*stays, and the"
            ):
                train_worker.train(str(out), "--trainer.eval_steps", "100")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in out.glob("*checkpoint-*")] == ["checkpoint-4"]
    assert not list(out.glob(".*.tmp"))
    train_worker.train(str(out), "--trainer.eval_steps", "100")
    assert list(logged(out)) == list(range(1, 13))
