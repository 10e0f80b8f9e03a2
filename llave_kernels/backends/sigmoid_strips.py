"""The sigmoid loss of the GPU backends: their kernels' launches over strips of rows.

A kernel computes the loss of a strip and its dS in one pass. ``strip_gemm`` makes the gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llave_kernels.backends import strip_gemm
from llave_kernels.backends.products import gain
from llave_kernels.backends.protocol import SigmoidGradients

# run(ds, gain, start, stop) computes the losses of those rows, and ``gain * dS`` unless ``ds`` is
# None. It returns their parts of the gradients of scale and bias, (2,).
Run = Callable[[Tensor | None, Tensor | None, int, int], Tensor]


def over_strips(
    run: Run,
    query: Tensor,
    target: Tensor,
    logit_scale: Tensor,
    weights: Tensor | None,
    *,
    gradients: bool,
) -> SigmoidGradients | None:
    """Run a kernel on all rows. The arguments are those of ``SigmoidLoss.sigmoid_loss``."""
    n, m = query.shape[0], target.shape[0]
    if not gradients:
        rows = strip_gemm.strip_rows(n, m, query.dtype.itemsize)
        for start in range(0, n, rows):
            run(None, None, start, min(start + rows, n))
        return None
    factor = None
    if query.dtype == torch.float16:
        factor = gain(logit_scale, torch.ones_like(logit_scale) if weights is None else weights)
    sums: list[Tensor] = []

    def fill(ds: Tensor, start: int, stop: int) -> None:
        sums.append(run(ds, factor, start, stop))

    found = strip_gemm.gradients(
        query, target, logit_scale, fill, factor, scale_gradient=False, dtype=torch.float32
    )
    # An operator's outputs may not share memory.
    d_scale, d_bias = (x.clone() for x in torch.stack(sums).sum(0))
    return SigmoidGradients(found.query, found.target, d_scale, d_bias)
