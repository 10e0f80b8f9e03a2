"""What a backend is: a module, or any object, with the members of ``Backend``.

``dispatch.BACKENDS`` lists them. ``torch_backend`` is the one to read first.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from llave_kernels.rules import Rules


class LogSumExps(NamedTuple):
    """The outputs of a forward, or the gradients with respect to them.

    In the accumulation dtype: float32, or float64 for float64 inputs.

    Attributes:
        positive: (N,) logit of each row's positive.
        query_lse: (N,) log-sum-exp of each row over its valid negatives, -inf where it has none.
        target_lse: (M,) the same of each column, (0,) in one direction.
    """

    positive: Tensor
    query_lse: Tensor
    target_lse: Tensor


class Gradients(NamedTuple):
    """Gradients of query (N, D), target (M, D) and logit_scale ()."""

    query: Tensor
    target: Tensor
    logit_scale: Tensor


class Backend(Protocol):
    """Computes the log-sum-exps of a batch, and their gradients.

    Inputs come checked: ``query`` (N, D) and ``target`` (M, D) of one dtype and device, with any
    strides; ``logit_scale`` () in the accumulation dtype on that device. Labels that name no
    column are possible on a GPU: their rows' outputs are NaN.
    """

    NAME: str

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine, or None."""

    def supports(self, query: Tensor, target: Tensor, rules: Rules) -> str | None:
        """Why this call cannot run here, and what to do, or None."""

    def margin_limit(
        self, query: Tensor, target: Tensor, labels: Tensor | None, margin: float
    ) -> Tensor:
        """(N,) the similarity above which the margin leaves a negative out.

        ``positives.margin_limit`` with what this backend's products make of their inputs.
        """

    def kept_shape(self, query: Tensor, target: Tensor, rules: Rules) -> tuple[int, ...]:
        """Shape of what a backward reads again, in the accumulation dtype; (0,) for nothing.

        Sizes may be symbols.
        """

    def forward(
        self, query: Tensor, target: Tensor, logit_scale: Tensor, rules: Rules, kept: Tensor
    ) -> LogSumExps:
        """The log-sum-exps. ``kept`` comes uninitialised, to be filled."""

    def backward(
        self,
        upstream: LogSumExps,
        query: Tensor,
        target: Tensor,
        logit_scale: Tensor,
        outputs: LogSumExps,
        kept: Tensor,
        rules: Rules,
        *,
        scale_gradient: bool,
    ) -> Gradients:
        """The gradients, those of query and target in their dtype.

        ``upstream`` and ``outputs`` are without gaps. Without ``scale_gradient`` that of the scale
        may be left out: NaN.
        """


class OneDirection(Protocol):
    """What a backend may have beyond ``Backend``: loss and gradients in one pass.

    Possible in one direction only, where a row's log-sum-exp is complete before the next row's.
    """

    def merges_gradients(self, query: Tensor) -> bool:
        """Whether ``one_direction`` serves such inputs."""

    def one_direction(
        self, query: Tensor, target: Tensor, logit_scale: Tensor, rules: Rules
    ) -> tuple[Tensor, Gradients]:
        """Per-row loss (N,) of the query direction, and the gradients of its sum.

        All in the accumulation dtype: the upstream gradient is still to come, and the gradients of
        a sum over many rows may not fit the inputs' dtype.
        """
