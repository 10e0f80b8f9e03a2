"""``llave train --dry-run``: what it says is what a training does, and it writes nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

for needed in ("sentence_transformers", "datasets", "accelerate", "yaml", "torchvision"):
    pytest.importorskip(needed)

from llave import dry_run, yaml12  # noqa: E402
from llave.cli import main  # noqa: E402
from llave.dry_run import Memory, memory, skeleton, total_steps  # noqa: E402
from llave.recipe import read_recipe  # noqa: E402
from llave.training import build_model, prepare  # noqa: E402
from tests.llave import tiny  # noqa: E402
from tests.llave.train_worker import RECIPE  # noqa: E402


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for name, count in (("plus", 45), ("minus", 30)):
        rows = [
            {"qry": f"{n} and", "qry_image_path": "", "pos_text": f"{n}!", "pos_image_path": ""}
            for n in range(count)
        ]
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "recipe.yaml"
    file.write_text((RECIPE % (tmp_path / "out")).replace("train: none", f"train: {tmp_path}/data"))
    return file


def names(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def test_it_says_what_a_training_does(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model.frozen", "vision_tower", "--trainer.max_steps", "-1"]
    words += ["--trainer.num_train_epochs", "3", "--data.held_out", "5"]
    before = names(tmp_path)
    assert main(["train", str(recipe_file), "--dry-run", *words]) == 0
    assert names(tmp_path) == before
    said = capsys.readouterr().out
    recipe = read_recipe(str(recipe_file), words)
    assert yaml12.load(said, "what was printed") == recipe  # the rest are comments
    arguments, subsets = prepare(recipe)
    model = build_model(recipe["model"], ["one"] * 9, seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    assert trained < whole
    for line in (
        "rows of plus: 40",
        "rows of minus: 25",
        "plus: 8 of 40 rows never appear",
        "steps: 9 of 16 pairs each; an epoch has 3 batches",
        f"parameters: {trained:,} trained of {whole:,}",
        "memory per device, expected: ",
    ):
        assert f"# {line}" in said
    assert total_steps(3, arguments) == 9
    assert {name: len(subset) for name, subset in subsets.items()} == {"plus": 45, "minus": 30}


def test_what_a_training_would_refuse_is_refused(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe_file), "--dry-run", "--data.batch_size", "100"]) == 2
    assert "nothing would be trained, there is no whole batch" in capsys.readouterr().err


def test_a_backbone_is_counted_without_its_weights(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    for part in tiny.llava_onevision():
        part.save_pretrained(tmp_path / "backbone")
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    recipe = read_recipe(str(recipe_file))
    recipe["model"] |= {"scratch": None, "backbone": str(tmp_path / "backbone"), "lora": lora}
    expected = build_model(recipe["model"], [], seed=0)
    (tmp_path / "backbone" / "model.safetensors").unlink()
    found = skeleton(recipe, seed=0)
    assert {p.device.type for p in found.parameters()} == {"meta"}
    for chosen in (lambda p: p.requires_grad, lambda _: True):
        assert sum(p.numel() for p in found.parameters() if chosen(p)) == sum(
            p.numel() for p in expected.parameters() if chosen(p)
        )


def settings(**changed: Any) -> Any:
    plain: dict[str, Any] = {"fsdp": [], "deepspeed": None, "world_size": 4, "bf16": False}
    plain |= {"fp16": False, "gradient_checkpointing": False, "optim": "adamw_torch"}
    made = SimpleNamespace(**plain | changed)
    made.to_dict = lambda: {"optim": made.optim}
    made.hf_deepspeed_config = SimpleNamespace(get_value=lambda *_: changed.get("stage"))
    return made


def test_memory_is_shared_as_the_trainer_shards_it(recipe_file: Path) -> None:
    recipe = read_recipe(str(recipe_file), ["--model.frozen", "vision_tower"])
    backbone = skeleton(recipe, seed=0)
    tower = 4 * sum(p.numel() for p in backbone.vision_tower.parameters())
    whole = 4 * sum(p.numel() for p in backbone.parameters())
    trained = whole - tower

    def states(**changed: Any) -> Memory:
        return memory(backbone, recipe, settings(**changed))

    assert states()[:3] == (whole, trained, 2 * trained)
    assert states(optim="sgd").optimizer == trained
    assert states(fsdp=["full_shard"])[:3] == (tower + trained / 4, trained / 4, trained / 2)
    for stage, expected in (
        (1, (whole, trained, trained / 2)),
        (2, (whole, trained / 4, trained / 2)),
        (3, (whole / 4, trained / 4, trained / 2)),
    ):
        assert states(deepspeed="zero.json", stage=stage)[:3] == expected
    # 4 of 16 rows, 128 tokens, 2 layers of 32 values.
    assert states().activations == 4 * 128 * 32 * 4 * 2 * dry_run.RECOMPUTED
    assert states(bf16=True).activations == states().activations / 2
    checkpointed = states(gradient_checkpointing=True).activations
    assert checkpointed == 4 * 128 * 32 * 4 * (2 + dry_run.RECOMPUTED)
    recipe["loss"]["mini_batch_size"] = 30  # more than a device has
    assert states().activations == 4 * 128 * 32 * 4 * 2 * dry_run.RECOMPUTED
    recipe["loss"]["mini_batch_size"] = 2
    assert states().activations == 2 * 128 * 32 * 4 * 2 * dry_run.RECOMPUTED


def test_the_sum_is_that_of_its_parts(recipe_file: Path) -> None:
    *_, line = dry_run.describe(read_recipe(str(recipe_file)))
    total, *parts = (float(number) for number in re.findall(r"(\d+\.\d\d)", line))
    assert total == pytest.approx(sum(parts), abs=0.03)
