"""Which backend runs: automatic, by name, by environment."""

from __future__ import annotations

import pytest
import torch

from llave_kernels import available_backends, dispatch, hardness_weighted_contrastive_loss
from llave_kernels.backends import triton_backend
from tests.helpers import embeddings


def test_available_backends_explains_every_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_backends()["torch"] is None
    monkeypatch.setattr(triton_backend, "unavailable", lambda: "no GPU")
    assert available_backends()["triton"] == "no GPU"


def test_auto_is_torch_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *a: ran.append(choose(*a)) or ran[-1])
    hardness_weighted_contrastive_loss(*embeddings(4, 4, 3))
    assert ran == ["torch"]


def test_environment_overrides_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = embeddings(4, 4, 3)
    monkeypatch.setenv("LLAVE_BACKEND", "nonsense")
    with pytest.raises(
        ValueError, match=r"LLAVE_BACKEND='nonsense' is not a backend; choose one of"
    ):
        hardness_weighted_contrastive_loss(*pair)
    assert hardness_weighted_contrastive_loss(*pair, backend="torch").isfinite()
    monkeypatch.setenv("LLAVE_BACKEND", "torch")
    assert hardness_weighted_contrastive_loss(*pair).isfinite()


def test_named_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "unavailable", lambda: "no GPU")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run on this machine: no GPU"):
        hardness_weighted_contrastive_loss(*embeddings(4, 4, 3), backend="triton")


def test_named_backend_refuses_a_dtype() -> None:
    pair = embeddings(4, 4, 3, torch.float64)
    with pytest.raises(ValueError, match=r"backend='triton' does not support this call: .*float64"):
        hardness_weighted_contrastive_loss(*pair, backend="triton")
