"""The choice of a backend: automatic, by name, by environment variable."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llave_kernels import available_backends, dispatch, hardness_weighted_contrastive_loss
from llave_kernels.backends import cuda, torch_backend, triton_backend
from llave_kernels.rules import Rules
from tests.helpers import embeddings

RULES = Rules(*[None] * 8, 9.0, 9.0, "in_batch", None, True)


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
    for value in ("torch", " torch ", "", " ", "auto"):  # an empty value counts as not set
        monkeypatch.setenv("LLAVE_BACKEND", value)
        assert hardness_weighted_contrastive_loss(*pair).isfinite()


def test_named_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "unavailable", lambda: "no GPU")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run on this machine: no GPU"):
        hardness_weighted_contrastive_loss(*embeddings(4, 4, 3), backend="triton")


def test_named_backend_refuses_a_dtype() -> None:
    pair = embeddings(4, 4, 3, torch.float64)
    with pytest.raises(ValueError, match=r"backend='triton' does not support this call: .*float64"):
        hardness_weighted_contrastive_loss(*pair, backend="triton")


def test_auto_takes_the_first_gpu_backend_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals: dict[str, str | None] = {"triton": None, "cuda": None}
    for module in (triton_backend, cuda):
        monkeypatch.setattr(module, "unavailable", lambda: None)
        monkeypatch.setattr(module, "supports", lambda *_, name=module.NAME: refusals[name])

    def chosen() -> str:
        query = torch.empty(4, 8, device="meta")  # any device but the CPU
        return dispatch.choose("auto", query, query, RULES)

    assert chosen() == "triton"
    refusals["triton"] = "no"
    assert chosen() == "cuda"
    refusals["cuda"] = "no"
    assert chosen() == "torch"
    refusals |= {"triton": None, "cuda": None}
    for dtype, capability, name in (
        (torch.bfloat16, (9, 0), "cuda"),
        (torch.float16, (9, 0), "cuda"),
        (torch.float32, (9, 0), "triton"),
        (torch.bfloat16, (8, 0), "triton"),
        (torch.bfloat16, (10, 0), "triton"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        with FakeTensorMode():
            query = torch.empty(4, 8, device="cuda", dtype=dtype)
            assert dispatch.choose("auto", query, query, RULES) == name
    monkeypatch.setattr(dispatch, "BACKENDS", [cuda, triton_backend, torch_backend])
    refusals |= {"triton": None, "cuda": None}
    assert chosen() == "cuda"


def test_gpus_without_tiles_of_ours_take_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU is older than sm_80. The other is of another maker, which torch also calls "cuda"."""
    for module in (triton_backend, cuda):
        monkeypatch.setattr(module, "unavailable", lambda: None)
    capability = (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with FakeTensorMode():
        query = torch.empty(4, 8, device="cuda", dtype=torch.float16)
        assert dispatch.choose("auto", query, query, RULES) == "torch"
        capability = (9, 4)
        assert dispatch.choose("auto", query, query, RULES) == "triton"
        monkeypatch.setattr(torch.version, "cuda", None)
        assert dispatch.choose("auto", query, query, RULES) == "torch"
        assert "NVIDIA" in str(triton_backend.supports(query, query, RULES))


def test_compiled_kernels_refuse_exact_float32() -> None:
    pair = embeddings(4, 4, 3)
    if available_backends()["cuda"] is not None:
        pytest.skip("neither a GPU nor the simulation")
    pair = [x.cuda() for x in pair] if torch.cuda.is_available() else pair
    with pytest.raises(ValueError, match=r"multiplied as TF32, .*set_float32_matmul_precision"):
        hardness_weighted_contrastive_loss(*pair, backend="cuda")
