"""The sigmoid loss of the ``torch`` backend.

A pair's loss and its gradient need no other pair. So the strip's gradient GEMMs run right after its
loss, and one pass of 6NMD serves all. Without gradients it takes 2NMD.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from llave_kernels.backends.products import gain
from llave_kernels.backends.protocol import SigmoidGradients
from llave_kernels.backends.torch_gradients import StripGradients
from llave_kernels.backends.torch_strips import INF, Strips, rounds_gradients
from llave_kernels.precision import accumulation_dtype
from llave_kernels.rules import ELSEWHERE, Rules

# Above this, softplus(z) is z in float64 too.
LINEAR = 40.0


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
    dtype = accumulation_dtype(query.dtype)
    kept = query.new_empty((len(target), 0), dtype=dtype)
    strips = Strips(query, target, logit_scale, rules, kept)
    positive = strips.positive + logit_bias
    loss, slope = softplus(-positive, threshold=LINEAR), -torch.sigmoid(-positive)
    if rules.labels is not None:
        loss, slope = (x.masked_fill(rules.labels == ELSEWHERE, 0.0) for x in (loss, slope))
    ones = torch.ones_like(loss) if weights is None else weights
    factor = gain(logit_scale, ones) if rounds_gradients(query) else None
    steepness = ones * (logit_scale if factor is None else logit_scale * factor)  # dS over dz
    sums = StripGradients(strips, dtype, factor) if gradients else None

    def accumulate(strip: slice) -> None:  # a function, to free a strip before the next is made
        z = strips.similarity(strip).mul_(logit_scale).add_(logit_bias)
        if rules.query_ids is not None and rules.target_ids is not None:
            z.masked_fill_(rules.target_ids[:, None] == rules.query_ids[strip], -INF)
        strips.put_positives(strip, z, -INF)
        loss[strip] += softplus(z, threshold=LINEAR).sum(0)
        if sums is None:
            return
        dz = z.sigmoid_()
        d_positive = slope[strip] * steepness[strip]
        slope[strip] += dz.sum(0)
        sums.add(strip, dz.mul_(steepness[strip]), d_positive)

    for strip in strips:
        accumulate(strip)
    if sums is None:
        return loss, None
    return loss, SigmoidGradients(*sums.result()[:3], (slope * ones).sum())
