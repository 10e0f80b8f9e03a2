"""The host trainer's features: adapters, checkpointing, low precision, processes, logs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

for needed in ("sentence_transformers", "datasets", "accelerate", "yaml", "torchvision"):
    pytest.importorskip(needed)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from accelerate.utils import DeepSpeedPlugin  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402

from llave.figures import Figures, in_batch_accuracy  # noqa: E402
from llave.losses import CachedLLaVELoss, LLaVELoss  # noqa: E402
from llave.modeling import build  # noqa: E402
from llave.trainer import EmbeddingTrainer  # noqa: E402
from llave.training import SECTIONS, build_model, read_recipe  # noqa: E402
from tests.llave import fsdp_worker, tiny, train_worker  # noqa: E402
from tests.llave.test_training import logged, run  # noqa: E402

# Batches of pictures and texts alternate with batches of texts only.
PICTURES = ("--data.subsets", "[plus, pictures]")
CHECKPOINTING = ("--trainer.gradient_checkpointing", "true")
CACHING = ("--loss.mini_batch_size", "4")
FROZEN = ("--model.frozen", "vision_tower")
LORA = (
    *("--model.lora", "{r: 8, lora_alpha: 16, target_modules: [q_proj, k_proj, v_proj, o_proj]}"),
    *("--trainer.learning_rate", "0.01"),
)
GATHER = "stage3_gather_16bit_weights_on_model_save"
INPUTS = ["one and two", Image.new("RGB", (40, 16), (9, 99, 199)), "three plus four"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("features") / "plain"
    train_worker.train(str(out), *PICTURES)
    return out


def losses(out: Path, *overrides: str) -> dict[int, float]:
    train_worker.train(str(out), *PICTURES, *overrides)
    return logged(out)


def test_checkpointing_and_caching_change_no_loss(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recomputed = 0
    checkpoint = torch.utils.checkpoint.checkpoint

    def counted(*args, **kwargs):
        nonlocal recomputed
        recomputed += 1
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    expected = pytest.approx(logged(plain), rel=1e-5)
    assert losses(tmp_path / "checkpointing", *CHECKPOINTING) == expected
    assert recomputed
    assert losses(tmp_path / "both", *CHECKPOINTING, *CACHING) == expected


@pytest.mark.parametrize("reentrant", [pytest.param("true", marks=pytest.mark.long), "false"])
def test_checkpointing_below_a_frozen_vision_tower(
    plain: Path, tmp_path: Path, reentrant: str
) -> None:
    frozen = losses(tmp_path / "frozen", *FROZEN)
    assert frozen != pytest.approx(logged(plain), rel=1e-5)
    form = ("--trainer.gradient_checkpointing_kwargs", f"{{use_reentrant: {reentrant}}}")
    again = losses(tmp_path / "again", *FROZEN, *CHECKPOINTING, *CACHING, *form)
    assert again == pytest.approx(frozen, rel=1e-5)


@pytest.mark.parametrize(
    ("override", "weights"),
    [(("--trainer.bf16", "true"), "F32"), (("--model.dtype", "bfloat16"), "BF16")],
)
def test_bfloat16_is_near_float32(
    plain: Path, tmp_path: Path, override: tuple[str, str], weights: str
) -> None:
    assert losses(tmp_path / "low", *override) == pytest.approx(logged(plain), rel=0.05)
    saved = load_file(tmp_path / "low" / "model" / "model.safetensors")
    kept = {"F32": torch.float32, "BF16": torch.bfloat16}[weights]
    assert {weight.dtype for weight in saved.values()} == {kept}


def test_half_precision_backbones_are_trained_in_float32(tmp_path: Path) -> None:
    network, processor = tiny.llava_onevision()
    for part in (network.half(), processor):
        part.save_pretrained(tmp_path)
    settings = SECTIONS["model"] | {"backbone": str(tmp_path)}
    assert {p.dtype for p in build_model(settings, [], seed=0).parameters()} == {torch.float32}
    settings["dtype"] = "auto"
    assert {p.dtype for p in build_model(settings, [], seed=0).parameters()} == {torch.float16}


@pytest.mark.long
@pytest.mark.parametrize("overrides", [(), (*CACHING, *CHECKPOINTING)], ids=["plain", "cached"])
def test_two_processes_with_pictures(
    plain: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    out = tmp_path / "two"
    run(out, *PICTURES, *overrides, processes=2)
    assert logged(out) == pytest.approx(logged(plain), rel=1e-3)


@pytest.mark.long
def test_fsdp(plain: Path, tmp_path: Path) -> None:
    out, overrides = tmp_path / "sharded", (*PICTURES, "--trainer.fsdp", "true")
    run(out, *overrides, processes=2, worker=fsdp_worker.main, kill="step:7")
    run(out, *overrides, processes=2, worker=fsdp_worker.main)
    assert logged(out) == pytest.approx(logged(plain), rel=1e-3)
    one, sharded = (SentenceTransformer(str(x / "model"), device="cpu") for x in (plain, out))
    np.testing.assert_allclose(sharded.encode(INPUTS), one.encode(INPUTS), atol=1e-2)


@pytest.mark.long
def test_deepspeed_with_the_settings_of_the_docs(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
    (settings,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (tmp_path / "zero3.json").write_text(settings)
    one, two = tmp_path / "one", tmp_path / "two"
    train_worker.train(str(one))
    sharded = ("--trainer.deepspeed", str(tmp_path / "zero3.json"))
    run(two, *sharded, processes=2, kill="step:7")
    run(two, *sharded, processes=2)
    assert logged(two) == pytest.approx(logged(one), rel=1e-3)
    models = (SentenceTransformer(str(x / "model"), device="cpu") for x in (one, two))
    expected, found = (model.encode(["one and two", "three"]) for model in models)
    np.testing.assert_allclose(found, expected, atol=1e-2)


@pytest.mark.parametrize(
    ("zero", "caching", "homogeneous", "message"),
    [
        ({"stage": 3}, False, True, "set zero_optimization.stage3_gather_16bit_weights_on"),
        ({"stage": 2}, True, True, "loss.mini_batch_size=4: gradient caching runs several"),
        ({"stage": 3, GATHER: True}, False, False, "data.homogeneous=False: sharded weights need"),
        ({"stage": 3, GATHER: True}, False, True, None),
        ({"stage": 1}, False, False, None),
    ],
)
def test_settings_of_deepspeed_that_would_fail(
    zero: dict[str, Any], caching: bool, homogeneous: bool, message: str | None
) -> None:
    model = build(tiny.llava_onevision(), device="cpu")
    plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": zero})
    assert "deepspeed_plugin" in dir(AcceleratorState)
    trainer = SimpleNamespace(
        args=SimpleNamespace(fsdp=[], deepspeed="zero.json"),
        is_fsdp_enabled=False,
        is_deepspeed_enabled=True,
        accelerator=SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)),
        loss=(CachedLLaVELoss if caching else LLaVELoss)(model),
    )
    if message is None:
        EmbeddingTrainer.check_sharding(trainer, homogeneous)  # type: ignore[arg-type]
        return
    with pytest.raises(ValueError, match=message):
        EmbeddingTrainer.check_sharding(trainer, homogeneous)  # type: ignore[arg-type]


@pytest.mark.long
def test_gradient_caching_under_fsdp_with_rows_of_several_pictures(tmp_path: Path) -> None:
    rows = ("--data.subsets", "[several, plus]", *FROZEN)
    train_worker.train(str(tmp_path / "one"), *rows)
    sharded = ("--trainer.fsdp", "true", *CACHING, *CHECKPOINTING)
    run(tmp_path / "two", *rows, *sharded, processes=2, worker=fsdp_worker.main)
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), rel=1e-3)
    for key in ("in_batch_accuracy", "similarity_overlap"):
        one, two = (logged(tmp_path / name, key) for name in ("one", "two"))
        assert two == pytest.approx(one, abs=0.07)  # one row of 16 may be rounded to another side


def test_figures_are_logged_beside_the_loss(plain: Path) -> None:
    for key in ("pairs_per_second", "tokens_per_second", "peak_memory_gib"):
        found = logged(plain, key)
        assert list(found) == list(range(1, 13))
        assert min(found.values()) > 0
    accuracy = logged(plain, "in_batch_accuracy")
    assert set(accuracy) == set(range(1, 13))
    assert all(value * 16 == int(value * 16) for value in accuracy.values())  # of 16 rows
    assert len(set(accuracy.values())) > 1


def test_in_batch_accuracy_counts_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llave.figures._ROWS", 4)
    draw = torch.Generator().manual_seed(0)
    query, noise = (torch.randn(11, 6, generator=draw) for _ in range(2))
    positive = query + noise
    positive[7], positive[9] = positive[2], positive[5]
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 6, 2, 8, 9, 10])  # 7 copies 2; 9 ties with 5
    right = 0
    for row in range(11):
        others = [query[row] @ positive[n] for n in range(11) if ids[n] != ids[row]]
        right += bool(query[row] @ positive[row] > max(others))
    assert 0 < right < 11
    assert in_batch_accuracy(query, positive, ids) == right / 11


def test_figures_count_pairs_and_tokens() -> None:
    figures = Figures(SimpleNamespace(last=None))  # type: ignore[arg-type]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    padded = {"anchor_input_ids": torch.zeros(2, 3), "anchor_attention_mask": mask}
    figures.see(padded | {"positive_input_ids": torch.zeros(2, 4), "label": torch.zeros(2, 1)})
    alone = SimpleNamespace(
        device=torch.device("cpu"), reduce=lambda value, _: value, gather=lambda value: value
    )
    figures._seconds = 0.5
    found = figures.take(alone)
    assert (found["pairs_per_second"], found["tokens_per_second"]) == (4.0, 26.0)
    assert figures.take(alone).keys() == {"peak_memory_gib"}


@pytest.mark.long
def test_lora(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    model = train_worker.train(str(whole), *LORA)
    before, after = logged(whole)[1], logged(whole)[12]
    assert after < 0.9 * before

    run(killed, *LORA, kill="step:7")
    train_worker.train(str(killed), *LORA)
    assert logged(killed) == pytest.approx(logged(whole), rel=1e-6)
    assert not list(killed.glob("checkpoint-*/model.safetensors"))

    # Only the adapted weights have changed.
    recipe = read_recipe(str(whole.with_suffix(".0.yaml")))
    texts = [t for c in ("anchor", "positive") for t in train_worker.subsets()["plus"][c]]
    build_model(recipe["model"], texts, seed=0).save_pretrained(str(tmp_path / "start"))
    start = load_file(tmp_path / "start" / "model.safetensors")
    end = load_file(whole / "model" / "model.safetensors")
    assert start.keys() == end.keys()
    changed = {name.split(".")[-2] for name in end if not torch.equal(start[name], end[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"}

    # The model loads without llave, peft or the backbone.
    np.save(tmp_path / "expected.npy", model.encode(INPUTS))
    INPUTS[1].save(tmp_path / "image.png")
    script = f"""
import sys
sys.modules.update(llave=None, peft=None)
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({str(whole / "model")!r}, device="cpu")
found = model.encode([{INPUTS[0]!r}, "image.png", {INPUTS[2]!r}])
np.testing.assert_allclose(found, np.load("expected.npy"), atol=1e-5)
grids = [[16, 16], [16, 32], [32, 16], [32, 32]]
assert model[0].model.config.image_grid_pinpoints == grids
assert model[0].processor.image_processor.image_grid_pinpoints == grids
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_lora_without_settings_is_lora(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    # peft has no default modules for this architecture, and says so.
    with pytest.raises(ValueError, match="target_modules"):
        train_worker.train(str(tmp_path / "run"), "--model.lora", "{}")


def test_lora_needs_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"model\.lora=.* needs peft: pip install peft"):
        train_worker.train(str(tmp_path / "run"), *LORA)


def test_tensorboard_gets_the_losses(plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_worker.train(str(tmp_path / "run"), *PICTURES, "--trainer.report_to", "tensorboard")
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    found = EventAccumulator(str(events)).Reload()
    for key in ("loss", "in_batch_accuracy", "similarity_overlap"):
        scalars = {e.step: e.value for e in found.Scalars(f"train/{key}")}
        assert scalars == pytest.approx(logged(plain, key), rel=1e-5)
    assert {"train/pairs_per_second", "train/peak_memory_gib"} <= set(found.Tags()["scalars"])
