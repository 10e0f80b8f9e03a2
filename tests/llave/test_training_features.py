"""The host trainer's features: adapters, checkpointing, low precision, processes, logs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("sentence_transformers", "datasets", "accelerate", "yaml", "torchvision"):
    pytest.importorskip(needed)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from sentence_transformers import SentenceTransformer  # noqa: E402

from llave.training import SECTIONS, build_model, read_recipe  # noqa: E402
from tests.llave import tiny, train_worker  # noqa: E402
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


@pytest.mark.parametrize("reentrant", ["true", "false"])
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


CACHED = pytest.param((*CACHING, *CHECKPOINTING), marks=pytest.mark.long)


@pytest.mark.parametrize("overrides", [(), CACHED], ids=["plain", "cached"])
def test_two_processes_with_pictures(
    plain: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    out = tmp_path / "two"
    run(out, *PICTURES, *overrides, processes=2)
    assert logged(out) == pytest.approx(logged(plain), rel=1e-3)


@pytest.mark.long
def test_fsdp(plain: Path, tmp_path: Path) -> None:
    out, overrides = tmp_path / "sharded", (*PICTURES, "--trainer.fsdp", "true")
    run(out, *overrides, processes=2, worker="fsdp_worker", kill="step:7")
    run(out, *overrides, processes=2, worker="fsdp_worker")
    assert logged(out) == pytest.approx(logged(plain), rel=1e-3)
    one, sharded = (SentenceTransformer(str(x / "model"), device="cpu") for x in (plain, out))
    np.testing.assert_allclose(sharded.encode(INPUTS), one.encode(INPUTS), atol=1e-2)


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
    found = EventAccumulator(str(events)).Reload().Scalars("train/loss")
    assert {e.step: e.value for e in found} == pytest.approx(logged(plain), rel=1e-5)
