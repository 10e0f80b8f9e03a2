"""The gradient GEMMs of the GPU backends.

Strips of dS go through a bounded workspace to the library's GEMM. Embeddings are wide (896 to
3,584). A float32 output tile of such a gradient does not fit in registers. One fused kernel would
spend its time on atomics. Two GEMMs per strip run at the library's rate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llave_kernels.backends.products import product
from llave_kernels.backends.protocol import Gradients

WORKSPACE = 256 << 20  # bytes of dS at a time
ALIGNMENT = 16  # elements: tensor-core GEMMs need 16 bytes, Triton's stores 16 elements


def strip_rows(n: int, m: int, itemsize: int) -> int:
    """Rows of dS per strip. With several strips, a multiple of 128 if that many fit."""
    rows = max(1, WORKSPACE // (_pitch(m) * itemsize))
    return n if rows >= n else max(1, rows // 128 * 128 or rows)


def gradients(
    query: Tensor,
    target: Tensor,
    logit_scale: float | Tensor,
    fill: Callable[[Tensor, int, int], None],
    gain: Tensor | None,
    *,
    scale_gradient: bool,
) -> Gradients:
    """The gradients. That of logit_scale has no meaning unless ``scale_gradient``.

    ``fill(ds, start, stop)`` writes ``gain * dS`` of those rows into the first M columns of ``ds``.
    ``ds`` is contiguous, and its width is a multiple of 16. ``gain`` is a 0-d power of two, or None
    for 1.
    """
    n, m = len(query), len(target)
    workspace = strip_workspace(query, target)
    rows = len(workspace)
    d_query = query.new_empty(query.shape)
    d_target = query.new_zeros(target.shape, dtype=torch.float32)
    make_scale = query.new_zeros if scale_gradient else query.new_empty
    d_scale = make_scale((), dtype=torch.float32)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        fill(workspace[: stop - start], start, stop)
        ds = workspace[: stop - start, :m]
        strip, queries = product(ds, target), query[start:stop]
        if gain is not None:
            strip /= gain
        d_query[start:stop] = strip
        d_target += product(ds.T, queries)
        if scale_gradient:  # from dQ before it is rounded, because the terms cancel
            d_scale += torch.linalg.vecdot(queries.float(), strip).sum() / logit_scale
    if gain is not None:
        d_target /= gain
    return Gradients(d_query, d_target.to(target.dtype), d_scale)


def strip_workspace(query: Tensor, target: Tensor) -> Tensor:
    """(rows, M rounded up to a multiple of 16) of the inputs' dtype, uninitialised."""
    n, m = len(query), len(target)
    return query.new_empty((strip_rows(n, m, query.dtype.itemsize), _pitch(m)))


def _pitch(m: int) -> int:
    return -(-m // ALIGNMENT) * ALIGNMENT
