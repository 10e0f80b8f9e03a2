"""Inputs, rules, and the comparison with the float64 reference for the numerical tests."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from llave_kernels import hardness_weighted_contrastive_loss
from llave_kernels.reference import (
    reference_loss,
    reference_within,
    similarity_loss,
    tie_allowance,
    within_logits,
)

BIASES = ("query_bias", "target_bias")


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|x - ref| / |ref|. A zero reference is replaced by 1e-30. NaN passes no bound."""
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm().clamp(min=1e-30))


def embeddings(
    n: int, m: int, d: int, dtype: torch.dtype = torch.float32, *, unit: bool = True
) -> tuple[Tensor, Tensor]:
    """Random rows (n, d) and (m, d). They have unit length, up to rounding, if ``unit``."""
    pair = torch.randn(n, d, dtype=torch.float64), torch.randn(m, d, dtype=torch.float64)
    if unit:
        pair = normalize(pair[0], dim=1), normalize(pair[1], dim=1)
    return multiplicands(pair[0].to(dtype)), multiplicands(pair[1].to(dtype))


def multiplicands(x: Tensor) -> Tensor:
    """``x``, with float32 rounded to TF32 unless torch's float32 precision is "highest"."""
    if x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return x
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def loss_and_gradients(
    function: Any, query: Tensor, target: Tensor, scale: float, **rules: Any
) -> list[Tensor]:
    """[loss, dQ, dT, d logit_scale], then the gradients of the biases that there are.

    The upstream gradient rises from 0.5 to 1.5 over the rows.
    """
    query, target = query.detach().requires_grad_(), target.detach().requires_grad_()
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    logit_scale = torch.tensor(scale, dtype=dtype, device=query.device, requires_grad=True)
    biases = {x: rules[x].to(dtype, copy=True).requires_grad_() for x in BIASES if x in rules}
    loss = function(query, target, logit_scale=logit_scale, **rules | biases)
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device)
    loss.backward(upstream.reshape(loss.shape))
    return [loss.detach(), *(x.grad for x in (query, target, logit_scale, *biases.values()))]


def reference(query: Tensor, target: Tensor, scale: float, **rules: Any) -> list[Tensor]:
    return loss_and_gradients(reference_loss, query.double(), target.double(), scale, **rules)


def dense(query: Tensor, target: Tensor, scale: float, **rules: Any) -> list[Tensor]:
    """The dense loss and its gradients in the inputs' own dtype."""
    return loss_and_gradients(reference_loss, query, target, scale, **rules)


def fused(query: Tensor, target: Tensor, scale: float, **rules: Any) -> list[Tensor]:
    return loss_and_gradients(hardness_weighted_contrastive_loss, query, target, scale, **rules)


def rounding_errors(
    query: Tensor, target: Tensor, scale: float, *, logit_share: float = 1.0, **rules: Any
) -> list[float]:
    """Errors of ``loss_and_gradients`` to expect from rounding each term of their sums.

    When the terms cancel, only these errors are left. A term of dS is rounded to the inputs' dtype.
    It also carries the rounding of its logit. That rounding is ``logit_share`` times eps times the
    logit's sum of absolute products.
    """
    pair = {"query": query.double(), "target": target.double()}
    similarity = pair["query"] @ pair["target"].T
    allowance = tie_allowance(*pair.values(), rules.get("labels"))
    within = rules.pop("within", ())
    lse = similarity.new_full((len(query),), -math.inf)
    if within:
        lse = reference_within(*pair.values(), within=within, logit_scale=scale, **rules)

    def of_similarity(s: Tensor, within: Tensor, **rules: Any) -> Tensor:
        return similarity_loss(s, allowance=allowance, within=within, **rules)

    loss, ds, d_lse, *_ = loss_and_gradients(of_similarity, similarity, lse, scale, **rules)
    every = torch.arange(len(query), device=query.device)
    blocks = [("query", "target", every, ds)]
    if within:
        z = within_logits(*pair.values(), within=within, logit_scale=scale, **rules)
        shares = (z - lse[:, None]).exp().nan_to_num()  # of a row without pairs
        parts = (scale * d_lse[:, None] * shares).split([len(pair[side]) for side in within], 1)
        rows = {"query": every, "target": rules.get("labels", every)}
        blocks += [(x, x, rows[x], ds) for x, ds in zip(within, parts, strict=True)]
    sums = torch.float64 if query.dtype == torch.float64 else torch.float32
    eps = torch.finfo(sums).eps
    sides = [side for side, name in enumerate(BIASES) if name in rules]
    half = query.dtype.itemsize == 2
    apart, together = ({k: torch.zeros_like(x) for k, x in pair.items()} for _ in range(2))
    of_biases = []
    of_loss, of_scale, alike_of_scale = 0.0, 0.0, 0.0
    for side, other, rows, ds in blocks:
        x, y = pair[side][rows], pair[other]
        # A similarity carries the rounding of its products. A product may exceed the similarity.
        logits = logit_share * (scale + rules.get("alpha", 9.0)) * (x.abs() @ y.abs().T)
        for k in sides:
            logits = logits + logit_share * rules[BIASES[k]].double().abs().unsqueeze(1 - k)
        # Half precision rounds a term once, by at most eps / 2. Full precision does several times.
        share = 1.0 if half else 6.0
        squares = (ds * (share * torch.finfo(query.dtype).eps + eps * logits)).square()
        # Equal terms have equal rounding errors, so these add up.
        alike = _rounded(ds, query.dtype) - ds if half else torch.zeros_like(ds)
        for total, term, power in ((apart, squares, 2), (together, alike, 1)):
            total[side].index_add_(0, rows, term @ y**power)
            total[other] += term.T @ x**power
        s = x @ y.T
        of_loss += float((ds * logits).square().sum())
        of_scale += float((squares * s.square()).sum()) / scale**2
        alike_of_scale += float((alike * s).sum()) / scale
        # No biases go with several blocks.
        of_biases = [(squares.sum(1 - k) / scale**2, alike.sum(1 - k) / scale) for k in sides]
    return [
        3 * eps * float(loss.norm()) + eps * of_loss**0.5 / scale,
        *(float(apart[side].sum().sqrt() + together[side].norm()) for side in pair),
        of_scale**0.5 + abs(alike_of_scale),
        *(float(apart.sum().sqrt() + together.norm()) for apart, together in of_biases),
    ]


def _rounded(ds: Tensor, dtype: torch.dtype) -> Tensor:
    """``ds`` rounded to half precision. A power of two first brings it into range."""
    largest = ds.abs().amax().clamp(min=1e-300)
    factor = torch.exp2(torch.floor(14 - torch.log2(largest)))
    return (ds * factor).to(dtype).double() / factor


def reordered(query: Tensor, target: Tensor, trials: int) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """The problem with its dimensions permuted, and the index that restores a gradient's order."""
    for trial in range(trials):
        order = torch.randperm(query.shape[1], device=query.device)
        if trial == 0:
            order = order.sort().values
        yield query[:, order], target[:, order], order.argsort()


def dense_errors(
    query: Tensor, target: Tensor, scale: float, truth: list[Tensor], **rules: Any
) -> list[float]:
    """Absolute errors of plain PyTorch, the worst of several orders of the sum over D.

    On a small problem a single order can be right by luck.
    """
    worst = [0.0] * len(truth)
    for q, t, restore in reordered(query, target, 4):
        values = dense(q, t, scale, **rules)
        values[1:3] = [x[:, restore] for x in values[1:3]]
        errors = (float((x.double() - y).norm()) for x, y in zip(values, truth, strict=True))
        worst = [max(pair) for pair in zip(worst, errors, strict=True)]
    return worst


def bounds(dtype: torch.dtype, strength: float) -> tuple[float, float]:
    """Relative errors that the contract allows for the loss and for the gradients.

    Args:
        strength: kappa + alpha. The rounding of float32 logits grows with it.
    """
    if dtype == torch.float64:
        return 1e-12, 1e-11
    logits = 2.5e-7 * strength
    if dtype == torch.float32:
        return 2e-6 + logits, 2e-5 + logits
    return 1e-4, torch.finfo(dtype).eps / 4  # root mean square of the result's own rounding


def allowed_errors(
    query: Tensor, target: Tensor, scale: float, truth: list[Tensor], share: float, **rules: Any
) -> list[float]:
    """Absolute errors of [loss, dQ, dT, d logit_scale] within the contract.

    Half precision is compared with dense float32 on the same inputs. On a nearly converged batch
    the error of dense half precision is large enough to hide a missing part of a sum.
    """
    dtype = query.dtype
    half = dtype.itemsize == 2
    plain = dense_errors(
        *((x.float() if half else x) for x in (query, target)), scale, truth, **rules
    )
    roundings = rounding_errors(query, target, scale, logit_share=share, **rules)
    stated = bounds(dtype, scale + max(rules.get("alpha", 9.0), rules.get("target_alpha", 0.0)))
    allowed = []
    for i, value in enumerate(truth):
        size = float(value.norm())
        most = max(stated[i > 0] * size, 1.5 * plain[i] + 1e-6 * size, roundings[i])
        if half and i in (1, 2):  # dS is rounded, and so is the result
            # Below smallest_normal the rounding stays constant.
            info = torch.finfo(dtype)
            result = info.eps / 2 * (size + info.smallest_normal * value.numel() ** 0.5)
            most = max(most, 1.5 * plain[i] + 1e-6 * size + roundings[i] + result)
        allowed.append(most)
    return allowed


def assert_contract(query: Tensor, target: Tensor, scale: float, **rules: Any) -> None:
    """Compare loss and gradients with float64 on the same rounded inputs.

    The allowed error is the largest of three: the stated bound, 1.5 times dense PyTorch's error
    plus 1e-6 of the value's norm, and the rounding of the sum's terms. A half-precision gradient
    may reach the sum of the last two and its own rounding.
    """
    backend = rules.pop("backend", "auto")
    rules |= clear_margin(query, target, **rules)
    truth = reference(query, target, scale, **rules)
    ours = fused(query, target, scale, backend=backend, **rules)
    # The kernels use one shift for the rows of a warp or a program. It may be up to 60 away from a
    # row's own logits.
    share = 1.0 if backend == "torch" else 2.0
    limits = allowed_errors(query, target, scale, truth, share, **rules)
    names = ("loss", "dQ", "dT", "d logit_scale", *(x for x in BIASES if x in rules))
    for i, name in enumerate(names):
        error, size = float((ours[i].double() - truth[i]).norm()), float(truth[i].norm())
        assert error <= limits[i], (
            f"{name}: error {error:.2e}, allowed {limits[i]:.2e} of {size:.2e}"
        )


def clear_margin(query: Tensor, target: Tensor, **rules: Any) -> dict[str, float]:
    """The margin, raised until rounding decides for no pair whether it counts.

    Returns:
        The new ``false_negative_margin``. Empty if there is none.
    """
    margin = rules.get("false_negative_margin")
    if margin is None:
        return {}
    labels = rules.get("labels", torch.arange(len(query), device=query.device))
    q, t = query.double(), target.double()
    similarity = q @ t.T
    positive = similarity.gather(1, labels[:, None])
    over = [similarity - positive, similarity[:, labels] - positive.T]
    within = rules.get("within", ())
    over += [q @ q.T - positive] * ("query" in within)
    over += [t[labels] @ t.T - positive] * ("target" in within)
    over = torch.cat([x.flatten() for x in over])
    room = 4 * rounding(query, target)
    edges = torch.cat([over.new_tensor([margin, torch.inf]), over[over > margin]]).sort().values
    first = int((edges.diff() > 2 * room).nonzero()[0])
    return {"false_negative_margin": float(edges[first]) + room}


def rounding(query: Tensor, target: Tensor) -> float:
    """The largest allowance for rounding when two similarities are compared."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    d = query.shape[1]
    size = float(torch.cat([query, target]).double().norm(dim=1).max()) ** 2
    return torch.finfo(dtype).eps * (2 * d**0.5 + d / 4) * size


def draw_rules(n: int, m: int, kinds: Collection[str]) -> dict[str, Any]:
    """Random arguments for the named rules.

    They are labels, owners, ids, margin, target_alpha, and biases or within.
    """
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
    if "biases" in kinds:
        # Values that float32 holds. Sometimes they lie further apart than the similarities' logits.
        rules["query_bias"] = 4 * torch.randn(n)
        rules["target_bias"] = -(8 * torch.rand(m)).exp().log1p()
    elif "within" in kinds:
        rules["within"] = ("query", "target")
    return rules
