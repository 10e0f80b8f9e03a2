"""The sigmoid loss of SigLIP with the scale and bias of its start, which are learned."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.peer import Family, Job, Loss, Peer, backends
from llave_kernels import sigmoid_contrastive_loss
from llave_kernels.reference import reference_sigmoid_loss

START = 10.0, -10.0  # scale and bias


def with_start(function: Callable[..., Tensor], query: Tensor, target: Tensor) -> Tensor:
    """A loss of rows, scale and bias. The last two learn."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale, bias = (
        torch.tensor(x, dtype=dtype, device=query.device, requires_grad=True) for x in START
    )
    return function(query, target, logit_scale=scale, logit_bias=bias)


def ours(backend: str) -> Callable[[Job], Loss]:
    return lambda job: partial(with_start, partial(sigmoid_contrastive_loss, backend=backend))


def open_clip(job: Job) -> Loss:
    from open_clip.loss import SigLipLoss

    return partial(with_start, SigLipLoss())


def dense(job: Job) -> Loss:
    return partial(with_start, reference_sigmoid_loss)


FAMILY = Family(
    backends(ours)
    | {
        "dense": Peer(dense),
        "dense-compiled": Peer(lambda job: torch.compile(dense(job))),
        "open_clip": Peer(open_clip, package="open_clip"),
    },
    truth=dense,
    flops={True: 6},
    directions=(2,),
)
