"""The loss over the batch of all processes.

Each process computes one block of the N x M similarity matrix (``grid``). It gathers the block's
queries and targets with autograd. The block has a part of the sum of each of its rows and columns.
Each process receives the parts of its own rows and columns from the processes that have them.

The usual way gathers all queries and all targets and computes two blocks. That takes twice the
products, and traffic that grows with the number of processes instead of its square root.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from llave_kernels import checks, dispatch, exchange, functional, logits, losses, matryoshka
from llave_kernels.agreement import Group, Peer, Terms, agree, learns
from llave_kernels.grid import Block, Side, block_of
from llave_kernels.precision import accumulation_dtype, autocast
from llave_kernels.rules import (
    ELSEWHERE,
    RuleArguments,
    Rules,
    RuleSettings,
    at_labels,
    biases_of,
    inside,
)
from llave_kernels.within import blocks

OUTSIDE = -2  # a label or an owner that is no column, and is not ``ELSEWHERE``


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
    within: Sequence[str] = (),
    reduction: str = "mean",
    backend: str = "auto",
    matryoshka_dims: Sequence[int] | None = None,
    matryoshka_weights: Sequence[float] | None = None,
    **rules: Unpack[RuleArguments],
) -> Tensor:
    """``hardness_weighted_contrastive_loss`` over the rows of all processes of a group.

    Use ``reduction="mean"`` under data parallelism that averages gradients (DDP, FSDP). The
    gradients of all parameters then equal those of the mean over the global batch. The average of
    the returned values is that mean. Batch sizes may differ between processes.

    Args:
        query: (N_local, D) this process's queries.
        target: (M_local, D) this process's targets: its rows' positives and their mined negatives.
        group: process group. Default: all processes. They are arranged in the grid in which a
            process receives least (``grid.row_length``). If the group's backend is neither gloo nor
            nccl, C is 1. A 2-D ``DeviceMesh`` is taken as the grid: its first dimension is R, its
            second C.
        reduction: ``"mean"``: the sum over this process's rows, times the number of processes,
            divided by the global number of rows. ``"sum"``: the sum over this process's rows.
            Averaged gradients are then those of the global sum divided by the number of processes.
            ``"none"``: (N_local,) one loss per row of this process.
        logit_scale, backend, matryoshka_dims, matryoshka_weights: as in
            ``hardness_weighted_contrastive_loss``.
        within: as there. A process compares its own queries with all queries, and its positives
            with all targets. So each of these pairs is computed for both of its rows, and the rows
            of a side are received once more.
        rules: as in ``hardness_weighted_contrastive_loss``. ``labels`` (N_local,) and ``owners``
            (M_local,) are columns of this process's own ``target``. ``query_ids`` (N_local,) and
            ``target_ids`` (M_local,) are compared across processes. ``query_bias`` (N_local,) and
            ``target_bias`` (M_local,) are of this process's rows. All settings must be the same on
            every process.

    Returns:
        0-d tensor or (N_local,). float32, or float64 for float64 inputs.

    Raises:
        RuntimeError: torch.distributed is not initialised, or another process refused its
            arguments.
        TypeError, ValueError: as in ``hardness_weighted_contrastive_loss``. ``group`` is a mesh of
            another number of dimensions or without this process. Every process raises
            ValueError if width, dtype, settings or the inputs that require a gradient differ
            between processes. A tensor ``logit_scale`` on a GPU is compared in a later call, once
            it has been copied. Waiting for it would synchronise.
    """
    given = {
        "logit_scale": logit_scale, "within": within, "reduction": reduction, "backend": backend,
        "matryoshka_dims": matryoshka_dims, "matryoshka_weights": matryoshka_weights,
    }  # fmt: skip
    return loss_over(group, lambda: {"query": query, "target": target, **given, **rules}, {})


class Call(NamedTuple):
    """Checked arguments of a loss."""

    query: Tensor
    target: Tensor
    scale: float | Tensor
    rules: Rules
    within: tuple[str, ...]
    reduction: str
    backend: str
    nested: matryoshka.Matryoshka | None


def loss_over(
    group: Group, arguments: Callable[[], Mapping[str, Any]], settings: Mapping[str, Any]
) -> Tensor:
    """``distributed_contrastive_loss`` of arguments that a function makes.

    Args:
        arguments: returns the arguments by name. If it raises, the other processes raise too.
        settings: what else must be the same on every process, keyed by the name used in messages.
    """
    call, peers = agree(lambda: checked(**arguments(), settings=settings), group)
    found = own_logsumexps(call, group, peers)
    loss = losses.loss_of_rows(*found)
    if call.nested is not None:
        loss = call.nested.summed(loss)
    if call.reduction == "mean":
        return loss.sum() * (len(peers) / sum(peer.rows for peer in peers))
    return losses.reduce(loss, call.reduction)


def own_logsumexps(
    call: Call, group: Group, peers: list[Peer]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What the losses of this process's rows are made from: ``losses.loss_of_rows``."""
    found = _logsumexps(call, block_of(group, peers, call.query.device))
    if not call.within:
        return *found, None
    query, target, _, rules, sides, _, name, nested = call
    limits = logits.margin_limits(query, target, rules, name, nested and nested.dims)
    rules, limit = rules._replace(row_limit=limits), dispatch.named(name).margin_limit
    parts = []
    for side, own in zip(sides, blocks(query, target, rules, sides, limit), strict=True):
        places = peers
        if side == "query":
            places = [peer._replace(columns=peer.rows, owners=False) for peer in peers]
        part = call._replace(query=own.query, target=own.target, rules=own.rules)
        parts.append(_logsumexps(part, block_of(group, places, query.device))[1])
    return *found, losses.joined(*parts)


def _logsumexps(call: Call, block: Block) -> tuple[Tensor, Tensor, Tensor | None]:
    """The logits of this process's positives, and the log-sum-exps of its rows and columns.

    Each is (N_local,), or (K, N_local) for K prefixes.
    """
    query, target, scale, own, _, _, name, nested = call
    dims = nested and nested.dims
    inputs = exchange.Inputs(query, target, block)
    rules = block_rules(query, target, own, name, block, dims)
    queries, targets = inputs.result()
    del inputs  # and the padded rows of an uneven batch
    found = logits.logsumexp(queries, targets, scale, rules, name, dims)
    query_lse = _last_first(exchange.combined, found.query, block.rows)
    target_lse = found.target
    if target_lse is not None:
        target_lse = _last_first(exchange.combined, target_lse, block.columns)
        target_lse = at_labels(target_lse, own.labels, len(query))
    positive = _last_first(lambda x, side: side.own(x), found.positive, block.rows)
    return positive, query_lse, target_lse


def _last_first(function: Callable[[Tensor, Side], Tensor], x: Tensor, side: Side) -> Tensor:
    """The function of x (..., R) with its last dimension first, which processes exchange."""
    return function(x.movedim(-1, 0), side).movedim(0, -1)


def checked(
    query: Tensor,
    target: Tensor,
    *,
    settings: Mapping[str, Any],
    logit_scale: float | Tensor = 50.0,
    within: Sequence[str] = (),
    reduction: str = "mean",
    backend: str = "auto",
    matryoshka_dims: Sequence[int] | None = None,
    matryoshka_weights: Sequence[float] | None = None,
    **given: Unpack[RuleArguments],
) -> tuple[Call, Terms]:
    """Checked arguments of ``distributed_contrastive_loss``, and what other processes are told."""
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    query, target = autocast(query, target)
    scale, rules = functional.resolve(query, target, logit_scale, **given)
    sides = checks.sides("within", within, rules)
    nested = matryoshka.checked(matryoshka_dims, matryoshka_weights, query.shape[1])
    name = dispatch.choose(backend, query, target, rules)
    ids = rules.query_ids is not None
    told = told_of("distributed_contrastive_loss", query, target, scale, ids, reduction, backend)
    for name_of_bias, bias in zip(("query_bias", "target_bias"), biases_of(rules), strict=True):
        told[f"presence of {name_of_bias}"] = bias is not None
        told[f"requires_grad of {name_of_bias}"] = bias is not None and learns(bias)
    told |= {
        "within": sides,
        "matryoshka_dims": nested and nested.dims,
        "matryoshka_weights": nested and nested.weights,
    }
    held = RuleSettings.__annotations__
    told |= {name: value for name, value in rules.arguments(len(target)).items() if name in held}
    # A number is compared without a look at the device.
    known = torch.as_tensor(scale, dtype=accumulation_dtype(query.dtype))
    part = Peer(len(query), len(target), rules.owners is not None)
    call = Call(query, target, scale, rules, sides, reduction, name, nested)
    return call, Terms(part, told | dict(settings), known)


def told_of(
    loss: str,
    query: Tensor,
    target: Tensor,
    scale: float | Tensor,
    ids: bool,
    reduction: str,
    backend: str,
) -> dict[str, Any]:
    """What the processes compare for every loss."""
    return {
        "the loss": loss,
        "the width of the embeddings": query.shape[1],
        "their dtype": query.dtype,
        "requires_grad of query": learns(query),
        "requires_grad of target": learns(target),
        "requires_grad of logit_scale": isinstance(scale, Tensor) and learns(scale),
        "presence of ids": ids,
        "reduction": reduction,
        "backend": backend,
    }


def block_rules(
    query: Tensor,
    target: Tensor,
    own: Rules,
    backend: str,
    block: Block,
    dims: tuple[int, ...] | None = None,
) -> Rules:
    """The rules of a block, from this process's own. Columns are numbered over the block's."""
    rows, columns, any_owners = block

    def in_block(column: Tensor) -> Tensor:  # a number outside stays outside
        return torch.where(inside(column, len(target))[0], column + columns.start, OUTSIDE)

    labels = in_block(own.labels_of(query))
    if rows.shared:
        whole = labels.new_full((sum(rows.sizes),), ELSEWHERE)
        rows.own(whole).copy_(labels)
        labels = whole
    owners = row_limit = column_limit = None
    if any_owners:
        given = own.owners
        if given is None:
            given = torch.arange(len(target), device=target.device)
        owners = exchange.gathered(in_block(given), columns)
    limits = logits.margin_limits(query, target, own, backend, dims)
    if limits is not None:
        row_limit = _last_first(exchange.gathered, limits, rows)
        if own.symmetric:
            column_limits = own.column_limits(limits, len(target))
            column_limit = _last_first(exchange.gathered, column_limits, columns)
    query_ids, target_ids = own.query_ids, own.target_ids
    query_bias, target_bias = biases_of(own)
    return own._replace(
        labels=labels,
        owners=owners,
        query_ids=None if query_ids is None else exchange.gathered(query_ids, rows),
        target_ids=None if target_ids is None else exchange.gathered(target_ids, columns),
        row_limit=row_limit,
        column_limit=column_limit,
        query_bias=None if query_bias is None else exchange.gathered(query_bias, rows),
        target_bias=None if target_bias is None else exchange.gathered(target_bias, columns),
    )
