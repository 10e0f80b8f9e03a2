"""A training refuses folders that another program wrote, or leaves its files in place."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

for needed in ("sentence_transformers", "datasets", "torchvision", "accelerate"):
    pytest.importorskip(needed)

from llave import runs, sealing  # noqa: E402
from llave.checkpointing import CheckpointingTrainer  # noqa: E402
from llave.training import read_recipe, train  # noqa: E402
from llave_kernels import atomic_files  # noqa: E402
from tests.llave import tiny, train_worker  # noqa: E402
from tests.llave.test_training import contents  # noqa: E402


@pytest.mark.parametrize(
    "there",
    ["model/notes.txt", "checkpoint-4/notes.txt", "run.json", "eval/similarities-6.json"],
)
def test_what_another_wrote_is_refused_and_stays(tmp_path: Path, there: str) -> None:
    out = tmp_path / "run"
    (out / there).parent.mkdir(parents=True)
    (out / there).write_text("{}")
    with pytest.raises(ValueError, match=f"holds .*{there.split('/')[0]}.* this run did not write"):
        train_worker.train(str(out))
    assert contents(out) == {there: b"{}"} | {n: b"" for n in contents(out) if n == ".run.lock"}


def test_a_link_to_nowhere_is_anothers(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "model").symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match="this run did not write"):
        train_worker.train(str(out))
    assert not (tmp_path / "precious").exists()


def test_the_backbones_folder_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for part in tiny.llava_onevision():
        part.save_pretrained("model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "data").mkdir()
    before = contents(tmp_path)
    base = {"model.backbone": "./model", "trainer.output_dir": ".", "data.train": "data"}
    for changed in (
        {},
        {"model.backbone": "link"},
        {"model.backbone": str(tmp_path / "link" / ".." / "model")},
        {"trainer.output_dir": "model"},
        {"trainer.output_dir": "link/run"},
        {"trainer.output_dir": "data"},
        {"trainer.output_dir": "out", "data.images": "out/model"},
    ):
        settings = base | changed
        recipe = tmp_path.parent / f"{tmp_path.name}.yaml"
        recipe.write_text("model: {}\n")
        if "data.images" in settings:
            (tmp_path / "out" / "model").mkdir(parents=True)
        with pytest.raises(
            ValueError, match=r"the run would write into .*, and it reads (model|data)"
        ):
            train(read_recipe(str(recipe), given_words(settings)))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert contents(tmp_path) == before


def given_words(settings: dict[str, str]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


def test_what_appears_during_the_training_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    train_worker.die_at("step", 3, partial(place, out / "model" / "notes.txt"), monkeypatch.setattr)
    with pytest.raises(
        OSError, match=r"model could not be saved .*so .*/model-[0-9a-f]{8} was made"
    ):
        train_worker.train(str(out), "--trainer.max_steps", "4")
    assert contents(out / "model") == {"notes.txt": b"mine"}
    (beside,) = out.glob("model-*")
    assert (beside / "modules.json").exists()


def place(file: Path) -> None:
    file.parent.mkdir(parents=True)
    file.write_text("mine")


def test_a_link_at_a_temporary_name_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / f".run.{'0' * 32}.tmp").symlink_to("precious")

    class Known:
        hex = "0" * 32

    monkeypatch.setattr(atomic_files, "uuid4", Known)
    place = runs.workplace(tmp_path, "run")
    with pytest.raises(FileExistsError):
        atomic_files.new_folder(place)
    assert [path.is_symlink() for path in atomic_files.leftovers(place)] == [True]
    assert not contents(tmp_path / "precious")


@pytest.mark.parametrize("replaced", [False, True])
def test_a_removed_folder_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    out = tmp_path / "run"

    def remove() -> None:
        shutil.rmtree(out)
        if replaced:
            recipe = read_recipe("tiny", ["--trainer.output_dir", str(out)])
            runs.record(out, recipe, {"plus": 1})

    train_worker.die_at("step", 6, remove, monkeypatch.setattr)
    with pytest.raises(OSError, match="run' was removed or replaced while a run trained in it"):
        train_worker.train(str(out), "--trainer.eval_steps", "100")
    assert list(contents(out)) == (["run.json"] if replaced else [])


def test_a_folder_that_cannot_be_written_to_is_refused_before_the_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(train_worker.RECIPE % (tmp_path / "deep" / "run"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match=f"cannot be written to: {tmp_path} is read-only"):
        train(read_recipe(str(file)))
    assert list(tmp_path.iterdir()) == [file]


# Kills


def test_a_folder_that_cannot_take_its_place_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk refuses the second of the two renames."""
    target, place = tmp_path / "run" / "model", tmp_path / "run" / ".place"
    for folder, text in ((target, "before"), (place / "model", "after")):
        folder.mkdir(parents=True)
        (folder / "weights").write_text(text)
    trainer = SimpleNamespace(
        folder=tmp_path / "run", run="id", state=SimpleNamespace(global_step=2)
    )
    monkeypatch.setattr(runs, "seal", lambda *_: None)
    monkeypatch.setattr(runs, "wrote", lambda *_: True)
    monkeypatch.setattr(sealing, "problem", lambda *_: None)
    rename = Path.rename

    def refusing(self: Path, to: Path) -> Path:
        if self == place / "model":
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(OSError, match="no"):
        CheckpointingTrainer._publish(trainer, place, target)
    assert (target / "weights").read_text() == "before"
