"""OpenCLIP's loss class and ours in one process.

tests/llave_kernels/test_distributed.py covers several.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

open_clip = pytest.importorskip("open_clip")

from llave_kernels.integrations.llave_trainer import WeightedClipLoss  # noqa: E402
from llave_kernels.integrations.open_clip import ClipLoss  # noqa: E402
from llave_kernels.reference import reference_loss  # noqa: E402
from tests.helpers import embeddings, relative_error  # noqa: E402
from tests.llave_kernels.integrations.hosts import CLIPTask  # noqa: E402


def tiny_clip(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    vision = {"layers": 2, "width": 64, "patch_size": 8, "image_size": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 64, "heads": 2, "layers": 2}
    return open_clip.CLIP(32, vision, text, **settings)


def batches(steps: int = 5) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(12, 3, 16, 16, generator=generator)
        yield images, torch.randint(1, 50, (12, 8), generator=generator)


def loss_curve(loss_fn: nn.Module) -> list[float]:
    model = tiny_clip()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    curve = []
    for images, texts in batches():
        image, text, scale = model(images, texts)
        loss = loss_fn(image, text, scale, output_dict=True)["contrastive_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    return curve


def test_training_gives_the_hosts_loss_curve() -> None:
    host, ours = loss_curve(open_clip.loss.ClipLoss()), loss_curve(ClipLoss())
    assert host == pytest.approx(ours, rel=1e-5)
    assert loss_curve(ClipLoss(alpha=9.0)) != pytest.approx(ours, rel=1e-2)


def create_task(model: nn.Module) -> nn.Module:
    """The host's task, or ours that does the same where the release has none."""
    if not hasattr(open_clip, "create_task"):
        return CLIPTask(model, open_clip.loss.ClipLoss())
    settings = {"rank": 0, "world_size": 1, "local_loss": False, "gather_with_grad": False}
    kinds = {"model": "ViT", "distill": False, "siglip": False}
    return open_clip.create_task(SimpleNamespace(**settings, **kinds), model=model)


@pytest.mark.parametrize("lone", [False, True], ids=["scale of shape ()", "scale of shape (1,)"])
def test_training_a_task_gives_the_hosts_loss_curve(lone: bool) -> None:
    def curve(loss_fn: nn.Module | None) -> list[float]:
        model = tiny_clip(nonscalar_logit_scale=lone, output_dict=True)
        task = create_task(model)
        if loss_fn is not None:
            task.loss = loss_fn
        optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
        values = []
        for images, texts in batches():
            losses, _ = task({"image": images, "text": texts})
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            values.append(float(losses["loss"].detach()))
        return values

    assert curve(ClipLoss()) == pytest.approx(curve(None), rel=1e-5)
    assert curve(ClipLoss(alpha=9.0)) != pytest.approx(curve(None), rel=1e-2)


def test_bfloat16_is_nearer_the_truth_than_the_host() -> None:
    errors = torch.zeros(2, 3)
    for _ in range(4):
        pair = embeddings(48, 48, 32, torch.bfloat16)
        exact = [x.double().requires_grad_() for x in pair]
        truth = reference_loss(*exact, logit_scale=50.0, alpha=0.0)
        truth.backward()
        for row, loss_fn in zip(errors, (ClipLoss(), open_clip.loss.ClipLoss()), strict=True):
            inputs = [x.clone().requires_grad_() for x in pair]
            loss = loss_fn(*inputs, torch.tensor(50.0, dtype=torch.bfloat16))
            loss.backward()
            found = (loss, inputs[0].grad, inputs[1].grad)
            expected = (truth, exact[0].grad, exact[1].grad)
            row += torch.tensor(
                [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
            )
    assert bool((errors[0] < errors[1]).all()), errors


@pytest.mark.long
def test_compiles_in_one_graph() -> None:
    loss_fn = ClipLoss(alpha=9.0)
    compiled = torch.compile(loss_fn, fullgraph=True)
    pair = embeddings(8, 8, 6)
    scale = torch.tensor(20.0)
    assert relative_error(compiled(*pair, scale), loss_fn(*pair, scale)) < 1e-6


def test_one_element_scales_and_refusals() -> None:
    pair = embeddings(6, 6, 4)
    expected = ClipLoss(alpha=5.0)(*pair, 30.0)
    assert relative_error(ClipLoss(alpha=5.0)(*pair, torch.tensor([30.0])), expected) < 1e-6
    assert relative_error(WeightedClipLoss()(*pair, 30.0, alpha=5.0), expected) < 1e-6
    for kind in (np.float32, np.float64, np.int64, torch.tensor):
        scale, alpha = kind(30), kind(5)
        assert relative_error(ClipLoss(alpha=alpha)(*pair, scale), expected) < 1e-6
        assert relative_error(WeightedClipLoss()(*pair, scale, alpha), expected) < 1e-6
        theirs = open_clip.loss.ClipLoss()(*pair, scale)
        assert relative_error(ClipLoss()(*pair, scale), theirs) < 1e-5
    with pytest.raises(ValueError, match="use_horovod=True is not supported"):
        ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="alpha must be >= 0 and finite, got -1"):
        ClipLoss(alpha=-1)
