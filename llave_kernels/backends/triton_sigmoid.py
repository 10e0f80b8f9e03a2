"""The sigmoid loss of the ``triton`` backend: launches of its kernel."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from llave_kernels.backends import strip_gemm, tiles
from llave_kernels.backends.protocol import SigmoidGradients
from llave_kernels.backends.sigmoid_strips import over_strips
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
    call = _Sigmoid(query, target, logit_scale, rules, logit_bias, weights)
    run = partial(call.run, call.tile())
    found = over_strips(run, query, target, logit_scale, weights, gradients=gradients)
    return call.loss, found


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
    ) -> None:
        super().__init__(query, target, scale, rules)
        pairs = self.pairs
        self.arguments = (
            self.query, self.target, scale, bias, pairs.label, pairs.query_id, pairs.target_id,
            weights,
        )  # fmt: skip
        self.loss = query.new_empty(len(query), dtype=torch.float32)

    @property
    def masked(self) -> bool:
        """As ``_Call.masked``. Losses, similarities and dS of a tile are alive together."""
        return self.query.dtype.itemsize == 2

    def run(
        self, tile: tiles.Tile, ds: Tensor | None, gain: Tensor | None, start: int, stop: int
    ) -> Tensor:
        """As ``sigmoid_strips.Run``."""
        rows = stop - start
        n_m, n_n = triton.cdiv(rows, tile.bm), triton.cdiv(len(self.target), tile.bn)
        tiles_each = math.prod(_super_tile(n_m, n_n, self.query.device))
        programs = triton.cdiv(n_m * n_n, tiles_each)
        loss = self.query.new_empty((n_n, rows), dtype=torch.float32)
        sums = self.query.new_empty((programs, 2), dtype=torch.float32)
        kernels.sigmoid_kernel[(programs,)](
            *self.arguments, gain, ds, loss, sums, start, stop, *self.sizes[1:],
            0 if ds is None else ds.stride(0), tiles_each, **self.options(tile),
        )  # fmt: skip
        torch.sum(loss, 0, out=self.loss[start:stop])
        return sums.sum(0)

    def trial(self, tile: tiles.Tile) -> None:
        ds = strip_gemm.strip_workspace(self.query, self.target)
        self.run(tile, ds, None, 0, len(ds))
