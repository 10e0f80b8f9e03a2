"""The loss and its gradients in float64, a strip of rows at a time, so that large N is affordable.

Written from the formula and on its own: neither autograd nor any implementation under test.
``truth.py JOB.json`` computes it for each pair of alphas in the job and saves it to a file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.data import precision

STRIP = 2**22  # elements of a strip of similarities, 32 MiB


def truth(
    query: Tensor, target: Tensor, scale: float, query_alpha: float, target_alpha: float | None
) -> list[Tensor]:
    """Loss (), dQ (N, D) and dT (M, D), float64; ``target_alpha`` None: query direction only.

    Targets are N positives, then blocks of N mined negatives. Rows of a direction contribute
    ``log sum_j exp z_ij - z_ii`` with ``z = scale * s``, plus ``alpha * s``, without a gradient of
    its own, off the row's own targets.
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
            # A view of the positives, and of the rows' own mined negatives: they carry no weight.
            own_targets = logits.unflatten(1, (-1, len(own))).diagonal(start, 0, 2)
            unweighted = scale * own_targets
            logits *= scale + alpha
            own_targets.copy_(unweighted)
            diagonal, positive = own_targets[0], unweighted[0]
            diagonal.fill_(-torch.inf)
            negatives = logits.logsumexp(1)
            # softplus(gap), which keeps its digits where the loss is close to 0
            gap = negatives - positive
            loss += share * torch.logaddexp(gap, torch.zeros_like(gap)).sum()
            weight = share * scale * gap.sigmoid()
            logits -= negatives[:, None]
            logits.exp_().mul_(weight[:, None])
            diagonal.copy_(-weight)
            d_own[here] += logits @ other
            d_other += logits.T @ own[here]
    return [loss, *gradients]


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    inputs = torch.load(job["inputs"], weights_only=True)
    query, target = (x.to(job["device"], precision(job["dtype"])) for x in inputs)
    for file, alphas in job["files"].items():
        torch.save([x.cpu() for x in truth(query, target, job["scale"], *alphas)], file)


if __name__ == "__main__":
    main(sys.argv[1])
