"""The gradient products: how often they round, and what they launch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llave_kernels.backends import products, strip_gemm
from tests.helpers import embeddings, relative_error
from tests.llave_kernels import accounting

HALF = (torch.float16, torch.bfloat16)
ROWS = 100  # of a strip, where there are several


@pytest.mark.parametrize("device", ["CPU", "GPU"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("strips", [1, 3])
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_rounded_once(
    device: str,
    dtype: torch.dtype,
    strips: int,
    learnable: bool,
    scaled: bool,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if device == "GPU":
        request.getfixturevalue("half_products")
    if strips > 1:
        monkeypatch.setattr(strip_gemm, "strip_rows", lambda n, m, itemsize: ROWS)
    n, m, d = 257, 301, 45
    query, target = embeddings(n, m, d, dtype)
    # The gradients fit float16, and their products with the gain do not.
    gain = torch.tensor(2.0**15) if scaled else None
    ds = (torch.rand(n, m) + 0.01).to(dtype)
    given = [x + (0.5 if scaled else 0.0) for x in (query, target)]

    def fill(out: Tensor, start: int, stop: int) -> None:
        out[:, :m] = ds[start:stop] if gain is None else ds[start:stop] * gain.to(dtype)

    scale = torch.tensor(20.0)
    found = strip_gemm.gradients(*given, scale, fill, gain, scale_gradient=learnable)
    query, target, exact = (x.double() for x in (*given, ds))
    truth = exact @ target, exact.T @ query
    for value, right in zip(found[:2], truth, strict=True):
        assert value.dtype == dtype
        assert relative_error(value, right) < relative_error(right.to(dtype), right) * 1.01 + 1e-6
    if learnable:
        terms = query * truth[0]
        # If dQ were rounded before, the error would be a hundred times as large.
        error = abs(float(found.logit_scale.double() - terms.sum() / 20))
        assert error < 1e-6 * float(terms.norm())


@pytest.mark.parametrize(
    ("dtype", "learnable", "strips", "launches"),
    [
        (torch.bfloat16, False, 1, "mm mm"),
        (torch.bfloat16, True, 1, "mm copy_ mul_ sum div_ mm"),
        (torch.bfloat16, False, 3, "mm mm mm baddbmm mm baddbmm copy_"),
        (
            torch.bfloat16,
            True,
            2,
            "mm copy_ mul_ sum div_ mm mm copy_ mul_ sum div_ baddbmm copy_ stack sum",
        ),
        (torch.float32, False, 2, "mm mm mm addmm_"),
        (torch.float16, False, 2, "mm div mm mm div baddbmm div"),
        (torch.float16, True, 1, "mm div mul_ sum div_ mm div div_"),
    ],
    ids=str,
)
def test_launches(
    dtype: torch.dtype,
    learnable: bool,
    strips: int,
    launches: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The largest operands have one pass each: no zeros, no sums beside the products."""
    accounts = accounting.pretend(monkeypatch, "cuda")
    monkeypatch.setattr(strip_gemm, "strip_rows", lambda n, m, itemsize: n if strips == 1 else ROWS)
    query, target = (torch.empty(k, 40, dtype=dtype, device="meta") for k in (ROWS * strips, 500))
    scale = torch.empty((), device="meta")
    gain = scale if dtype == torch.float16 else None
    with accounts:
        strip_gemm.gradients(
            query, target, scale, lambda ds, start, stop: None, gain, scale_gradient=learnable
        )
    assert " ".join(accounts.launches) == launches


@pytest.mark.usefixtures("half_products")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("allowed", [True, False])
def test_parts_of_a_sum_stay_in_float32(
    dtype: torch.dtype, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = torch.backends.cuda.matmul
    name = f"allow_{'bf' if dtype == torch.bfloat16 else 'fp'}16_reduced_precision_reduction"
    multiply, seen, before = torch.mm, [], getattr(settings, name)

    def watched(*args: Tensor, **more: Tensor) -> Tensor:
        seen.append(getattr(settings, name))
        return multiply(*args, **more)

    monkeypatch.setattr(torch, "mm", watched)
    a, b = (torch.ones(7, 7, dtype=dtype) for _ in range(2))
    try:
        setattr(settings, name, allowed)
        products.store_product(torch.empty_like(a), a, b)
        assert seen == [False]
        assert getattr(settings, name) == allowed
    finally:
        setattr(settings, name, before)
