from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llave_kernels.backends import products, torch_strips


@pytest.fixture
def half_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the CPU multiplies half precision as a GPU does, with sums in float32."""
    mm = torch.mm

    def multiply(
        a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, out: Tensor | None = None
    ) -> Tensor:
        dtype = out_dtype or a.dtype
        result = mm(a.float(), b.float()) if a.dtype.itemsize == 2 else mm(a, b)
        return result.to(dtype) if out is None else out.copy_(result)

    def add(total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert out is total
        assert out.dtype == out_dtype
        return out.add_(a.to(out_dtype) @ b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", multiply)
    monkeypatch.setattr(torch, "baddbmm", add)
    for module in (products, torch_strips):
        monkeypatch.setattr(module, "multiplies_halves", lambda device_type: True)
