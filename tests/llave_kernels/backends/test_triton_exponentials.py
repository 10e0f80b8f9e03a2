"""Tiles for which the Triton kernels take one exponential per pair, and tiles for which two."""

from __future__ import annotations

from typing import Any

import pytest
import triton.language as tl
from torch import Tensor

from llave_kernels import contrastive_logsumexp
from llave_kernels.backends import triton_backend
from tests.helpers import assert_contract, draw_rules, embeddings

pytestmark = pytest.mark.skipif(
    not triton_backend.INTERPRETED, reason="a constant of the kernels is changed"
)
N, M, D, SCALE = 70, 100, 16, 50.0
ROWS_ALONE = 32  # a tile of rows


def data(kind: str) -> tuple[Tensor, Tensor]:
    """Rows whose logits lie close together, far apart, or far apart in some tiles."""
    query, target = embeddings(N, M, D)
    if kind == "far":
        return 4 * query, 4 * target
    if kind == "some far":
        query[:ROWS_ALONE] *= 16
    return query, target


def lse_and_gradient(query: Tensor, target: Tensor, **rules: Any) -> tuple[Tensor, Tensor]:
    """The rows' log-sum-exps, and the gradient of the sum of all that are finite."""
    query = query.clone().requires_grad_()
    found = contrastive_logsumexp(query, target, logit_scale=SCALE, backend="triton", **rules)
    sum(x[x.isfinite()].sum() for x in (found.query, found.target)).backward()
    return found.query.detach(), query.grad


@pytest.mark.skipif(
    not triton_backend.kernels.RULES_TOO.value,
    reason="the interpreter of triton 3.4 shows no difference; assert_contract runs elsewhere",
)
@pytest.mark.parametrize("kinds", [(), ("labels",), ("owners", "ids", "margin")], ids="+".join)
@pytest.mark.parametrize("kind", ["close", "far", "some far"])
def test_each_tile_takes_what_its_logits_allow(
    monkeypatch: pytest.MonkeyPatch, kind: str, kinds: tuple[str, ...]
) -> None:
    query, target = data(kind)
    rules = draw_rules(N, M, kinds)
    if kinds == ("labels",):
        del rules["owners"]
    assert_contract(query, target, SCALE, backend="triton", reduction="none", **rules)
    ours = lse_and_gradient(query, target, **rules)
    monkeypatch.setattr(triton_backend.kernels, "WINDOW", tl.constexpr(-1.0))
    two = lse_and_gradient(query, target, **rules)
    lse, gradient = (a == b for a, b in zip(ours, two, strict=True))
    assert lse[:ROWS_ALONE].all() == (kind != "close")
    assert lse[ROWS_ALONE:].all() == (kind == "far")
    assert gradient.all() == (kind == "far")


def test_sums_of_one_column_are_those_of_both_kinds_of_tiles() -> None:
    """Rows far below the shift of their tile still count in the columns that they dominate."""
    query, target = embeddings(N, M, D)
    query[:ROWS_ALONE] = 0  # the first tiles set the shift
    for size in (1.0, -20.0, 20.0):
        query[ROWS_ALONE:] *= size
        assert_contract(query, target, SCALE, backend="triton", reduction="none")
