"""The sigmoid loss of the ``cuda`` backend: launches of its kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from llave_kernels.backends import cuda
from llave_kernels.backends.protocol import SigmoidGradients
from llave_kernels.backends.sigmoid_strips import over_strips
from llave_kernels.rules import Rules


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
    call = cuda._Call(query, target, logit_scale, rules)
    loss = query.new_empty(len(query), dtype=torch.float32)

    def run(ds: Tensor | None, gain: Tensor | None, start: int, stop: int) -> Tensor:
        most_parts, most_sums = cuda._cuda.most_sigmoid_parts(call.problem, stop - start)
        parts = loss.new_empty((most_parts, stop - start))
        sums = loss.new_empty((most_sums, 2))
        row_parts, count = cuda._cuda.sigmoid(
            **call.launch,
            start=start,
            stop=stop,
            bias=logit_bias.data_ptr(),
            weights=cuda._address(weights),
            gain=cuda._address(gain),
            ds=cuda._address(ds),
            pitch=0 if ds is None else ds.stride(0),
            loss_parts=parts.data_ptr(),
            sums=sums.data_ptr(),
        )
        torch.sum(parts[:row_parts], 0, out=loss[start:stop])
        return sums[:count].sum(0)

    return loss, over_strips(run, query, target, logit_scale, weights, gradients=gradients)
