"""Calls of the sigmoid loss, and how far they may be from the reference in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llave_kernels import sigmoid_contrastive_loss
from llave_kernels.reference import reference_sigmoid_loss

NAMES = ("loss", "dQ", "dT", "d logit_scale", "d logit_bias")


def outcome(
    function: Any, query: Tensor, target: Tensor, scale: float, bias: float, **settings: Any
) -> list[Tensor]:
    """The values of ``NAMES``. The upstream gradient rises from 0.5 to 1.5 over the rows."""
    query, target = query.detach().requires_grad_(), target.detach().requires_grad_()
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    learned = [torch.tensor(x, dtype=dtype, requires_grad=True) for x in (scale, bias)]
    loss = function(query, target, logit_scale=learned[0], logit_bias=learned[1], **settings)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype)
    loss.backward(upstream.reshape(loss.shape))
    return [loss.detach(), *(x.grad for x in (query, target, *learned))]  # type: ignore[list-item]


def truth(
    query: Tensor, target: Tensor, scale: float, bias: float, **settings: Any
) -> list[Tensor]:
    """``outcome`` of the reference in float64."""
    return outcome(reference_sigmoid_loss, query.double(), target.double(), scale, bias, **settings)


def limits(
    query: Tensor, target: Tensor, scale: float, bias: float, exact: list[Tensor], **settings: Any
) -> list[float]:
    """Absolute errors of ``outcome`` within the contract, from its values in float64.

    The rounding of a logit is relative to the sizes of its products and its bias. The terms of the
    gradients of scale and bias may cancel, so their errors are relative to the sum of the terms'
    sizes.
    """
    query, dtype = query.double(), query.dtype
    similarity = query @ target.double().T
    products = query.abs() @ target.double().abs().T
    largest = float(scale * products.max() + abs(bias))
    # The gradient of each row's sum with respect to the similarities.
    eye = torch.eye(len(target), dtype=torch.float64)
    given = {**settings, "reduction": "sum"}
    slopes = outcome(reference_sigmoid_loss, similarity, eye, scale, bias, **given)[1].abs() / scale
    upstream = torch.linspace(0.5, 1.5, len(query), dtype=torch.float64)
    reduction = settings.get("reduction", "mean")
    weights = {"mean": 0.5 / len(query), "sum": 0.5, "none": upstream[:, None]}[reduction]
    terms = slopes / 0.5 * weights
    double = dtype == torch.float64
    eps = torch.finfo(torch.float64 if double else torch.float32).eps
    relative = 4 * eps + eps * largest
    rounding = 20 * eps + eps * largest
    if dtype.itemsize == 2:  # dS is rounded, and so is the result
        rounding += torch.finfo(dtype).eps
    # Below the smallest normal number a result's rounding stays constant, and a slope may be 0.
    least = torch.finfo(dtype).eps * torch.finfo(dtype).smallest_normal
    lost = 4 * torch.finfo(torch.float64 if double else torch.float32).smallest_normal * len(query)
    least += lost * scale * float(query.abs().max() + target.abs().max())
    return [
        relative * float(exact[0].norm()) + lost,
        *(
            rounding * float(x.norm()) + least * x.numel() ** 0.5 + eps * float(sizes.norm())
            for x, sizes in (
                (exact[1], terms @ target.double().abs()),
                (exact[2], terms.T @ query.abs()),
            )
        ),
        relative * float((terms * products).sum()) + lost * float(products.max()),
        relative * float(terms.sum()) + lost,
    ]


def assert_contract(
    query: Tensor, target: Tensor, scale: float, bias: float, *, backend: str, **settings: Any
) -> None:
    exact = truth(query, target, scale, bias, **settings)
    ours = outcome(
        sigmoid_contrastive_loss, query, target, scale, bias, backend=backend, **settings
    )
    most = limits(query, target, scale, bias, exact, **settings)
    for name, found, right, limit in zip(NAMES, ours, exact, most, strict=True):
        error = float((found.double() - right).norm())
        assert error <= limit, f"{name}: error {error:.2e}, allowed {limit:.2e}"


def draw_pairs(n: int, m: int, *, labels: bool, ids: bool) -> dict[str, Any]:
    """Random ``SigmoidPairs``. Several rows may share a positive."""
    pairs: dict[str, Any] = {}
    if labels:
        pairs["labels"] = torch.randint(m, (n,))
    if ids:
        pairs["query_ids"] = torch.randint(max(2, n // 2), (n,))
        pairs["target_ids"] = torch.randint(max(2, n // 2), (m,))
    return pairs


def meta_call(n: int, d: int, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Inputs without data, and a scale and a bias that learn."""
    pair = [torch.empty(n, d, dtype=dtype, device="meta", requires_grad=True) for _ in range(2)]
    learned = {
        name: torch.empty((), device="meta", requires_grad=True)
        for name in ("logit_scale", "logit_bias")
    }
    return pair, learned
