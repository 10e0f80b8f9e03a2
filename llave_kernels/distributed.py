"""The loss over the batch of all processes.

Each process gathers the targets of all processes, with autograd. It computes its own rows of the
N x M similarity matrix, so its query direction is complete. In the target direction it has a part
of every column's sum. Each process then receives the parts of its own columns, M floats in all.

The usual way gathers both sides and computes two blocks. That takes twice the products and twice
the traffic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Unpack

from llave_kernels import checks, dispatch, functional, losses, transforms
from llave_kernels.agreement import Group, Peer, Terms, agree, learns
from llave_kernels.precision import accumulation_dtype, autocast
from llave_kernels.rules import RuleArguments, Rules, RuleSettings, at_labels, inside


# torch.compile breaks the graph here. The sizes to exchange are known only after the processes have
# agreed, and the products are custom operators anyway.
@functional.shows_rules
@torch.compiler.disable  # type: ignore[untyped-decorator]
def distributed_contrastive_loss(
    query: Tensor,
    target: Tensor,
    *,
    group: Group = None,
    logit_scale: float | Tensor = 50.0,
    reduction: str = "mean",
    backend: str = "auto",
    **rules: Unpack[RuleArguments],
) -> Tensor:
    """``hardness_weighted_contrastive_loss`` over the rows of all processes of a group.

    Use ``reduction="mean"`` under data parallelism that averages gradients (DDP, FSDP). The
    gradients of all parameters then equal those of the mean over the global batch. The average of
    the returned values is that mean. Batch sizes may differ between processes.

    Args:
        query: (N_local, D) this process's queries.
        target: (M_local, D) this process's targets: its rows' positives and their mined negatives.
        group: process group. Default: all processes.
        reduction: ``"mean"``: the sum over this process's rows, times the number of processes,
            divided by the global number of rows. ``"sum"``: the sum over this process's rows.
            Averaged gradients are then those of the global sum divided by the number of processes.
            ``"none"``: (N_local,) one loss per row of this process.
        logit_scale, backend: as in ``hardness_weighted_contrastive_loss``.
        rules: as in ``hardness_weighted_contrastive_loss``. ``labels`` (N_local,) and ``owners``
            (M_local,) are columns of this process's own ``target``. ``query_ids`` (N_local,) and
            ``target_ids`` (M_local,) are compared across processes. All settings must be the same
            on every process.

    Returns:
        0-d tensor or (N_local,). float32, or float64 for float64 inputs.

    Raises:
        RuntimeError: torch.distributed is not initialised, or another process refused its
            arguments.
        TypeError, ValueError: as in ``hardness_weighted_contrastive_loss``. Every process raises
            ValueError if width, dtype, settings or the inputs that require a gradient differ
            between processes. A tensor ``logit_scale`` on a GPU is compared in a later call, once
            it has been copied. Waiting for it would synchronise.
    """
    given = {"logit_scale": logit_scale, "reduction": reduction, "backend": backend}
    return loss_over(group, lambda: {"query": query, "target": target, **given, **rules}, {})


class Call(NamedTuple):
    """Checked arguments of a loss."""

    query: Tensor
    target: Tensor
    scale: float | Tensor
    rules: Rules
    reduction: str
    backend: str


def loss_over(
    group: Group, arguments: Callable[[], Mapping[str, Any]], settings: Mapping[str, Any]
) -> Tensor:
    """``distributed_contrastive_loss`` of arguments that a function makes.

    Args:
        arguments: returns the arguments by name. If it raises, the other processes raise too.
        settings: what else must be the same on every process, keyed by the name used in messages.
    """
    call, peers = agree(lambda: checked(**arguments(), settings=settings), group)
    query, target, scale, own, reduction, name = call
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    columns = [peer.columns for peer in peers]
    rules = _global_rules(query, target, own, name, peers, rank, group)
    everything: Tensor = _GatherRows.apply(target, columns, group)
    logits = functional.logsumexp(query, everything, scale, rules, name)
    target_lse = logits.target
    if target_lse is not None:
        target_lse = _OwnColumns.apply(target_lse, columns, group)
        target_lse = at_labels(target_lse, own.labels, len(query))
    loss = losses.loss_of_rows(logits.positive, logits.query, target_lse)
    if reduction == "mean":
        return loss.sum() * (world / sum(peer.rows for peer in peers))
    return losses.reduce(loss, reduction)


def checked(
    query: Tensor,
    target: Tensor,
    *,
    settings: Mapping[str, Any],
    logit_scale: float | Tensor = 50.0,
    reduction: str = "mean",
    backend: str = "auto",
    **given: Unpack[RuleArguments],
) -> tuple[Call, Terms]:
    """Checked arguments of ``distributed_contrastive_loss``, and what other processes are told."""
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    query, target = autocast(query, target)
    scale, rules = functional.resolve(query, target, logit_scale, **given)
    name = dispatch.choose(backend, query, target, rules)
    told: dict[str, Any] = {
        "the loss": "distributed_contrastive_loss",
        "the width of the embeddings": query.shape[1],
        "their dtype": query.dtype,
        "requires_grad of query": learns(query),
        "requires_grad of target": learns(target),
        "requires_grad of logit_scale": isinstance(scale, Tensor) and learns(scale),
        "presence of ids": rules.query_ids is not None,
        "reduction": reduction,
        "backend": backend,
    }
    held = RuleSettings.__annotations__
    told |= {name: value for name, value in rules.arguments(len(target)).items() if name in held}
    # A number is compared without a look at the device.
    known = torch.as_tensor(scale, dtype=accumulation_dtype(query.dtype))
    part = Peer(len(query), len(target), rules.owners is not None)
    call = Call(query, target, scale, rules, reduction, name)
    return call, Terms(part, told | dict(settings), known)


def _global_rules(
    query: Tensor,
    target: Tensor,
    rules: Rules,
    backend: str,
    peers: list[Peer],
    rank: int,
    group: Group,
) -> Rules:
    """This process's rules, with columns numbered over the targets of all processes."""
    columns = [peer.columns for peer in peers]
    offset = sum(columns[:rank])

    def counted_over_all(own: Tensor) -> Tensor:  # a number outside stays outside
        return torch.where(inside(own, len(target))[0], own + offset, -1)

    owners = column_limit = None
    if any(peer.owners for peer in peers):
        own = rules.owners
        if own is None:
            own = torch.arange(len(target), device=target.device)
        owners = gather_rows(counted_over_all(own), columns, group)
    if rules.margin is not None and rules.symmetric:
        limits = dispatch.named(backend).margin_limit(query, target, rules.labels, rules.margin)
        column_limit = gather_rows(rules.column_limits(limits, len(target)), columns, group)
    target_ids = rules.target_ids
    return rules._replace(
        labels=counted_over_all(rules.labels_of(query)),
        owners=owners,
        target_ids=None if target_ids is None else gather_rows(target_ids, columns, group),
        column_limit=column_limit,
    )


def gather_rows(x: Tensor, sizes: list[int], group: Group) -> Tensor:
    """Concatenate the processes' tensors, which have ``sizes`` rows. They are padded on the way."""
    longest = max(sizes)
    if len(x) == longest:
        padded = x.contiguous()
    else:
        padded = x.new_zeros((longest, *x.shape[1:]))
        padded[: len(x)] = x
    everything = x.new_empty((longest * len(sizes), *x.shape[1:]))
    dist.all_gather_into_tensor(everything, padded, group)
    if min(sizes) == longest:
        return everything
    parts = zip(torch.split(everything, longest), sizes, strict=True)
    return torch.cat([part[:size] for part, size in parts])


class _GatherRows(torch.autograd.Function):
    """``gather_rows`` with a backward. Each process receives the summed gradients of its rows."""

    jvp = staticmethod(transforms.refuse_forward_mode)

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: Group) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return gather_rows(x, sizes, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        sizes, longest = ctx.sizes, max(ctx.sizes)
        if min(sizes) != longest:
            padded = gradient.new_zeros((len(sizes), longest, *gradient.shape[1:]))
            for block, part in zip(padded, torch.split(gradient, sizes), strict=True):
                block[: len(part)] = part
            gradient = padded.flatten(0, 1)
        own = gradient.new_empty((longest, *gradient.shape[1:]))
        dist.reduce_scatter_tensor(own, gradient.contiguous(), group=ctx.group)
        return own[: sizes[dist.get_rank(ctx.group)]], None, None


class _OwnColumns(torch.autograd.Function):
    """Combine the column log-sum-exps of all processes.

    The input (M,) covers all columns over this process's rows. The output (M_local,) covers this
    process's columns over all rows.
    """

    jvp = staticmethod(transforms.refuse_forward_mode)

    @staticmethod
    def forward(ctx: Any, partial: Tensor, sizes: list[int], group: Group) -> Tensor:
        world, own = len(sizes), sizes[dist.get_rank(group)]
        parts = partial.new_empty(world * own)
        dist.all_to_all_single(parts, partial.contiguous(), [own] * world, sizes, group)
        parts = parts.view(world, own)
        lse = torch.logsumexp(parts, 0)
        # A column without a negative gets no gradient.
        share = torch.exp(parts - lse.masked_fill(lse == -math.inf, 0.0))
        ctx.save_for_backward(share)
        ctx.sizes, ctx.group = sizes, group
        return lse

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (share,) = ctx.saved_tensors
        world, own = share.shape
        out = gradient.new_empty(sum(ctx.sizes))
        dist.all_to_all_single(
            out, (share * gradient).flatten(), ctx.sizes, [own] * world, ctx.group
        )
        return out, None, None
