"""The loss and its gradients in float64, a strip of rows at a time, which bounds the memory.

The code follows the formula. It uses neither autograd nor an implementation under test. Losses
other than the contrastive one have a dense formula, which autograd differentiates.
``truth.py JOB.json`` computes them for each pair of alphas in the job and saves them to a file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.data import precision
from benchmarks.losses import LOSSES
from benchmarks.peer import Job, Loss

STRIP = 2**22  # elements of a strip of similarities, 32 MiB


def truth(
    query: Tensor, target: Tensor, scale: float, query_alpha: float, target_alpha: float | None
) -> list[Tensor]:
    """Loss (), dQ (N, D) and dT (M, D), float64.

    Each row contributes ``log sum_j exp z_ij - z_ii``. Its own targets have ``z = scale * s``. All
    others have ``z = (scale + alpha) * s``, where the part with alpha has no gradient.

    Args:
        query: (N, D).
        target: (M, D), N positives, then blocks of N mined negatives.
        target_alpha: None leaves the target direction out.
    """
    query, target = query.double(), target.double()
    directions = [(query, target, query_alpha)]
    if target_alpha is not None:
        directions.append((target[: len(query)], query, target_alpha))
    loss = query.new_zeros(())
    gradients = [torch.zeros_like(query), torch.zeros_like(target)]
    for direction, (own, other, alpha) in enumerate(directions):
        d_own, d_other = gradients[direction][: len(own)], gradients[1 - direction]
        share = 1 / (len(query) * len(directions))
        rows = max(1, STRIP // len(other))
        for start in range(0, len(own), rows):
            here = slice(start, min(start + rows, len(own)))
            logits = own[here] @ other.T
            # A view of the rows' own targets: the positives, and mined negatives without weight.
            own_targets = logits.unflatten(1, (-1, len(own))).diagonal(start, 0, 2)
            unweighted = scale * own_targets
            logits *= scale + alpha
            own_targets.copy_(unweighted)
            diagonal, positive = own_targets[0], unweighted[0]
            diagonal.fill_(-torch.inf)
            negatives = logits.logsumexp(1)
            # This softplus keeps its digits where the loss is close to 0.
            gap = negatives - positive
            loss += share * torch.logaddexp(gap, torch.zeros_like(gap)).sum()
            weight = share * scale * gap.sigmoid()
            logits -= negatives[:, None]
            logits.exp_().mul_(weight[:, None])
            diagonal.copy_(-weight)
            d_own[here] += logits @ other
            d_other += logits.T @ own[here]
    return [loss, *gradients]


def differentiated(loss: Loss, query: Tensor, target: Tensor) -> list[Tensor]:
    """Loss (), dQ (N, D) and dT (M, D) of a dense formula, float64, by autograd."""
    leaves = [x.double().requires_grad_() for x in (query, target)]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    inputs = torch.load(job["inputs"], weights_only=True)
    query, target = (x.to(job["device"], precision(job["dtype"])) for x in inputs)
    formula = LOSSES[job["loss"]].truth
    for file, alphas in job["files"].items():
        if formula is None:
            found = truth(query, target, job["scale"], *alphas)
        else:
            found = differentiated(formula(Job(alphas[0], alphas[1] is not None)), query, target)
        torch.save([x.cpu() for x in found], file)


if __name__ == "__main__":
    main(sys.argv[1])
