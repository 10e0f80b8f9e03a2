"""The supervised contrastive loss: several positives a row, from groups of rows and columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llave_kernels import checks
from llave_kernels.group_losses import Call, group_losses, resolve
from llave_kernels.precision import autocast


def supervised_contrastive_loss(
    query: Tensor,
    target: Tensor | None = None,
    *,
    query_groups: Tensor,
    target_groups: Tensor | None = None,
    logit_scale: float | Tensor = 10.0,
    alpha: float = 0.0,
    denominator: str = "all",
    symmetric: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Contrastive loss with any number of positives a row (SupCon, arXiv 2004.11362), fused.

    Row i and column j are positives of each other if their groups are equal, else negatives. The
    loss of a row is the mean over its positives p of ``-log(exp(kappa s_ip) / denominator)``::

        z_ij = kappa s_ij + alpha sg(s_ij)                        j a negative of i
        n_i  = log of the sum of exp(z_ij) over the negatives
        "all"         log(exp(n_i) + sum over positives of exp(kappa s_ip)) - mean of kappa s_ip
        "negatives"   n_i - mean of kappa s_ip
        "pair"        mean of softplus(n_i - kappa s_ip)

    With one positive in each row, ``"all"`` and ``"pair"`` are both InfoNCE. With k positives,
    ``"all"`` is at least log k. ``"negatives"`` has no lower bound.

    Without ``target`` a batch stands against itself, and a row is not its own positive or negative.
    A large N x M matrix is never stored. Rows are not normalised.

    Args:
        query: (N, D) float32, bfloat16, float16 or float64 (``torch`` backend), any strides.
        target: (M, D), same dtype and device. Default: ``query``.
        query_groups: (N,) int64, any numbers: a class, the image of a caption.
        target_groups: (M,) int64. Needed with ``target``, and only then.
        logit_scale: kappa = 1 / temperature, a positive number or a tensor of one element, which
            may require grad.
        alpha: hardness strength of the negatives, >= 0. Positives carry no weight. Default: 0.
        denominator: ``"all"``: Khosla et al.'s ``L_out``. ``"negatives"``: decoupled, the positives
            are not in it. ``"pair"``: NT-Xent of each positive pair. It also computes the products
            of the positive pairs: few for small groups, N x M / 2 for two groups of equal size.
        symmetric: average with the same loss of the columns over the rows. Needs ``target``.
        reduction: ``"mean"`` over the rows with a positive, ``"sum"``, or ``"none"``: (N,) a loss
            per row, with ``symmetric=False``.
        backend: ``"auto"`` or a name from ``available_backends()``.

    Returns:
        0-d tensor, or (N,) with ``reduction="none"``. float32, or float64 for float64 inputs. A row
        without a positive has no loss: 0, and it does not count in the mean. Without a negative,
        the loss of ``"negatives"`` and ``"pair"`` is 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: wrong shape, device or value.
        RuntimeError: as in ``hardness_weighted_contrastive_loss``.

    Note:
        On a GPU ``"pair"`` reads the groups' places, and the host waits for them. It cannot be
        captured in a CUDA graph.
    """
    call = checked(
        query, target, query_groups, target_groups, logit_scale=logit_scale, alpha=alpha,
        denominator=denominator, symmetric=symmetric, reduction=reduction, backend=backend,
    )  # fmt: skip
    found = group_losses(call)
    if reduction == "none":
        return found[0].losses
    totals = [x.losses.sum() for x in found]
    if reduction == "mean":
        known = [(x.counts > 0).sum().clamp(min=1) for x in found]
        totals = [total / count for total, count in zip(totals, known, strict=True)]
    return totals[0] if len(totals) == 1 else (totals[0] + totals[1]) / 2


def checked(
    query: Tensor,
    target: Tensor | None,
    query_groups: Tensor,
    target_groups: Tensor | None,
    *,
    symmetric: bool,
    reduction: str,
    **settings: Any,
) -> Call:
    """Checked arguments of ``supervised_contrastive_loss``, with autocast applied."""
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    symmetric = checks.flag("symmetric", symmetric)
    if symmetric and reduction == "none":
        raise ValueError(
            'reduction="none" gives a loss per row and needs symmetric=False; swap the sides for '
            "the losses of the columns"
        )
    if target is None and (symmetric or target_groups is not None):
        name = "symmetric=True" if symmetric else "target_groups"
        raise ValueError(
            f"{name} needs target; without it the batch stands against itself, and both "
            "directions are the same"
        )
    own = None
    if target is None:
        checks.tensor("query", query)
        checks.embeddings(query, query)
        target, target_groups = query, query_groups
        own = torch.arange(query.shape[0], device=query.device)
    query, target = autocast(query, target)
    return resolve(query, target, query_groups, target_groups, own, symmetric=symmetric, **settings)
