"""What the numerical tests share: inputs, rule sets, and the comparison with the float64
reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llave_kernels import hardness_weighted_contrastive_loss
from llave_kernels.reference import reference_loss


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|x - ref| / |ref|, with a floor for an exactly zero reference. NaN never passes a bound."""
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm().clamp(min=1e-30))


def embeddings(
    n: int, m: int, d: int, dtype: torch.dtype = torch.float32, *, unit: bool = True
) -> tuple[Tensor, Tensor]:
    """Fresh random rows, unit length (to the rounding of ``dtype``) unless told otherwise."""
    pair = torch.randn(n, d, dtype=torch.float64), torch.randn(m, d, dtype=torch.float64)
    if unit:
        pair = normalize(pair[0], dim=1), normalize(pair[1], dim=1)
    return pair[0].to(dtype), pair[1].to(dtype)


def loss_and_gradients(
    function: Any, query: Tensor, target: Tensor, scale: float, **rules: Any
) -> list[Tensor]:
    """[loss, dQ, dT, d logit_scale] under a fixed random weighting of the rows' losses."""
    query, target = query.detach().requires_grad_(), target.detach().requires_grad_()
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    logit_scale = torch.tensor(scale, dtype=dtype, device=query.device, requires_grad=True)
    loss = function(query, target, logit_scale=logit_scale, **rules)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device)
    loss.backward(upstream.reshape(loss.shape))
    return [loss.detach(), query.grad, target.grad, logit_scale.grad]


def reference(query: Tensor, target: Tensor, scale: float, **rules: Any) -> list[Tensor]:
    return loss_and_gradients(reference_loss, query.double(), target.double(), scale, **rules)


def dense(query: Tensor, target: Tensor, scale: float, **rules: Any) -> list[Tensor]:
    """What plain PyTorch gives in the inputs' own dtype."""
    return loss_and_gradients(reference_loss, query, target, scale, **rules)


def fused(query: Tensor, target: Tensor, scale: float, **rules: Any) -> list[Tensor]:
    return loss_and_gradients(hardness_weighted_contrastive_loss, query, target, scale, **rules)


def assert_contract(query: Tensor, target: Tensor, scale: float, **rules: Any) -> None:
    """Loss and gradients against float64 on the same rounded inputs, by the numerical contract.

    The stated bounds, or 1.5 times the error of dense PyTorch in the same dtype plus 1e-6 where
    that is larger (few rows, cancelling gradients, large logits).
    """
    backend = rules.pop("backend", "auto")
    truth = reference(query, target, scale, **rules)
    ours = fused(query, target, scale, backend=backend, **rules)
    theirs = dense(query, target, scale, **rules)
    loss, gradient = {
        torch.float64: (1e-12, 1e-11),
        torch.float32: (2e-6, 2e-5),
        torch.bfloat16: (1e-4, 5e-3),
        torch.float16: (1e-4, 2e-3),
    }[query.dtype]
    # The scale's gradient is a sum over rows that may cancel to anything: its error is relative to
    # the size of the terms.
    terms = (query.double() * truth[1]).sum(1).abs().sum() / scale
    # Few rows do not average the rounding of their logits, and dense PyTorch can be lucky: there an
    # error of two units in the last place of the largest logit is allowed.
    logit = (scale + 9.0) * (query.double().norm(dim=1).max() * target.double().norm(dim=1).max())
    few = len(query) < 32 and query.dtype == torch.float32
    rounding = 2 * torch.finfo(torch.float32).eps * float(logit) if few else 0.0
    names = ("loss", "dQ", "dT", "d logit_scale")
    for name, value, exact, plain in zip(names, ours, truth, theirs, strict=True):
        size = torch.maximum(
            exact.norm(), terms if name == "d logit_scale" else terms.new_zeros(())
        )
        if float(size) < 1e-25:
            assert float(value.double().norm()) < 1e-20, f"{name}: {value} where the truth is 0"
            continue
        error, dense_error = (float((x.double() - exact).norm() / size) for x in (value, plain))
        bound = loss if name == "loss" else gradient
        if name == "d logit_scale" and query.dtype.itemsize == 2:
            bound = 2e-2  # made from dQ after its rounding; known to exceed the contract
        relative = rounding / min(1.0, float(truth[0].norm())) if name == "loss" else rounding
        allowed = max(bound, 1.5 * dense_error + 1e-6, relative)
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


def draw_rules(n: int, m: int, kinds: set[str]) -> dict[str, Any]:
    """Random arguments for the named rules: labels, owners, ids, margin, target_alpha."""
    rules: dict[str, Any] = {}
    if "labels" in kinds:
        rules["labels"] = torch.randperm(m)[:n]
        rules["owners"] = torch.arange(m)
    if "owners" in kinds:
        labels = rules.get("labels", torch.arange(n))
        rules["owners"] = labels[torch.randint(n, (m,))].index_put((labels,), labels)
    if "ids" in kinds:
        rules["query_ids"] = torch.randint(max(2, n // 2), (n,))
        rules["target_ids"] = torch.randint(max(2, n // 2), (m,))
    if "margin" in kinds:
        rules["false_negative_margin"] = 0.05
    if "target_alpha" in kinds:
        rules["target_alpha"] = 2.5
    return rules
