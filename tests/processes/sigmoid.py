"""The functions that tests/llave_kernels/test_distributed_sigmoid.py runs in several processes."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from llave_kernels import SigmoidContrastiveLoss
from llave_kernels.distributed_sigmoid import distributed_sigmoid_loss
from llave_kernels.reference import reference_sigmoid_loss
from tests.processes.cases import Batch, encoder, said

START = 9.0, -8.0
CASES = [
    (kinds, uneven, reduction)
    for kinds in ((), ("labels",), ("labels", "ids"))
    for uneven in (False, True)
    for reduction in ("mean", "sum", "none")
]
EXCHANGES = ("bidir", "shift", "reduce", "gather", None)


def known(rules: dict[str, Any]) -> dict[str, Any]:
    """The rules that the sigmoid loss takes."""
    return {name: x for name, x in rules.items() if name != "owners"}


def learned() -> list[Tensor]:
    return [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in START]


def rows_share(reduction: str, loss: Tensor) -> Tensor:
    """A total that gives each row of a loss of rows a weight of its own, by its value."""
    return (loss * loss.detach().sin()).sum() if reduction == "none" else loss


def of_one_process(world: int, case: tuple[Any, ...]) -> list[Tensor]:
    """The rows' losses over the whole batch, and the gradients of encoder, scale and bias."""
    kinds, uneven, reduction = case
    query, target, rules = Batch(world, kinds, uneven=uneven).whole()
    model, scales = encoder(), learned()
    pair = [normalize(model(x), dim=1) for x in (query, target)]
    given = {"logit_scale": scales[0], "logit_bias": scales[1], **known(rules)}
    rows = reference_sigmoid_loss(*pair, reduction="none", **given)
    rows_share(reduction, rows if reduction == "none" else rows.sum()).backward()
    parts = [x.detach() for x in rows.split(Batch(world, kinds, uneven=uneven).rows)]
    return [*parts, *gradients(model, scales)]


def gradients(model: torch.nn.Linear, scales: list[Tensor]) -> list[Tensor]:
    found = [model.weight.grad, model.bias.grad, *(x.grad for x in scales)]
    return [x for x in found if x is not None]


def losses() -> dict[tuple[Any, ...], list[Tensor]]:
    """For every case this process's loss and gradients."""
    rank, world = dist.get_rank(), dist.get_world_size()
    results = {}
    for case in CASES:
        kinds, uneven, reduction = case
        batch, model, scales = Batch(world, kinds, uneven=uneven), encoder(), learned()
        pair = [normalize(model(x[rank]), dim=1) for x in (batch.query, batch.target)]
        loss = distributed_sigmoid_loss(
            *pair, logit_scale=scales[0], logit_bias=scales[1], reduction=reduction,
            **known(batch.rules[rank]),
        )  # fmt: skip
        rows_share(reduction, loss).backward()
        results[case] = [loss.detach(), *gradients(model, scales)]
    return results


def open_clip_settings() -> list[tuple[str, list[Tensor], list[Tensor]]]:
    """For each setting, this process's loss and gradients from OpenCLIP's class and from ours."""
    import torch.distributed.nn  # the host does not import it
    from open_clip.loss import SigLipLoss as HostLoss

    from llave_kernels.integrations.open_clip import SigLipLoss

    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    pair = [normalize(torch.randn(world, 5, 8), dim=-1)[rank] for _ in range(2)]
    results = []
    for exchange, cache, output_dict in itertools.product(EXCHANGES, (True, False), (True, False)):
        both = []
        for kind in (HostLoss, SigLipLoss):
            inputs = [x.clone().requires_grad_() for x in pair]
            inputs += [torch.tensor(x, requires_grad=True) for x in (10.0, -10.0)]
            loss = kind(cache, rank, world, exchange)(*inputs, output_dict=output_dict)
            loss = loss["contrastive_loss"] if output_dict else loss
            loss.backward()
            both.append([loss.detach(), *(x.grad for x in inputs)])
        results.append((f"{exchange=} {cache=} {output_dict=}", *both))
    return results


def mistakes() -> dict[str, str]:
    """The errors when process 1 passes another argument than the rest."""
    from llave_kernels.integrations.open_clip import SigLipLoss

    odd, world = dist.get_rank() == 1, dist.get_world_size()
    pair = [normalize(torch.randn(4, 5), dim=1) for _ in range(2)]

    def loss(scale: Any = 10.0, bias: Any = -10.0, **given: Any) -> str:
        call = {"logit_scale": scale, "logit_bias": bias, **given}
        return said(lambda: distributed_sigmoid_loss(*pair, **call))

    return {
        "logit_scale": loss(scale=10.0 + odd),
        "logit_bias": loss(bias=-10.0 - odd),
        "a bias's tensor": loss(bias=torch.tensor(-10.0 - odd)),
        "its gradient": loss(bias=torch.tensor(-10.0, requires_grad=odd)),
        "reduction": loss(reduction="sum" if odd else "mean"),
        "refused": loss(reduction="avg" if odd else "mean"),
        "a setting of another loss": loss(owners=range(4)),
        "world_size": said(lambda: SigLipLoss(world_size=world + odd)(*pair, 10.0, -10.0)),
        "class": said(lambda: SigLipLoss(world_size=world)(*pair, 10.0, -10.0)),
        "module": said(lambda: SigmoidContrastiveLoss(gather_group="world")(*pair)),
    }


def everything() -> dict[str, Any]:
    """What a test of one number of processes looks at."""
    found = {"losses": losses(), "open_clip": open_clip_settings()}
    return found | ({"mistakes": mistakes()} if dist.get_world_size() == 2 else {})
