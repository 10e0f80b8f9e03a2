"""The sigmoid loss of the ``triton`` backend: launches of its kernel.

The kernel computes a strip's losses and its dS in one pass, and ``strip_gemm`` the gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llave_kernels.backends import strip_gemm, tiles
from llave_kernels.backends.products import gain
from llave_kernels.backends.protocol import SigmoidGradients
from llave_kernels.backends.triton_backend import INSTALLED, _Call, _super_tile
from llave_kernels.rules import Rules

if INSTALLED:
    import triton

    from llave_kernels.backends import triton_sigmoid_kernel as kernels


def sigmoid_loss(
    query: Tensor,
    target: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    rules: Rules,
    weights: Tensor | None,
    *,
    gradients: bool,
) -> tuple[Tensor, SigmoidGradients | None]:
    """As ``SigmoidLoss.sigmoid_loss``."""
    factor = None
    if gradients and query.dtype == torch.float16:
        ones = torch.ones_like(logit_scale) if weights is None else weights
        factor = gain(logit_scale, ones)
    call = _Sigmoid(query, target, logit_scale, rules, logit_bias, weights, factor)
    tile, n = call.tile(), len(query)
    if not gradients:
        rows = strip_gemm.strip_rows(n, len(target), query.dtype.itemsize)
        for start in range(0, n, rows):
            call.run(tile, None, start, min(start + rows, n))
        return call.loss, None
    sums: list[Tensor] = []

    def fill(ds: Tensor, start: int, stop: int) -> None:
        sums.append(call.run(tile, ds, start, stop))

    found = strip_gemm.gradients(
        query, target, logit_scale, fill, factor, scale_gradient=False, dtype=torch.float32
    )
    # An operator's outputs may not share memory.
    d_scale, d_bias = (x.clone() for x in torch.stack(sums).sum(0))
    return call.loss, SigmoidGradients(found.query, found.target, d_scale, d_bias)


class _Sigmoid(_Call):
    """Attributes: ``loss`` (N,), which the runs over strips fill."""

    kernel = "sigmoid"

    def __init__(
        self,
        query: Tensor,
        target: Tensor,
        scale: Tensor,
        rules: Rules,
        bias: Tensor,
        weights: Tensor | None,
        gain: Tensor | None,
    ) -> None:
        super().__init__(query, target, scale, rules)
        pairs = self.pairs
        self.arguments = (
            self.query, self.target, scale, bias, pairs.label, pairs.query_id, pairs.target_id,
            weights, gain,
        )  # fmt: skip
        self.loss = query.new_empty(len(query), dtype=torch.float32)

    @property
    def masked(self) -> bool:
        """As ``_Call.masked``. Losses, similarities and dS of a tile are alive together."""
        return self.query.dtype.itemsize == 2

    def run(self, tile: tiles.Tile, ds: Tensor | None, start: int, stop: int) -> Tensor:
        """Fill the losses and dS of a strip. Return its gradients of scale and bias (2,)."""
        rows = stop - start
        n_m, n_n = triton.cdiv(rows, tile.bm), triton.cdiv(len(self.target), tile.bn)
        tiles_each = math.prod(_super_tile(n_m, n_n, self.query.device))
        programs = triton.cdiv(n_m * n_n, tiles_each)
        loss = self.query.new_empty((n_n, rows), dtype=torch.float32)
        sums = self.query.new_empty((programs, 2), dtype=torch.float32)
        kernels.sigmoid_kernel[(programs,)](
            *self.arguments, ds, loss, sums, start, stop, *self.sizes[1:],
            0 if ds is None else ds.stride(0), tiles_each, **self.options(tile),
        )  # fmt: skip
        torch.sum(loss, 0, out=self.loss[start:stop])
        return sums.sum(0)

    def trial(self, tile: tiles.Tile) -> None:
        ds = strip_gemm.strip_workspace(self.query, self.target)
        self.run(tile, ds, 0, len(ds))
