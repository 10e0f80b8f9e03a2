"""What the benchmark knows of an implementation of a loss."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from llave_kernels import available_backends

SCALE = 50.0
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Job:
    """What one measurement computes. ``alpha`` and ``rule`` are the command line's."""

    alpha: float
    symmetric: bool
    rule: str | None = None


@dataclass(frozen=True)
class Peer:
    """An implementation: how to build it, what it needs, and which loss it really computes.

    Each implementation is compared with the float64 value of its own formula.

    Attributes:
        build: makes the loss.
        package: what must be installed. Default: nothing.
        gpu_only: whether it needs a GPU.
        directions: which numbers of directions it can compute.
        query_alpha, target_alpha: whether it applies the hardness weight in that direction.
        negatives: whether it takes mined negatives, that is, more targets than queries.
        rules: whether it takes ``RULES``.
        unavailable: says why it cannot run on this machine, or None.
    """

    build: Callable[[Job], Loss]
    package: str | None = None
    gpu_only: bool = False
    directions: tuple[int, ...] = (1, 2)
    query_alpha: bool = True
    target_alpha: bool = True
    negatives: bool = False
    rules: bool = False
    unavailable: Callable[[], str | None] = lambda: None

    def refusal(
        self, device: str, symmetric: bool, negatives: bool, rule: str | None
    ) -> str | None:
        """Why it cannot take part, or None."""
        if self.gpu_only and device != "cuda":
            return "needs a GPU"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if symmetric and 2 not in self.directions:
            return "computes one direction; add --one-direction"
        if not symmetric and 1 not in self.directions:
            return "computes both directions; leave out --one-direction"
        if negatives and not self.negatives:
            return "takes no mined negatives; leave out --negatives"
        if rule and not self.rules:
            return "takes no rules; leave out --rule"
        return self.unavailable()


@dataclass(frozen=True)
class Family:
    """A loss that ``loss_bench.py --loss`` measures, and who computes it.

    Attributes:
        peers: the implementations, by name.
        truth: makes the loss as a dense formula, which is run in float64. None: ``truth.py`` has
            the formula in strips.
        flops: FLOPs in units of NMD, by whether both directions are computed. The convention is the
            same for all implementations. Default: no rates are shown.
        directions: which numbers of directions the loss has.
    """

    peers: dict[str, Peer]
    truth: Callable[[Job], Loss] | None
    flops: dict[bool, int] | None = None
    directions: tuple[int, ...] = (1, 2)

    def refusals(
        self, device: str, symmetric: bool, negatives: bool, rule: str | None = None
    ) -> dict[str, str | None]:
        """Why each implementation does not take part in this run, or None where it does."""
        return {
            name: peer.refusal(device, symmetric, negatives, rule)
            for name, peer in self.peers.items()
        }


def backends(build: Callable[[str], Callable[[Job], Loss]], **traits: Any) -> dict[str, Peer]:
    """Our backends as peers. On a CPU only ``torch`` is timed: Triton's interpreter is for tests.

    Args:
        build: from a backend's name to what builds the loss.
        traits: attributes of ``Peer``.
    """
    return {
        f"llave-{name}": Peer(
            build(name),
            gpu_only=name != "torch",
            unavailable=partial(_unavailable, name),
            **traits,
        )
        for name in available_backends()
    }


def _unavailable(backend: str) -> str | None:
    return available_backends()[backend]
