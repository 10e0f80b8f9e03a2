"""Training: resuming, several processes, finished runs, runs with other settings."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

import pytest

for needed in ("sentence_transformers", "datasets", "accelerate", "yaml", "torchvision"):
    pytest.importorskip(needed)

import numpy as np  # noqa: E402
from datasets import Dataset  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402

from llave import runs, training  # noqa: E402
from llave.epochs import unused_rows  # noqa: E402
from llave.training import (  # noqa: E402
    SimilarityOverlap,
    last_checkpoint,
    read_recipe,
    train,
)
from tests import forks  # noqa: E402
from tests.llave import train_worker  # noqa: E402
from tests.llave.test_evaluation import Fake  # noqa: E402

ROOT = Path(__file__).parents[2]


def run(
    out: Path,
    *overrides: str,
    kill: str = "none",
    processes: int = 1,
    worker: Callable[..., None] = train_worker.main,
) -> None:
    """Run a worker in one or several processes. It must end, or be killed, as expected."""
    places: list[dict[str, str]] = forks.group(processes) if processes > 1 else [{}]
    logs = [out.with_suffix(f".{rank}.log") for rank in range(processes)]
    running = [
        forks.start(worker, str(out), kill, *overrides, log=log, folder=out.parent, **place)
        for log, place in zip(logs, places, strict=True)
    ]
    wait([process.sentinel for process in running])
    if any(process.exitcode for process in running):
        for process in running:  # torchrun ends the others too
            process.kill()
    for process in running:
        process.join()
    found = {process.exitcode for process in running}
    assert found == {0 if kill == "none" else -signal.SIGKILL}, [log.read_text() for log in logs]


def torchrun(out: Path, kill: str = "none") -> None:
    """Run the worker in two processes under torchrun. A process gets a signal, or both end."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node=2", "-m", "tests.llave.train_worker", str(out), kill),
        ],
        cwd=out.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (kill != "none"), done.stderr


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
    run(out, kill="step:7")
    # Such a folder is left when a run is killed while it writes a checkpoint.
    half = out / "checkpoint-6"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    run(out)
    assert logged(out) == logged(uninterrupted)
    assert contents(out / "model") == contents(uninterrupted / "model")
    assert not list(out.glob(".*.tmp"))
    (aside,) = out.glob("unfinished-*")
    assert contents(aside) == {"model.safetensors": b"half"}


@pytest.mark.long
def test_two_processes_have_the_losses_of_one(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "two"
    torchrun(out, "step:10:SIGTERM:1")  # one gets the signal, both stop
    assert (out / "checkpoint-10").exists()
    damaged = out / "checkpoint-10" / "rng_state_1.pth"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    torchrun(out)  # both take the checkpoint before
    assert logged(out) == pytest.approx(logged(uninterrupted), rel=1e-3)
    assert len(list(out.glob("damaged-checkpoint-10-*"))) == 1
    assert not list(out.glob(".*.tmp"))


def test_checkpoints_without_an_end_are_set_aside(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, text in ((4, '{"global_step": 4}'), (8, '{"global_st'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert len(list(tmp_path.glob("unfinished-*"))) == 2


# Settings of the loss, the data and the trainer.
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--loss.alpha", "5"), r"loss\.alpha is 9\.0 there and 5\.0 here"),
        (("--trainer.learning_rate", "2e-3"), r"trainer\.learning_rate is 0\.001 there and 0\.002"),
        (("--trainer.save_steps", "3"), r"trainer\.save_steps is 4\.0 there and 3\.0 here"),
        (("--trainer.seed", "7"), r"trainer\.seed is 42 there and 7 here"),
        (("--data.held_out", "10"), r"data\.held_out is 8 there and 10 here"),
        (("--model.frozen", "vision"), r"model\.frozen is None there and 'vision' here"),
        (("--data.subsets", "[plus]"), r"rows\.minus is 56 there and None here"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(
    uninterrupted: Path, overrides: tuple[str, ...], message: str
) -> None:
    before = contents(uninterrupted)
    with pytest.raises(ValueError, match=f"whole' holds a run with other settings: .*{message}"):
        train_worker.train(str(uninterrupted), *overrides)
    assert contents(uninterrupted) == before


def test_a_run_is_recorded_without_its_secrets(tmp_path: Path) -> None:
    recipe = read_recipe("tiny", ["--trainer.push_to_hub", "true", "--trainer.hub_token", "hf_x"])
    runs.record(tmp_path, recipe, {"plus": 56})
    assert "hf_x" not in (tmp_path / runs.RECORD).read_text()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "killed before the model was"])
def test_a_finished_run_is_not_trained_again(
    uninterrupted: Path, tmp_path: Path, saved: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again"
    shutil.copytree(uninterrupted, out)
    expected = SentenceTransformer(str(out / "model"), device="cpu").encode(["one and two"])
    if not saved:
        shutil.rmtree(out / "model")
    before = contents(out)
    for _ in range(2):
        model = train_worker.train(str(out))
        assert "holds a finished run" in capsys.readouterr().out
        np.testing.assert_allclose(model.encode(["one and two"]), expected, atol=1e-6)
        found = SentenceTransformer(str(out / "model"), device="cpu").encode(["one and two"])
        np.testing.assert_allclose(found, expected, atol=1e-6)
    after = contents(out)
    assert sorted(after) == sorted(contents(uninterrupted))
    assert {name: after[name] for name in before} == before


def test_a_finished_run_of_whole_epochs_and_adapters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    out, lora = tmp_path / "run", ("--model.lora", "{r: 2, target_modules: [q_proj]}")
    epochs = ("--trainer.max_steps", "-1", "--trainer.num_train_epochs", "1.5", *lora)
    first = train_worker.train(str(out), *epochs).encode(["one and two"])
    before = contents(out)
    again = train_worker.train(str(out), *epochs).encode(["one and two"])
    np.testing.assert_allclose(again, first, atol=1e-6)
    assert contents(out) == before
    # With more steps than before the run goes on, and says so.
    train_worker.train(str(out), *lora, "--trainer.max_steps", "12")
    said = capsys.readouterr().out
    assert "goes on with other settings: trainer.max_steps is -1 there and 12 here" in said
    assert list(logged(out)) == list(range(1, 13))


def test_checkpoints_without_an_optimizer_are_no_place_to_go_on(tmp_path: Path) -> None:
    out, bare = tmp_path / "run", ("--trainer.save_only_model", "true")
    train_worker.train(str(out), *bare, "--trainer.max_steps", "4")
    train_worker.train(str(out), *bare, "--trainer.max_steps", "4")
    with pytest.raises(ValueError, match="checkpoint-4 has no state of the optimizer"):
        train_worker.train(str(out), *bare, "--trainer.max_steps", "8")


def test_the_best_model_is_the_one_of_least_overlap(tmp_path: Path) -> None:
    out = tmp_path / "run"
    best = {"load_best_model_at_end": "true", "metric_for_best_model": "similarity_overlap"}
    best |= {"greater_is_better": "false", "save_steps": "6"}
    words = [word for key, value in best.items() for word in (f"--trainer.{key}", value)]
    train_worker.train(str(out), *words)
    state = json.loads((out / "checkpoint-12" / "trainer_state.json").read_text())
    overlap = logged(out, "eval_similarity_overlap")
    assert state["best_metric"] == min(overlap.values())


def test_a_finished_run_may_lack_its_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, end = tmp_path / "run", {"max_steps": "4", "save_steps": "2", "eval_steps": "2"}
    # The first model is the best. Only its checkpoint is kept.
    best = {"load_best_model_at_end": "true", "metric_for_best_model": "similarity_overlap"}
    best |= {"greater_is_better": "true", "save_total_limit": "1"} | end
    words = [word for key, value in best.items() for word in (f"--trainer.{key}", value)]
    first = train_worker.train(str(out), *words).encode(["one and two"])
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    before = contents(out)
    again = train_worker.train(str(out), *words).encode(["one and two"])
    assert "run holds a finished run" in capsys.readouterr().out
    np.testing.assert_allclose(again, first, atol=1e-6)
    assert contents(out) == before


def test_the_best_model_is_that_of_a_metric_there_is(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": "true", "metric_for_best_model": "accuracy"}
    best |= {"greater_is_better": "true", "save_steps": "6"}
    words = [word for key, value in best.items() for word in (f"--trainer.{key}", value)]
    with pytest.raises(ValueError, match="='accuracy' is none of similarity_overlap, plus_similar"):
        train_worker.train(str(tmp_path / "run"), *words)


def test_prompts_are_of_subsets_or_columns_there_are(tmp_path: Path) -> None:
    prompts = ("--trainer.prompts", "{plus: a, anchor: b, query: c}")
    with pytest.raises(ValueError, match=r"trainer\.prompts names query, which is neither"):
        train_worker.train(str(tmp_path / "run"), *prompts)


def test_a_model_without_a_checkpoint_is_kept(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "bare"
    shutil.copytree(uninterrupted / "model", out / "model")
    with pytest.raises(ValueError, match="bare' holds a model and no checkpoint"):
        train_worker.train(str(out))


def test_what_trains_nothing_is_an_error(tmp_path: Path) -> None:
    for mixed in ("true", "false"):
        with pytest.raises(ValueError, match=r"data\.batch_size=128: nothing would be trained"):
            train_worker.train(
                str(tmp_path / "run"), "--data.batch_size", "128", "--data.homogeneous", mixed
            )
        assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(ValueError, match=r"held_out=64 leaves nothing of subset plus, .* 64 rows"):
        train_worker.train(str(tmp_path / "run"), "--data.held_out", "64")
    with pytest.raises(ValueError, match=r"frozen='\.' is in every trained parameter's name"):
        train_worker.train(str(tmp_path / "run"), "--model.frozen", "'.'")


def test_a_sampler_that_makes_no_batch_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = Dataset.from_dict({"anchor": ["one and two"] * 64, "positive": ["one plus two"] * 64})
    monkeypatch.setattr(train_worker, "subsets", lambda: {"plus": same})
    settings = {"data.subsets": "[plus]", "trainer.batch_sampler": "no_duplicates"}
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    with pytest.raises(ValueError, match=r"nothing was trained: .*no_duplicates made no batch"):
        train_worker.train(str(tmp_path / "run"), *words)
    assert not (tmp_path / "run" / "model").exists()


def test_rows_that_never_appear_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_worker.train(str(tmp_path / "run"), "--trainer.max_steps", "1", "--data.held_out", "10")
    said = capsys.readouterr().out
    for name in ("plus", "minus"):
        assert f"{name}: 6 of 54 rows never appear; an epoch, which draws anew, has 3 whole" in said
    drawn = "an epoch, which draws anew, has {} whole batches of 16"
    rows = {"large": 40, "small": 15, "even": 32}
    assert unused_rows(rows, 16, homogeneous=True) == [
        f"large: 8 of 40 rows never appear; {drawn.format(2)}",
        "small: 15 of 15 rows never appear; they make no whole batch of 16",
    ]
    assert unused_rows(rows, 16, homogeneous=False) == [
        f"all subsets: 7 of 87 rows never appear; {drawn.format(5)}"
    ]
    assert unused_rows({"a": 40, "b": 16}, 16, homogeneous=True, round_robin=True) == [
        f"a: 24 of 40 rows never appear; {drawn.format(1)}"
    ]
    with pytest.raises(ValueError, match="nothing would be trained"):
        unused_rows(rows, 16, homogeneous=True, round_robin=True)


def test_what_cannot_be_had_here_is_refused_before_the_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "available_backends", lambda: {"cuda": "no GPU"})
    file = tmp_path / "recipe.yaml"
    file.write_text(train_worker.RECIPE % (tmp_path / "run"))
    wrong = (
        (["--data.images", "nowhere"], r"data\.images='nowhere' is no folder"),
        (["--loss.backend", "cuda"], r"loss\.backend='cuda' cannot run here: no GPU"),
    )
    for overrides, message in wrong:
        with pytest.raises(ValueError, match=message):
            train(read_recipe(str(file), overrides))


def words(settings: dict[str, str], section: str = "trainer") -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{section}.{key}", value)]


class Numbers(Fake):
    """Embeds a number as an angle in degrees."""

    def vector(self, item: str) -> np.ndarray:
        angle = np.deg2rad(float(item))
        return np.stack([np.cos(angle), np.sin(angle)])


def test_a_copy_of_the_positive_is_no_negative_of_the_overlap(tmp_path: Path) -> None:
    pairs = {"anchor": ["0", "1", "90"], "positive": ["0", "0", "90"]}
    SimilarityOverlap({"x": Dataset.from_dict(pairs)})(Numbers(), str(tmp_path))
    found = json.loads((tmp_path / "similarities--1.json").read_text())["x"]
    assert (sum(found["positives"]), sum(found["negatives"])) == (3, 4)


def test_an_overlap_of_embeddings_that_are_not_finite_is_refused() -> None:
    pairs = {"anchor": ["0", "1"], "positive": ["0", "nan"]}
    with pytest.raises(ValueError, match="subset x, held-out positive 1: the embedding is not fin"):
        SimilarityOverlap({"x": Dataset.from_dict(pairs)})(Numbers())
