"""The interface of a backend, which is a module or any object with the members of ``Backend``.

``dispatch.BACKENDS`` lists the backends. ``torch_backend`` is the one to read first.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from llave_kernels.rules import Rules


class LogSumExps(NamedTuple):
    """The outputs of a forward, or the gradients with respect to them.

    They are in the accumulation dtype: float32, or float64 for float64 inputs.

    Attributes:
        positive: (N,) logit of each row's positive. NaN for a row whose label is ``ELSEWHERE``.
        query_lse: (N,) log-sum-exp of each row over its valid negatives, -inf without any.
        target_lse: (M,) the same for each column, or (0,) in one direction.
    """

    positive: Tensor
    query_lse: Tensor
    target_lse: Tensor


class Gradients(NamedTuple):
    """Gradients of query (N, D), target (M, D), logit_scale (), query_bias (N,), target_bias (M,).

    That of a bias is None if the call has no such bias, or if the caller asks for none.
    """

    query: Tensor
    target: Tensor
    logit_scale: Tensor
    query_bias: Tensor | None = None
    target_bias: Tensor | None = None


class Sums(NamedTuple):
    """Gradients in the accumulation dtype, to which several backwards add.

    Attributes:
        query, target: (N, D) and (M, D), times ``gain``. Their memory may overlap.
        gain: () the power of two by which the backwards multiply dS.
    """

    query: Tensor
    target: Tensor
    gain: Tensor


class Backend(Protocol):
    """Computes the log-sum-exps of a batch, and their gradients.

    Inputs are checked. ``query`` (N, D) and ``target`` (M, D) have one dtype and device, and any
    strides. ``logit_scale`` () is in the accumulation dtype on that device. On a GPU a label may
    name no column. The outputs of its row are then NaN.
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

        It is ``positives.margin_limit`` with the rounding of this backend's products.
        """

    def kept_shape(self, query: Tensor, target: Tensor, rules: Rules) -> tuple[int, ...]:
        """Shape of the tensor that a forward keeps for its backward. (0,) for nothing.

        The tensor is in the accumulation dtype. Sizes may be symbolic.
        """

    def forward(
        self, query: Tensor, target: Tensor, logit_scale: Tensor, rules: Rules, kept: Tensor
    ) -> LogSumExps:
        """The log-sum-exps. ``kept`` is uninitialised, and the forward fills it.

        It has the shape ``kept_shape``, or (0,) if no gradient is asked for.
        """

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
        bias_gradients: bool = False,
        sums: Sums | None = None,
    ) -> Gradients:
        """The gradients. Those of query and target have the inputs' dtype.

        ``upstream`` and ``outputs`` are contiguous. Without ``scale_gradient``, the gradient of the
        scale may be any number. The gradients of the biases are in the accumulation dtype. With
        ``sums``, the gradients of query and target are added there and nowhere else, and what is
        returned has no meaning. ``kept`` may then be (0,): its forward kept nothing.
        """


class OneDirection(Protocol):
    """What a backend may add to ``Backend``: loss and gradients in one pass.

    This works in one direction only. With both, gradients also need the columns' log-sum-exps,
    which are known only after the last row.
    """

    def merges_gradients(self, query: Tensor) -> bool:
        """Whether ``one_direction`` serves such inputs."""

    def one_direction(
        self,
        query: Tensor,
        target: Tensor,
        logit_scale: Tensor,
        rules: Rules,
        *,
        bias_gradients: bool = False,
    ) -> tuple[Tensor, Gradients]:
        """Per-row loss (N,) of the query direction, and the gradients of its sum.

        All are in the accumulation dtype. The upstream gradient is not applied yet, and the
        gradients of a sum over many rows may not fit the inputs' dtype.
        """


class FusedLoss(Protocol):
    """What a backend may add to ``Backend``: the loss along with the log-sum-exps.

    Eager calls use it. It saves the launches that would compose the loss from the log-sum-exps.
    """

    NAME: str

    def total_loss(
        self,
        query: Tensor,
        target: Tensor,
        scale: float | Tensor,
        rules: Rules,
        weight: float,
        *,
        keep: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...], object]:
        """``weight`` times the sum of the rows' losses (), and what the gradients are made from.

        ``scale`` is a number, or a tensor () as in ``Backend``. The loss may be changed in place.
        ``keep``: whether similarities may be kept. They are not needed if no gradient is asked for.
        The second result is saved for the backward. The third is whatever spares
        ``total_gradients`` some work if the inputs are still the same objects.
        """

    def total_gradients(
        self,
        d_total: Tensor,
        query: Tensor,
        target: Tensor,
        scale: float | Tensor,
        saved: tuple[Tensor, ...],
        rules: Rules,
        prepared: object,
        *,
        scale_gradient: bool,
        bias_gradients: bool = False,
    ) -> Gradients:
        """The gradients, from the total's upstream gradient (). The rest is as in ``Backend``.

        ``prepared`` is the third result of ``total_loss``, or None.
        """


class SigmoidGradients(NamedTuple):
    """Gradients of query (N, D), target (M, D), logit_scale () and logit_bias ()."""

    query: Tensor
    target: Tensor
    logit_scale: Tensor
    logit_bias: Tensor


class SigmoidLoss(Protocol):
    """The sigmoid loss of a backend. ``dispatch.SIGMOID`` lists them."""

    def sigmoid_loss(
        self,
        query: Tensor,
        target: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        rules: Rules,
        weights: Tensor | None,
        *,
        gradients: bool,
    ) -> tuple[Tensor, SigmoidGradients | None]:
        """Per-row loss (N,), and with ``gradients`` those of its sum weighted by ``weights`` (N,).

        ``logit_scale`` and ``logit_bias`` are tensors (). No weights are ones. All results are in
        the accumulation dtype. The gradients of a sum over many rows may not fit the inputs' dtype.
        ``rules`` have labels and ids only. A row whose label is ``ELSEWHERE`` has negatives only.
        """
