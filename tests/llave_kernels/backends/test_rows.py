"""The layout of inputs that the GPU kernels load."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llave_kernels.backends.rows import ROW_BYTES, aligned

DTYPES = (torch.float32, torch.bfloat16)


def offset(x: Tensor) -> Tensor:
    """The same values in memory that starts at no multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 33, 100, 200])
@pytest.mark.parametrize("layout", ["plain", "transposed", "columns", "overlapping", "offset"])
def test_rows_start_and_end_at_multiples_of_16_bytes(
    layout: str, d: int, dtype: torch.dtype
) -> None:
    x = torch.randn(7, d).to(dtype)
    views = {
        "plain": x,
        "transposed": x.T.contiguous().T,
        "columns": torch.stack([x, -x], 2).flatten(1)[:, ::2],
        "overlapping": x[:1].expand(7, d),
        "offset": offset(x),
    }
    found = aligned(views[layout])
    assert found.data_ptr() % ROW_BYTES == 0
    assert found.stride(0) * found.itemsize % ROW_BYTES == 0
    assert found.shape[1] * found.itemsize % ROW_BYTES == 0
    assert found.stride(1) == 1
    assert torch.equal(found[:, :d], views[layout])
    assert not found[:, d:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_aligned_rows_are_not_copied(dtype: torch.dtype) -> None:
    x = torch.randn(7, 272).to(dtype)
    for view in (x, x[::2], x[:, 16:216]):
        assert aligned(view) is view
