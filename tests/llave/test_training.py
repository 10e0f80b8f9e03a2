"""Recipes, resuming, several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("sentence_transformers", "datasets", "accelerate", "yaml", "torchvision"):
    pytest.importorskip(needed)

from sentence_transformers import SentenceTransformer  # noqa: E402

from llave.mmeb import TASKS  # noqa: E402
from llave.training import SECTIONS, last_checkpoint, read_recipe  # noqa: E402

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p.stem for p in (ROOT / "llave" / "recipes").glob("*.yaml"))


def run(
    out: Path,
    *overrides: str,
    kill_at: int = 0,
    processes: int = 1,
    worker: str = "train_worker",
) -> None:
    """A worker trains in a process, or several, of its own, and ends or is killed as it should."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    command = [*launcher, f"tests.llave.{worker}", str(out), str(kill_at), *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=out.parent, env=environment, capture_output=True, text=True, check=False
    )
    # torchrun's own code where a process was killed is 1.
    killed = -signal.SIGKILL if processes == 1 else 1
    assert done.returncode == (killed if kill_at else 0), done.stderr


def logged(out: Path, key: str = "loss") -> dict[int, float]:
    state = json.loads((out / "checkpoint-12" / "trainer_state.json").read_text())
    return {row["step"]: row[key] for row in state["log_history"] if key in row}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "whole"
    run(out)
    return out


def test_losses_fall_and_the_overlap_is_logged(uninterrupted: Path) -> None:
    losses = logged(uninterrupted)
    assert list(losses) == list(range(1, 13))
    assert losses[12] < 0.8 * losses[1]
    overlap = logged(uninterrupted, "eval_similarity_overlap")
    assert list(overlap) == [6, 12]
    assert all(0 <= value <= 1 for value in overlap.values())
    for step in overlap:  # eight pairs of each subset are held out
        found = json.loads((uninterrupted / "eval" / f"similarities-{step}.json").read_text())
        assert set(found) == {"plus", "minus"}
        for counts in found.values():
            assert sum(counts["positives"]) == 8
            assert sum(counts["negatives"]) == 56
    assert (uninterrupted / "model" / "modules.json").exists()


def test_the_saved_model_takes_another_length(uninterrupted: Path) -> None:
    model = SentenceTransformer(str(uninterrupted / "model"), device="cpu")
    model.max_seq_length = 200
    assert model.preprocess(["one and two " * 99])["input_ids"].shape[1] == 200


def test_a_killed_run_goes_on_with_the_same_losses(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    run(out, kill_at=7)
    # As if it had been killed once more, in the middle of a checkpoint.
    half = out / "checkpoint-6"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (out / "model").mkdir()
    (out / "model" / "of_an_earlier_run").touch()
    run(out)
    assert logged(out) == pytest.approx(logged(uninterrupted), rel=1e-6)
    assert (out / "model" / "modules.json").exists()
    assert not (out / "model" / "of_an_earlier_run").exists()
    assert not list(out.glob(".model*"))


def test_two_processes_have_the_losses_of_one(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    run(out, processes=2)
    assert logged(out) == pytest.approx(logged(uninterrupted), rel=1e-3)


def test_checkpoints_without_an_end_are_set_aside(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, text in ((4, '{"global_step": 4}'), (8, '{"global_st'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert len(list(tmp_path.glob("unfinished-*"))) == 2


@pytest.mark.parametrize("name", RECIPES)
def test_our_recipes_are_whole(name: str) -> None:
    recipe = read_recipe(name)
    assert set(recipe) == set(SECTIONS)
    assert recipe["loss"]["scale"] == 50.0
    assert recipe["loss"]["alpha"] == 9.0
    if name != "tiny":
        # MMEB's training subsets have the evaluation's names, but for one.
        known = [task.replace("ImageNet-1K", "ImageNet_1K") for task in TASKS]
        assert recipe["data"]["subsets"] == [
            name for name, task in zip(known, TASKS.values(), strict=True) if task.in_distribution
        ]


def test_overrides_are_read_as_yaml() -> None:
    recipe = read_recipe("tiny", ["--loss.alpha", "0", "--trainer.learning_rate", "2.0e-5"])
    assert recipe["loss"]["alpha"] == 0
    assert recipe["trainer"]["learning_rate"] == 2e-5
    assert read_recipe("tiny", ["--model.frozen", "null"])["model"]["frozen"] is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--loss.alhpa", "5"], "loss.alhpa of tiny is no setting; there are scale, alpha"),
        (["--optim.lr", "5"], "section 'optim' of tiny is none of model, data, loss, trainer"),
        (["--alpha", "5"], "'--alpha' is no override; expected --section.setting"),
        (["--loss.alpha"], "overrides come in pairs"),
        (["--model.backbone", "x"], "needs one of backbone and scratch"),
        (["--data.train", "null"], "data.train of tiny is missing"),
    ],
)
def test_what_a_recipe_may_not_say(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_recipe("tiny", overrides)
    with pytest.raises(FileNotFoundError, match=r"no recipe 'huge'; there are llave-0\.5b"):
        read_recipe("huge")
