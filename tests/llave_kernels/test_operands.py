"""Direct calls of the operators: labels and owners that name no column, and wrong arguments."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import llave_kernels.ops  # noqa: F401  (registers torch.ops.llave)
from llave_kernels import dispatch, hardness_weighted_contrastive_loss
from llave_kernels.backends.protocol import LogSumExps
from llave_kernels.backends.torch_backend import kept_shape, one_direction
from llave_kernels.reference import reference_logsumexp, reference_loss
from llave_kernels.rules import ELSEWHERE, Rules, at_labels
from tests.helpers import clear_margin, embeddings, relative_error

N, M, D = 70, 150, 8
OUTSIDE = {3: -2, 5: M, 20: (1 << 32) + 20, 33: -(1 << 63), 40: (1 << 63) - 1, 69: (1 << 31) + 7}
BAD = torch.tensor(list(OUTSIDE))
GOOD = torch.tensor([i for i in range(N) if i not in OUTSIDE])


def rules_of(labels: Tensor, owners: Tensor | None, margin: float | None, symmetric: bool) -> Rules:
    return Rules(labels, owners, *[None] * 6, 9.0, 2.0, "in_batch", margin, symmetric)


def outside(labels: Tensor) -> Tensor:
    return labels.index_put((BAD,), torch.tensor(list(OUTSIDE.values())))


def step(backend: str, query: Tensor, target: Tensor, rules: Rules, upstream: list[Tensor]) -> Any:
    """Outputs and gradients from the backend itself. It checks no values."""
    module, scale = dispatch.named(backend), torch.tensor(20.0)
    kept = torch.empty(module.kept_shape(query, target, rules))
    outputs = module.forward(query, target, scale, rules, kept)
    gradients = module.backward(
        LogSumExps(*upstream), query, target, scale, outputs, kept, rules, scale_gradient=True
    )
    return outputs, gradients


@pytest.mark.parametrize("margin", [None, 0.3])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("mined", [True, False])
def test_a_label_outside_makes_its_own_row_nan(
    backend: str, symmetric: bool, mined: bool, margin: float | None
) -> None:
    query, target = embeddings(N, M, D)
    labels = torch.randperm(M)[:N]
    owners = labels[torch.arange(M) % N].index_put((labels,), labels) if mined else None
    upstream = [torch.rand(k) + 0.5 for k in (N, N, M if symmetric else 0)]
    if margin is not None:
        known = clear_margin(query, target, false_negative_margin=margin, labels=labels)
        margin = known["false_negative_margin"]
    rules = rules_of(outside(labels), owners, margin, symmetric)
    (positive, rows, columns), gradients = step(backend, query, target, rules, upstream)
    assert all(bool(x[BAD].isnan().all()) for x in (positive, rows, gradients[0]))

    # In the reference for the columns the bad rows' label is an extra column.
    wider = torch.cat([target, torch.zeros(1, D)]).double()
    more = {"alpha": 9.0, "target_alpha": 2.0, "logit_scale": 20.0, "false_negative_margin": margin}
    nobody = torch.arange(M)
    q = query.double().requires_grad_()
    of_columns = {
        "labels": labels.index_put((BAD,), torch.tensor(M)),
        "owners": torch.cat([nobody if owners is None else owners, torch.tensor([M])]),
    }
    of_rows = {"labels": labels, "owners": nobody if owners is None else owners}
    p, n, _ = reference_logsumexp(q, wider[:M], **of_rows, **more)
    total = (upstream[0] * p + upstream[1] * n)[GOOD].sum()
    assert relative_error(positive[GOOD], p[GOOD]) < 1e-5
    assert relative_error(rows[GOOD], n[GOOD]) < 1e-5
    if symmetric:
        _, _, c = reference_logsumexp(q, wider, **of_columns, **more)
        assert c is not None
        assert relative_error(columns, c[:M]) < 1e-5
        total = total + (upstream[2] * c[:M]).sum()
    total.backward()
    assert q.grad is not None
    assert relative_error(gradients[0][GOOD], q.grad[GOOD]) < 1e-4


@pytest.mark.parametrize("margin", [None, 0.3])
@pytest.mark.parametrize("hardness", ["in_batch", "hard_negatives"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_of_columns_make_up_the_whole(
    backend: str, symmetric: bool, hardness: str, margin: float | None
) -> None:
    """Each block knows the positives in its own columns. The last has no positives and owners."""
    query, target = embeddings(N, M, D)
    starts = [0, 37, 100, M]
    blocks = [slice(*pair) for pair in itertools.pairwise(starts)]
    labels, owners = torch.randperm(100)[:N], torch.full((M,), M)
    for block in blocks[:2]:
        columns = torch.arange(M)[block]
        present = labels[torch.isin(labels, columns)]
        owners[block] = present[torch.randint(len(present), (len(columns),))]
    owners[labels] = labels
    ids = {"query_ids": torch.randint(20, (N,)), "target_ids": torch.randint(20, (M,))}
    row_limit = column_limit = None
    if margin is not None:
        known = clear_margin(query, target, false_negative_margin=margin, labels=labels)
        margin = known["false_negative_margin"]
        row_limit = dispatch.named(backend).margin_limit(query, target, labels, margin)
        column_limit = rules_of(labels, None, margin, True).column_limits(row_limit, M)
    pair = [x.double().requires_grad_() for x in (query, target)]
    truth = reference_logsumexp(
        *pair, logit_scale=20.0, alpha=9.0, target_alpha=2.0, hardness=hardness, labels=labels,
        owners=owners, false_negative_margin=margin, symmetric=symmetric, **ids,
    )  # fmt: skip
    upstream = [torch.rand(len(x)) + 0.5 for x in truth if x is not None]
    sum((d * x).sum() for d, x in zip(upstream, truth, strict=False)).backward()

    calls, outputs = [], []
    for block in blocks:
        here = (labels >= block.start) & (labels < block.stop)
        rules = Rules(
            torch.where(here, labels - block.start, ELSEWHERE),
            torch.where(owners[block] == M, -1, owners[block] - block.start),
            ids["query_ids"], ids["target_ids"][block], row_limit,
            None if column_limit is None else column_limit[block], None, None, 9.0, 2.0, hardness,
            margin, symmetric,
        )  # fmt: skip
        arguments = query, target[block], torch.tensor(20.0)
        kept = torch.empty(dispatch.named(backend).kept_shape(*arguments[:2], rules))
        found = dispatch.named(backend).forward(*arguments, rules, kept)
        assert torch.equal(found.positive.isnan(), ~here)
        calls.append((arguments, found, kept, rules, here))
        outputs.append(found)
    positive, rows, columns = zip(*outputs, strict=True)
    whole = torch.stack(rows).logsumexp(0)
    assert relative_error(torch.stack(positive).nansum(0), truth[0]) < 1e-5
    assert relative_error(whole, truth[1]) < 1e-5
    if truth[2] is not None:
        assert relative_error(torch.cat(columns), truth[2]) < 1e-5
    gradients = []
    for block, (arguments, found, kept, rules, here) in zip(blocks, calls, strict=True):
        given = LogSumExps(
            upstream[0] * here,
            upstream[1] * (found.query_lse - whole).exp(),
            upstream[2][block] if symmetric else torch.empty(0),
        )
        back = dispatch.named(backend).backward
        gradients.append(back(given, *arguments, found, kept, rules, scale_gradient=True))
    dq, dt, *_ = zip(*gradients, strict=True)
    assert relative_error(sum(dq[1:], dq[0]), pair[0].grad) < 1e-4
    assert relative_error(torch.cat(dt), pair[1].grad) < 1e-4


def test_one_direction_of_a_label_outside() -> None:
    query, target = embeddings(N, M, D)
    labels, scale = torch.arange(N), torch.tensor(20.0)
    whole = one_direction(query, target, scale, rules_of(labels, None, None, False))
    rules = rules_of(outside(labels), None, None, False)
    loss, (dq, *_) = one_direction(query, target, scale, rules)
    assert bool(loss[BAD].isnan().all())
    assert bool(dq[BAD].isnan().all())
    assert torch.equal(loss[GOOD], whole[0][GOOD])
    assert relative_error(dq[GOOD], whole[1].query[GOOD]) < 1e-6


def test_a_range_of_owners_is_the_identity(backend: str) -> None:
    query, target = (x.requires_grad_() for x in embeddings(5, 13, 8))
    labels = torch.randperm(13)[:5]
    results = []
    for owners in (range(13), torch.arange(13)):
        loss = hardness_weighted_contrastive_loss(
            query, target, labels=labels, owners=owners, hardness="all", backend=backend
        )
        results.append([loss, *torch.autograd.grad(loss, (query, target))])
        expected = reference_loss(
            query.double(),
            target.double(),
            labels=labels,
            owners=owners,
            hardness="all",
            logit_scale=50.0,
            alpha=9.0,
        )
        assert relative_error(loss, expected) < 1e-5
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-5
    for wrong in (range(12), range(1, 13), range(0, 26, 2)):
        with pytest.raises(ValueError, match=r"owners as a range must be range\(13\)"):
            hardness_weighted_contrastive_loss(
                query, target, labels=labels, owners=wrong, backend=backend
            )


def test_an_owner_outside_owns_nothing(backend: str) -> None:
    """No pass reads 2^32 + 3 as 3."""
    query, target = embeddings(N, M, D)
    upstream = [torch.rand(k) + 0.5 for k in (N, N, M)]
    none, wrong = torch.arange(M), torch.arange(M)
    wrong[N:] = torch.arange(M - N) % N + (1 << 32)
    wrong[N + 1 : N + 4] = torch.tensor([-1, M, -(1 << 63)])
    found, expected = (
        step(backend, query, target, rules_of(torch.arange(N), x, 0.1, True), upstream)
        for x in (wrong, none)
    )
    for pair in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True) if a is not None)


def test_what_is_read_and_written_at_labels() -> None:
    labels = torch.tensor([2, -1, 0, 3, 1 << 40])
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    read = at_labels(values, labels, len(labels))
    assert read[[0, 2]].tolist() == [3.0, 1.0]
    assert bool(read[[1, 3, 4]].isnan().all())
    read.backward(torch.tensor([1.0, math.nan, 2.0, math.nan, math.nan]))
    assert values.grad is not None
    assert values.grad.tolist() == [2.0, 0.0, 1.0]
    rules = rules_of(labels, None, 0.0, True)
    assert rules.column_limits(torch.arange(5.0), 3).tolist() == [2.0, math.inf, 0.0]


QUERY, TARGET = torch.ones(4, 3), torch.ones(6, 3)
ARGUMENTS: dict[str, Any] = {
    "query": QUERY,
    "target": TARGET,
    "logit_scale": torch.tensor(20.0),
    "labels": torch.arange(4),
    "owners": torch.arange(6),
    "query_ids": None,
    "target_ids": None,
    "row_limit": None,
    "column_limit": None,
    "query_bias": None,
    "target_bias": None,
    "alpha": 9.0,
    "target_alpha": 9.0,
    "hardness": "in_batch",
    "margin": None,
    "symmetric": True,
}
MISTAKES: list[tuple[str, dict[str, Any]]] = [
    ("columns from -1 to 5, got values from -2 to 1", {"labels": torch.arange(-2, 2)}),
    ("got values from 0 to 4294967296", {"labels": torch.tensor([0, 1, 2, 1 << 32])}),
    (
        "labels must not repeat a column",
        {"labels": torch.tensor([0, 1, 1, 2]), "margin": 0.1},
    ),
    (r"labels must have shape \(4,\), got \(3,\)", {"labels": torch.arange(3)}),
    ("labels must be an integer tensor", {"labels": torch.ones(4)}),
    ("owners must be columns .* got values from 1 to 6", {"owners": torch.arange(1, 7)}),
    (r"owners must have shape \(6,\), got \(4,\)", {"owners": torch.arange(4)}),
    ("query_ids needs target_ids", {"query_ids": torch.arange(4)}),
    (
        "query_ids must be int64",
        {"query_ids": torch.arange(4).int(), "target_ids": torch.arange(6)},
    ),
    (
        r"target_ids must have shape \(6,\)",
        {"query_ids": torch.arange(4)} | {"target_ids": torch.arange(5)},
    ),
    (r"row_limit must be torch.float32 of shape \(4,\)", {"row_limit": torch.ones(6)}),
    (r"column_limit must be torch.float32 of shape \(6,\)", {"column_limit": torch.ones(5)}),
    ("column_limit must be torch.float32", {"column_limit": torch.ones(6, dtype=torch.float64)}),
    (r"logit_scale must be torch.float32 of shape \(\)", {"logit_scale": torch.ones(1)}),
    ("logit_scale must be torch.float32", {"logit_scale": torch.tensor(1.0, dtype=torch.float64)}),
    (r"query_bias must have shape \(4,\), got \(6,\)", {"query_bias": torch.ones(6)}),
    ("target_bias must be torch.float32 for", {"target_bias": torch.ones(6).half()}),
    ("hardness must be one of", {"hardness": "hard"}),
    ("same width, got 3 and 5", {"target": torch.ones(6, 5)}),
    ("target is empty", {"target": torch.ones(0, 3)}),
]
BACKWARD: list[tuple[str, dict[str, Any]]] = [
    (r"d_positive must be torch.float32 of shape \(4,\)", {"d_positive": torch.ones(3)}),
    (r"d_target_lse must be torch.float32 of shape \(6,\)", {"d_target_lse": torch.ones(0)}),
    ("query_lse must be .* got torch.float64", {"query_lse": torch.ones(4, dtype=torch.float64)}),
    (r"kept must be .* of shape \(6, 4\)", {"kept": torch.ones(5, 4)}),
    (r"kept must be .* got torch.float32 of shape \(6,\)", {"kept": torch.ones(6)}),
]


def call(operator: str, backend: str = "torch", **change: Any) -> Any:
    arguments = ARGUMENTS | {"backend": backend}
    kept = torch.zeros(kept_shape(QUERY, TARGET, rules_of(torch.arange(4), None, None, True)))
    sizes = {"positive": 4, "query_lse": 4, "target_lse": 6}
    outputs = {k: torch.zeros(n) for k, n in sizes.items()}
    outputs |= {f"d_{k}": torch.ones(n) for k, n in sizes.items()}
    arguments |= outputs | {"kept": kept, "scale_gradient": True, "bias_gradients": True} | change
    schema = getattr(torch.ops.llave, operator).default._schema
    return getattr(torch.ops.llave, operator)(*(arguments[x.name] for x in schema.arguments))


@pytest.mark.parametrize(("message", "change"), MISTAKES, ids=lambda x: str(x)[:40])
def test_operators_refuse_what_backends_rely_on(message: str, change: dict[str, Any]) -> None:
    for operator in (
        "contrastive_logsumexp", "contrastive_logsumexp_backward", "one_direction_loss",
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            call(operator, **change)


@pytest.mark.parametrize(("message", "change"), BACKWARD, ids=lambda x: str(x)[:40])
def test_the_backward_refuses_what_no_forward_returned(message: str, change: Any) -> None:
    with pytest.raises(ValueError, match=message):
        call("contrastive_logsumexp_backward", **change)


@pytest.mark.parametrize("name", ["auto", "", "cuda0", "Torch"])
@pytest.mark.parametrize("operator", ["contrastive_logsumexp", "contrastive_logsumexp_backward"])
def test_operators_take_the_name_of_a_backend(operator: str, name: str) -> None:
    with pytest.raises(
        ValueError, match=f"backend must be one of triton, cuda, torch, got '{name}'"
    ):
        call(operator, name)


def test_operators_say_what_a_backend_does_not_support(backend: str) -> None:
    wide = {k: x.double() for k, x in ARGUMENTS.items() if k in ("query", "target", "logit_scale")}
    if backend == "torch":
        assert call("contrastive_logsumexp", **wide)[0].dtype == torch.float64
        return
    with pytest.raises(ValueError, match="float64 is not one of"):
        call("contrastive_logsumexp", backend, **wide)


def test_operators_take_narrow_integers_and_gaps(backend: str) -> None:
    given = {"labels": torch.arange(8, dtype=torch.int32)[::2] // 2}
    given |= {f"d_{x}": torch.ones(2 * n)[::2] for x, n in (("positive", 4), ("target_lse", 6))}
    kept = {} if backend == "torch" else {"kept": torch.zeros(0)}
    for operator in ("contrastive_logsumexp", "contrastive_logsumexp_backward"):
        found, expected = (call(operator, backend, **kept, **x) for x in (given, {}))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
