"""The loss as an ``nn.Module``, for training loops that hold a loss object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from typing_extensions import Unpack

from llave_kernels import checks, dispatch
from llave_kernels.agreement import group_of
from llave_kernels.distributed import distributed_contrastive_loss
from llave_kernels.functional import hardness_weighted_contrastive_loss
from llave_kernels.rules import RuleSettings, RuleTensors

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class HardnessWeightedContrastiveLoss(nn.Module):
    """``hardness_weighted_contrastive_loss`` as a module that holds its settings.

    Args:
        logit_scale: kappa = 1 / temperature, positive.
        alpha, hardness, symmetric, target_alpha, false_negative_margin, within, reduction, backend:
            as in ``hardness_weighted_contrastive_loss``.
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

    log_logit_scale: nn.Parameter | None

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
        gather_group: ProcessGroup | DeviceMesh | Literal["world"] | None = None,
    ) -> None:
        super().__init__()
        logit_scale = checks.positive("logit_scale", logit_scale)
        settings = checks.rule_settings(
            alpha=alpha, hardness=hardness, symmetric=symmetric, target_alpha=target_alpha,
            false_negative_margin=false_negative_margin,
        )  # fmt: skip
        checks.one_of("reduction", reduction, checks.REDUCTIONS)
        learnable = checks.flag("learnable", learnable)
        max_logit_scale = checks.positive("max_logit_scale", max_logit_scale)
        if isinstance(gather_group, str):
            checks.one_of("gather_group", gather_group, ("world",))
        else:
            group_of("gather_group", gather_group)
        if learnable and logit_scale > max_logit_scale:
            raise ValueError(
                f"logit_scale={logit_scale} is above max_logit_scale={max_logit_scale}; raise that"
            )
        self.initial_logit_scale = logit_scale
        self.max_logit_scale = max_logit_scale
        for name, value in settings.items():  # attributes, which a training loop may change
            setattr(self, name, value)
        self.within = checks.sides("within", within)
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

    def forward(
        self,
        query: Tensor,
        target: Tensor,
        **tensors: Unpack[RuleTensors],
    ) -> Tensor:
        """Loss of queries (N, D) and targets (M, D). 0-d, or (N,) with ``reduction="none"``.

        ``tensors`` are ``labels``, ``owners``, ``query_ids`` and ``target_ids``. See
        ``RuleTensors``.
        """
        if self.log_logit_scale is not None:
            with torch.no_grad():
                self.log_logit_scale.clamp_(max=math.log(self.max_logit_scale))
        loss = hardness_weighted_contrastive_loss
        if self.gather_group is not None:
            group = None if isinstance(self.gather_group, str) else self.gather_group
            loss = partial(distributed_contrastive_loss, group=group)
        return loss(
            query,
            target,
            logit_scale=self.logit_scale,
            **self._settings(),
            **tensors,
            within=self.within,
            reduction=self.reduction,
            backend=self.backend,
        )

    def _settings(self) -> RuleSettings:
        return {name: getattr(self, name) for name in RuleSettings.__annotations__}  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """The settings that shape the loss."""
        learnable = self.log_logit_scale is not None
        scale = float(torch.as_tensor(self.logit_scale).detach())
        shown = [f"logit_scale={scale:g}{' (learnable)' if learnable else ''}"]
        for name, value in self._settings().items():
            if value is not None:
                shown.append(f"{name}={value:g}" if type(value) is float else f"{name}={value!r}")
        if self.within:
            shown.append(f"within={self.within!r}")
        return ", ".join([*shown, f"reduction={self.reduction!r}", f"backend={self.backend!r}"])
