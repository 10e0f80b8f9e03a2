"""What processes exchange for a loss: rows, gradients of rows, and parts of log-sum-exps."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llave_kernels import transforms
from llave_kernels.grid import Block, Side


def gather_rows(x: Tensor, sizes: list[int], group: Any) -> Tensor:
    """Concatenate the processes' tensors, which have ``sizes`` rows. They are padded on the way."""
    return Gathering(x, sizes, group).result()


def gathered(x: Tensor, side: Side) -> Tensor:
    """``gather_rows`` over a side of a block. A gradient goes back to the processes' own rows."""
    if not side.shared:
        return x
    found: tuple[Tensor] = _Gather.apply([Gathering(x, side.sizes, side.group)], x)
    return found[0]


class Gathering:
    """A ``gather_rows`` that runs while this process goes on, until its ``result``."""

    def __init__(self, x: Tensor, sizes: list[int], group: Any) -> None:
        self.sizes, self.group = sizes, group
        longest = max(sizes)
        own = x.detach()
        if len(x) == longest:
            self._padded = own.contiguous()
        else:
            self._padded = own.new_zeros((longest, *x.shape[1:]))
            self._padded[: len(x)] = own
        self._everything = x.new_empty((longest * len(sizes), *x.shape[1:]))
        self._work: Any = dist.all_gather_into_tensor(self._everything, self._padded, group, True)

    def result(self) -> Tensor:
        self._work.wait()
        longest = max(self.sizes)
        if min(self.sizes) == longest:
            return self._everything
        parts = zip(torch.split(self._everything, longest), self.sizes, strict=True)
        return torch.cat([part[:size] for part, size in parts])


class Scattering:
    """The sum of the processes' gradients of gathered rows. Each receives that of its own rows."""

    def __init__(self, gradient: Tensor, sizes: list[int], group: Any) -> None:
        longest = max(sizes)
        if min(sizes) != longest:
            padded = gradient.new_zeros((len(sizes), longest, *gradient.shape[1:]))
            for block, part in zip(padded, torch.split(gradient, sizes), strict=True):
                block[: len(part)] = part
            gradient = padded.flatten(0, 1)
        self._own = gradient.new_empty((longest, *gradient.shape[1:]))
        self._given = gradient.contiguous()
        self._size = sizes[group.rank()]
        self._work: Any = dist.reduce_scatter_tensor(
            self._own, self._given, dist.ReduceOp.SUM, group, True
        )

    def result(self) -> Tensor:
        self._work.wait()
        return self._own[: self._size]


class Inputs:
    """Queries and targets of a block, gathered with autograd while this process goes on."""

    def __init__(self, query: Tensor, target: Tensor, block: Block) -> None:
        self._parts = [(target, block.columns), (query, block.rows)]
        self._gatherings = [
            Gathering(x, side.sizes, side.group) for x, side in self._parts if side.shared
        ]

    def result(self) -> tuple[Tensor, Tensor]:
        """(queries, targets) of the block. Their gradients go back to the processes' own rows."""
        shared = [x for x, side in self._parts if side.shared]
        found = iter(_Gather.apply(self._gatherings, *shared) if shared else ())
        target, query = (next(found) if side.shared else x for x, side in self._parts)
        return query, target


class _Gather(torch.autograd.Function):
    """The results of gatherings, with a backward. Both directions run side by side."""

    jvp = staticmethod(transforms.refuse_forward_mode)

    @staticmethod
    def forward(ctx: Any, gatherings: list[Gathering], *own: Tensor) -> tuple[Tensor, ...]:
        ctx.places = [(gathering.sizes, gathering.group) for gathering in gatherings]
        return tuple(gathering.result() for gathering in gatherings)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(gradients, ctx.places, ctx.needs_input_grad[1:], strict=True)
        started = [Scattering(x, *place) if needed else None for x, place, needed in wanted]
        return None, *(None if x is None else x.result() for x in started)


def combined(partial: Tensor, side: Side) -> Tensor:
    """The log-sum-exps of this process's rows or columns, from the parts of all processes.

    Args:
        partial: (R,) or (R, K) those of the block: over all rows or columns of ``side``, and over
            what the block has of the other side.
    """
    if not side.shared:
        return partial
    found: Tensor = _Combine.apply(partial, side)
    return found


class _Combine(torch.autograd.Function):
    jvp = staticmethod(transforms.refuse_forward_mode)

    @staticmethod
    def forward(ctx: Any, partial: Tensor, side: Side) -> Tensor:
        parts = _to_owners(partial, side)
        lse = torch.logsumexp(parts, 0)
        # A row or column without a negative gets no gradient.
        share = torch.exp(parts - lse.masked_fill(lse == -math.inf, 0.0))
        ctx.save_for_backward(share)
        ctx.side = side
        return lse

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (share,) = ctx.saved_tensors
        return _from_owners(share * gradient, ctx.side), None


def regathered(own: Tensor, side: Side) -> Tensor:
    """The values (R,) of the whole side, from this process's own. As ``gathered``, with a gradient.

    It undoes ``combined`` for a part of a loss that needs the values of all rows of a block.
    """
    if not side.shared:
        return own
    place = [Gathering(own, side.sizes, side.group)]
    found: tuple[Tensor, ...] = _Gather.apply(place, own)
    return found[0]


def summed(partial: Tensor, side: Side) -> Tensor:
    """The sums of this process's rows, from the parts of all processes. As ``combined``."""
    if not side.shared:
        return partial
    found: Tensor = _Sum.apply(partial, side)
    return found


class _Sum(torch.autograd.Function):
    jvp = staticmethod(transforms.refuse_forward_mode)

    @staticmethod
    def forward(ctx: Any, partial: Tensor, side: Side) -> Tensor:
        ctx.side = side
        return _to_owners(partial, side).sum(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        parts = gradient.expand(len(ctx.side.sizes), *gradient.shape)
        return _from_owners(parts, ctx.side), None


def _to_owners(partial: Tensor, side: Side) -> Tensor:
    """(processes of the side, own rows, ...): what each process has of this process's rows."""
    world, own = len(side.sizes), side.sizes[side.rank]
    parts = partial.new_empty((world * own, *partial.shape[1:]))
    dist.all_to_all_single(parts, partial.contiguous(), [own] * world, side.sizes, side.group)
    return parts.view(world, own, *partial.shape[1:])


def _from_owners(parts: Tensor, side: Side) -> Tensor:
    """The way back of ``_to_owners``."""
    world, own = parts.shape[:2]
    out = parts.new_empty((sum(side.sizes), *parts.shape[2:]))
    given = parts.flatten(0, 1).contiguous()
    dist.all_to_all_single(out, given, side.sizes, [own] * world, side.group)
    return out
