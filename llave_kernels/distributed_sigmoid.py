"""The sigmoid loss over the batch of all processes.

The loss is a plain sum over pairs. So each process computes its block of the matrix (``grid``) with
all gradients in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from llave_kernels import checks, exchange, sigmoid
from llave_kernels.agreement import Group, Peer, Terms, agree, learns
from llave_kernels.distributed import block_rules, told_of
from llave_kernels.grid import block_of
from llave_kernels.precision import autocast


# torch.compile breaks the graph here, as in ``distributed_contrastive_loss``.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def distributed_sigmoid_loss(
    query: Tensor,
    target: Tensor,
    *,
    group: Group = None,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    reduction: str = "mean",
    backend: str = "auto",
    **pairs: Unpack[sigmoid.SigmoidPairs],
) -> Tensor:
    """``sigmoid_contrastive_loss`` over the rows of all processes of a group.

    The contract is that of ``distributed_contrastive_loss``: with ``reduction="mean"`` under data
    parallelism that averages gradients, all parameters have the gradients of the global batch.
    Batch sizes may differ between processes.

    Args:
        query: (N_local, D) this process's queries.
        target: (M_local, D) this process's targets.
        group: as in ``distributed_contrastive_loss``.
        reduction: ``"mean"``: the sum over this process's rows, times the number of processes,
            divided by the global number of rows. ``"sum"``: the sum over this process's rows. For
            both, the upstream gradient must be the same on every process. ``"none"``: (N_local,)
            one loss per row of this process.
        logit_scale, logit_bias, backend: as in ``sigmoid_contrastive_loss``. Scale and bias must be
            the same on every process. A tensor bias on a GPU is not compared.
        pairs: as in ``sigmoid_contrastive_loss``. ``labels`` (N_local,) are columns of this
            process's own ``target``. ``query_ids`` (N_local,) and ``target_ids`` (M_local,) are
            compared across processes.

    Returns:
        0-d tensor or (N_local,). float32, or float64 for float64 inputs.

    Raises:
        RuntimeError, TypeError, ValueError: as in ``distributed_contrastive_loss``.
    """
    given: dict[str, Any] = {"logit_scale": logit_scale, "logit_bias": logit_bias}
    given |= {"reduction": reduction, "backend": backend}
    return loss_over(group, lambda: {"query": query, "target": target, **given, **pairs})


@torch.compiler.disable  # type: ignore[untyped-decorator]
def loss_over(group: Group, arguments: Callable[[], Mapping[str, Any]]) -> Tensor:
    """``distributed_sigmoid_loss`` of arguments that a function makes.

    If the function raises, the other processes raise too.
    """
    (own, reduction), peers = agree(lambda: _checked(**arguments()), group)
    block = block_of(group, peers, own.query.device)
    inputs = exchange.Inputs(own.query, own.target, block)
    rules = block_rules(own.query, own.target, own.rules, own.backend, block)
    queries, targets = inputs.result()
    del inputs  # and the padded rows of an uneven batch
    call = own._replace(query=queries, target=targets, rules=rules)
    if reduction == "none":
        return exchange.summed(sigmoid.rows(call), block.rows)
    loss, rows = sigmoid.losses_and_sum(call)
    if block.rows.shared:
        # The value is of this process's rows. The gradient is of its block. Over all processes,
        # both add up to the same.
        loss = loss + (exchange.summed(rows, block.rows).sum() - loss.detach())
    if reduction == "mean":
        loss = loss * (len(peers) / sum(peer.rows for peer in peers))
    return loss


def _checked(
    query: Tensor,
    target: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    reduction: str = "mean",
    backend: str = "auto",
    **pairs: Unpack[sigmoid.SigmoidPairs],
) -> tuple[tuple[sigmoid.Call, str], Terms]:
    """Checked arguments, and what other processes are told."""
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    query, target = autocast(query, target)
    call = sigmoid.resolve(query, target, logit_scale, logit_bias, backend, **pairs)
    ids = call.rules.query_ids is not None
    told = told_of("distributed_sigmoid_loss", query, target, call.scale, ids, reduction, backend)
    told["requires_grad of logit_bias"] = learns(call.bias)
    # Numbers are compared without a look at the device.
    scale, bias = (torch.as_tensor(x, dtype=call.scale.dtype) for x in (logit_scale, logit_bias))
    told["logit_bias"] = next(iter(checks.read(bias, Tensor.max)), "on a device")
    return (call, reduction), Terms(Peer(len(query), len(target)), told, scale)
