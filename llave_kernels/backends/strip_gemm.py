"""The gradient GEMMs of the GPU backends: strips of dS through a bounded workspace and the
library's GEMM.

Embeddings are wide (896 to 3,584): a float32 output tile of such a gradient does not fit in
registers, so one fused kernel would spend its time on atomics. Two GEMMs per strip run at the
library's rate instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llave_kernels.backends.products import product
from llave_kernels.backends.protocol import Gradients

WORKSPACE = 256 << 20  # bytes of dS at a time
ALIGNMENT = 16  # elements of a row: tensor-core GEMMs want 16 bytes, Triton's stores this many


def strip_rows(n: int, m: int, itemsize: int) -> int:
    """Rows of dS that fit the workspace, a multiple of 128 where more than one strip is needed."""
    rows = max(1, WORKSPACE // (_pitch(m) * itemsize))
    return n if rows >= n else max(1, rows // 128 * 128 or rows)


def gradients(
    query: Tensor,
    target: Tensor,
    logit_scale: Tensor,
    fill: Callable[[Tensor, int, int], None],
    gain: Tensor | None,
    *,
    scale_gradient: bool,
) -> Gradients:
    """The gradients; that of logit_scale is NaN unless asked for.

    ``fill(ds, start, stop)`` writes ``gain * dS`` of those rows into the first M columns of ``ds``
    (rows, a multiple of 16), which is contiguous. ``gain`` is a 0-d power of two, None for 1.
    """
    n, m = len(query), len(target)
    workspace = strip_workspace(query, target)
    rows = len(workspace)
    d_query = query.new_empty(query.shape)
    d_target = query.new_zeros(target.shape, dtype=torch.float32)
    d_scale = logit_scale.new_full((), 0.0 if scale_gradient else math.nan)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        fill(workspace[: stop - start], start, stop)
        ds = workspace[: stop - start, :m]
        strip, queries = product(ds, target), query[start:stop]
        if gain is not None:
            strip /= gain
        d_query[start:stop] = strip
        d_target += product(ds.T, queries)
        if scale_gradient:  # before dQ is rounded: the terms cancel
            d_scale += torch.linalg.vecdot(queries.float(), strip).sum() / logit_scale
    if gain is not None:
        d_target /= gain
    return Gradients(d_query, d_target.to(target.dtype), d_scale)


def strip_workspace(query: Tensor, target: Tensor) -> Tensor:
    """(rows, a multiple of 16 not below M) of the inputs' dtype, uninitialised."""
    n, m = len(query), len(target)
    return query.new_empty((strip_rows(n, m, query.dtype.itemsize), _pitch(m)))


def _pitch(m: int) -> int:
    return -(-m // ALIGNMENT) * ALIGNMENT
