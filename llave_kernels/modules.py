"""The loss as an ``nn.Module``, for training loops that hold a loss object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from typing_extensions import Unpack

from llave_kernels import checks, dispatch, matryoshka
from llave_kernels.agreement import group_of
from llave_kernels.distributed import distributed_contrastive_loss
from llave_kernels.distributed_sigmoid import distributed_sigmoid_loss
from llave_kernels.distributed_supervised import distributed_supervised_loss
from llave_kernels.functional import hardness_weighted_contrastive_loss
from llave_kernels.group_losses import DENOMINATORS
from llave_kernels.rules import RuleSettings, RuleTensors
from llave_kernels.sigmoid import SigmoidPairs, sigmoid_contrastive_loss
from llave_kernels.supervised import supervised_contrastive_loss

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Gather: TypeAlias = "ProcessGroup | DeviceMesh | Literal['world'] | None"


class _ScaledLoss(nn.Module):
    """What the losses with a bounded logit scale share: the scale, and how they are run."""

    log_logit_scale: nn.Parameter | None

    def __init__(
        self,
        logit_scale: float,
        *,
        reduction: str,
        backend: str,
        learnable: bool,
        max_logit_scale: float,
        gather_group: Gather,
    ) -> None:
        super().__init__()
        logit_scale = checks.positive("logit_scale", logit_scale)
        checks.one_of("reduction", reduction, checks.REDUCTIONS)
        learnable = checks.flag("learnable", learnable)
        max_logit_scale = checks.positive("max_logit_scale", max_logit_scale)
        _check_group(gather_group)
        if learnable and logit_scale > max_logit_scale:
            raise ValueError(
                f"logit_scale={logit_scale} is above max_logit_scale={max_logit_scale}; raise that"
            )
        self.initial_logit_scale = logit_scale
        self.max_logit_scale = max_logit_scale
        self.reduction = reduction
        self.backend = dispatch.known(backend)
        self.gather_group = gather_group
        log_scale = nn.Parameter(torch.tensor(math.log(logit_scale))) if learnable else None
        self.register_parameter("log_logit_scale", log_scale)

    @property
    def logit_scale(self) -> float | Tensor:
        """kappa as the loss uses it. If learnable, the parameter's exponential with its bound."""
        if self.log_logit_scale is None:
            return self.initial_logit_scale
        excess = (self.log_logit_scale - math.log(self.max_logit_scale)).clamp(min=0)
        # The excess is subtracted as a constant. A clamp has gradient 0 above its bound, for ever.
        return (self.log_logit_scale - excess.detach()).exp()

    def _bound_scale(self) -> None:
        """Clamp a parameter that a step took above the bound."""
        if self.log_logit_scale is not None:
            with torch.no_grad():
                self.log_logit_scale.clamp_(max=math.log(self.max_logit_scale))

    def _shown_scale(self) -> str:
        learnable = self.log_logit_scale is not None
        return f"logit_scale={_shown(self.logit_scale)}{' (learnable)' if learnable else ''}"


class HardnessWeightedContrastiveLoss(_ScaledLoss):
    """``hardness_weighted_contrastive_loss`` as a module that holds its settings.

    Args:
        logit_scale: kappa = 1 / temperature, positive.
        alpha, hardness, symmetric, target_alpha, false_negative_margin: as in
            ``hardness_weighted_contrastive_loss``.
        within, reduction, backend, matryoshka_dims, matryoshka_weights: as there.
        learnable: train the scale. The parameter ``log_logit_scale`` is its logarithm (0-d,
            float32), as in CLIP. That keeps the scale positive.
        max_logit_scale: upper bound of a learnable scale (CLIP: 100). The next call clamps a
            parameter that a step took above the bound. Later steps can lower it again.
        gather_group: a process group, ``"world"`` for all processes, or a 2-D ``DeviceMesh``. The
            loss is then ``llave_kernels.distributed.distributed_contrastive_loss``. It expects
            gradients to be averaged over the processes (DDP, FSDP). Default: this process alone.

    Example:
        >>> loss_fn = HardnessWeightedContrastiveLoss(logit_scale=50.0, alpha=9.0)
        >>> query = torch.nn.functional.normalize(torch.randn(8, 32), dim=1).requires_grad_()
        >>> target = torch.nn.functional.normalize(torch.randn(8, 32), dim=1)
        >>> loss_fn(query, target).backward()
    """

    def __init__(
        self,
        logit_scale: float = 50.0,
        alpha: float = 9.0,
        *,
        hardness: str = "in_batch",
        symmetric: bool = True,
        target_alpha: float | None = None,
        false_negative_margin: float | None = None,
        within: Sequence[str] = (),
        reduction: str = "mean",
        backend: str = "auto",
        learnable: bool = False,
        max_logit_scale: float = 100.0,
        gather_group: Gather = None,
        matryoshka_dims: Sequence[int] | None = None,
        matryoshka_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            logit_scale, reduction=reduction, backend=backend, learnable=learnable,
            max_logit_scale=max_logit_scale, gather_group=gather_group,
        )  # fmt: skip
        settings = checks.rule_settings(
            alpha=alpha, hardness=hardness, symmetric=symmetric, target_alpha=target_alpha,
            false_negative_margin=false_negative_margin,
        )  # fmt: skip
        matryoshka.checked(matryoshka_dims, matryoshka_weights)
        for name, value in settings.items():  # attributes, which a training loop may change
            setattr(self, name, value)
        self.within = checks.sides("within", within)
        self.matryoshka_dims, self.matryoshka_weights = matryoshka_dims, matryoshka_weights

    def forward(
        self,
        query: Tensor,
        target: Tensor,
        **tensors: Unpack[RuleTensors],
    ) -> Tensor:
        """Loss of queries (N, D) and targets (M, D). 0-d, or (N,) with ``reduction="none"``.

        ``tensors`` are ``labels``, ``owners``, ``query_ids``, ``target_ids``, ``query_bias`` and
        ``target_bias``. See ``RuleTensors``.
        """
        self._bound_scale()
        loss = hardness_weighted_contrastive_loss
        if self.gather_group is not None:
            loss = partial(distributed_contrastive_loss, group=_group(self.gather_group))
        return loss(
            query,
            target,
            logit_scale=self.logit_scale,
            **self._settings(),
            **tensors,
            within=self.within,
            reduction=self.reduction,
            backend=self.backend,
            matryoshka_dims=self.matryoshka_dims,
            matryoshka_weights=self.matryoshka_weights,
        )

    def _settings(self) -> RuleSettings:
        return {name: getattr(self, name) for name in RuleSettings.__annotations__}  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """The settings that shape the loss."""
        shown = [self._shown_scale()]
        for name, value in self._settings().items():
            if value is not None:
                shown.append(f"{name}={value:g}" if type(value) is float else f"{name}={value!r}")
        if self.within:
            shown.append(f"within={self.within!r}")
        if self.matryoshka_dims is not None:
            shown.append(f"matryoshka_dims={tuple(self.matryoshka_dims)}")
        if self.matryoshka_weights is not None:
            shown.append(f"matryoshka_weights={tuple(self.matryoshka_weights)}")
        return ", ".join([*shown, f"reduction={self.reduction!r}", f"backend={self.backend!r}"])


class SupervisedContrastiveLoss(_ScaledLoss):
    """``supervised_contrastive_loss`` as a module that holds its settings.

    Args:
        logit_scale: kappa = 1 / temperature, positive. Default: 10.
        alpha, denominator, symmetric, reduction, backend: as in ``supervised_contrastive_loss``.
        learnable, max_logit_scale: as in ``HardnessWeightedContrastiveLoss``.
        gather_group: as in ``HardnessWeightedContrastiveLoss``, for
            ``llave_kernels.distributed_supervised.distributed_supervised_loss``.

    Example:
        >>> loss_fn = SupervisedContrastiveLoss(logit_scale=10.0)
        >>> rows = torch.nn.functional.normalize(torch.randn(8, 32), dim=1).requires_grad_()
        >>> loss_fn(rows, query_groups=torch.arange(8) // 4).backward()
    """

    def __init__(
        self,
        logit_scale: float = 10.0,
        alpha: float = 0.0,
        *,
        denominator: str = "all",
        symmetric: bool = False,
        reduction: str = "mean",
        backend: str = "auto",
        learnable: bool = False,
        max_logit_scale: float = 100.0,
        gather_group: Gather = None,
    ) -> None:
        super().__init__(
            logit_scale, reduction=reduction, backend=backend, learnable=learnable,
            max_logit_scale=max_logit_scale, gather_group=gather_group,
        )  # fmt: skip
        self.alpha = checks.strength("alpha", alpha)
        checks.one_of("denominator", denominator, DENOMINATORS)
        self.denominator = denominator
        self.symmetric = checks.flag("symmetric", symmetric)

    def forward(
        self,
        query: Tensor,
        target: Tensor | None = None,
        *,
        query_groups: Tensor,
        target_groups: Tensor | None = None,
    ) -> Tensor:
        """Loss of rows (N, D) against targets (M, D), or against themselves.

        The groups are as in ``supervised_contrastive_loss``. 0-d, or (N,) with
        ``reduction="none"``.
        """
        self._bound_scale()
        loss = supervised_contrastive_loss
        if self.gather_group is not None:
            loss = partial(distributed_supervised_loss, group=_group(self.gather_group))
        return loss(
            query,
            target,
            query_groups=query_groups,
            target_groups=target_groups,
            logit_scale=self.logit_scale,
            alpha=self.alpha,
            denominator=self.denominator,
            symmetric=self.symmetric,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The settings that shape the loss."""
        names = ("denominator", "symmetric", "reduction", "backend")
        shown = [f"{name}={getattr(self, name)!r}" for name in names]
        return ", ".join([self._shown_scale(), f"alpha={self.alpha:g}", *shown])


class SigmoidContrastiveLoss(nn.Module):
    """``sigmoid_contrastive_loss`` as a module. It learns scale and bias, as SigLIP does.

    Args:
        logit_scale: kappa at the start, positive. Default: 10, as in SigLIP.
        logit_bias: b at the start, finite. Default: -10, as in SigLIP.
        learnable: train both. The parameter ``log_logit_scale`` is the logarithm of the scale. Both
            parameters are 0-d and float32. Default: True.
        reduction, backend: as in ``sigmoid_contrastive_loss``.
        gather_group: as in ``HardnessWeightedContrastiveLoss``, for
            ``llave_kernels.distributed_sigmoid.distributed_sigmoid_loss``.

    Example:
        >>> loss_fn = SigmoidContrastiveLoss()
        >>> query = torch.nn.functional.normalize(torch.randn(8, 32), dim=1).requires_grad_()
        >>> target = torch.nn.functional.normalize(torch.randn(8, 32), dim=1)
        >>> loss_fn(query, target).backward()
    """

    log_logit_scale: Tensor
    logit_bias: Tensor

    def __init__(
        self,
        logit_scale: float = 10.0,
        logit_bias: float = -10.0,
        *,
        learnable: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
        gather_group: Gather = None,
    ) -> None:
        super().__init__()
        log_scale = math.log(checks.positive("logit_scale", logit_scale))
        bias = checks.finite("logit_bias", logit_bias)
        learnable = checks.flag("learnable", learnable)
        checks.one_of("reduction", reduction, checks.REDUCTIONS)
        _check_group(gather_group)
        self.reduction = reduction
        self.backend = dispatch.known(backend)
        self.gather_group = gather_group
        for name, value in (("log_logit_scale", log_scale), ("logit_bias", bias)):
            parameter = nn.Parameter(torch.tensor(value), requires_grad=learnable)
            self.register_parameter(name, parameter)

    @property
    def logit_scale(self) -> Tensor:
        """kappa, the exponential of the parameter."""
        return self.log_logit_scale.exp()

    def forward(
        self,
        query: Tensor,
        target: Tensor,
        **pairs: Unpack[SigmoidPairs],
    ) -> Tensor:
        """Loss of queries (N, D) and targets (M, D). 0-d, or (N,) with ``reduction="none"``.

        ``pairs`` are ``labels``, ``query_ids`` and ``target_ids``. See ``SigmoidPairs``.
        """
        loss = sigmoid_contrastive_loss
        if self.gather_group is not None:
            loss = partial(distributed_sigmoid_loss, group=_group(self.gather_group))
        return loss(
            query,
            target,
            logit_scale=self.logit_scale,
            logit_bias=self.logit_bias,
            **pairs,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The settings that shape the loss."""
        values = {"logit_scale": self.logit_scale, "logit_bias": self.logit_bias}
        shown = [f"{name}={_shown(value)}" for name, value in values.items()]
        return ", ".join([*shown, f"reduction={self.reduction!r}", f"backend={self.backend!r}"])


def _shown(value: float | Tensor) -> str:
    """A number, or the device of one that has no value yet."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return "meta"
        value = float(value.detach())
    return f"{value:g}"


def _check_group(value: Gather) -> None:
    if isinstance(value, str):
        checks.one_of("gather_group", value, ("world",))
    else:
        group_of("gather_group", value)


def _group(value: Gather) -> ProcessGroup | DeviceMesh | None:
    """The group of a distributed loss. None is all processes."""
    return None if isinstance(value, str) else value
