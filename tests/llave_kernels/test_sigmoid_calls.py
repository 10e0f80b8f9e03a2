"""Calls of the sigmoid loss: torch's demands, wrong arguments, the module, memory and launches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from llave_kernels import (
    SigmoidContrastiveLoss,
    dispatch,
    sigmoid_contrastive_loss,
    sigmoid_ops,
)
from llave_kernels.reference import reference_sigmoid_loss
from tests.helpers import embeddings, relative_error
from tests.llave_kernels import accounting
from tests.llave_kernels.sigmoid import meta_call, outcome, truth
from tests.llave_kernels.test_memory import measured


def loss_of(query: Tensor, target: Tensor, **settings: Any) -> Tensor:
    return sigmoid_contrastive_loss(query, target, logit_scale=10.0, logit_bias=-10.0, **settings)


def operands(*, pairs: bool) -> tuple[Any, ...]:
    query, target = (x.requires_grad_() for x in embeddings(6, 9, 5))
    learned = [torch.tensor(x, requires_grad=True) for x in (10.0, -10.0)]
    given = (torch.arange(6) + 2, torch.arange(6) % 3, torch.arange(9) % 3)
    return query, target, *learned, *(given if pairs else (None, None, None))


@pytest.mark.parametrize("pairs", [False, True], ids=["plain", "pairs"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["sigmoid_loss", "sigmoid_rows"])
def test_opcheck(name: str, backend: str, pairs: bool) -> None:
    if dispatch.available_backends()[backend] is not None:
        pytest.skip(f"no {backend}")
    torch.library.opcheck(getattr(torch.ops.llave, name), (*operands(pairs=pairs), backend))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile_without_a_break(reduction: str) -> None:
    """One graph serves every size."""

    def step(query: Tensor, target: Tensor, scale: Tensor) -> Tensor:
        query, target = (normalize(x, dim=1) for x in (query, target))
        return sigmoid_contrastive_loss(
            query, target, logit_scale=scale, logit_bias=-10.0, reduction=reduction
        ).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (8, 11):
        leaves = [x.requires_grad_() for x in embeddings(n, n + 2, 6, unit=False)]
        leaves.append(torch.tensor(7.0, requires_grad=True))
        eager, traced = step(*leaves), compiled(*leaves)
        assert relative_error(traced, eager) < 1e-6
        both = (torch.autograd.grad(x, leaves) for x in (traced, eager))
        for a, b in zip(*both, strict=True):
            assert relative_error(a, b) < 1e-6


def test_autocast_and_dtypes_of_gradients() -> None:
    query, target = (x.requires_grad_() for x in embeddings(12, 12, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(query, target)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (query, target)]
    again = loss_of(*rounded)
    assert torch.equal(loss, again)
    loss.backward()
    again.backward()
    assert query.grad is not None
    assert rounded[0].grad is not None
    assert (loss.dtype, query.grad.dtype) == (torch.float32, torch.float32)
    assert rounded[0].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(reduction: str) -> None:
    query, target = (x.requires_grad_() for x in embeddings(6, 6, 4))
    loss = loss_of(query, target, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(
            torch.autograd.grad(loss, query, create_graph=True)[0].square().sum(), query
        )


def test_transforms_and_forward_mode() -> None:
    query, target = embeddings(6, 6, 4)
    exact = torch.func.grad(
        lambda q: reference_sigmoid_loss(q, target.double(), logit_scale=10.0, logit_bias=-10.0)
    )(query.double())
    assert relative_error(torch.func.grad(lambda q: loss_of(q, target))(query), exact) < 1e-5
    stacked = torch.stack([query, 2 * query])
    mapped = torch.func.vmap(lambda q: loss_of(q, target, reduction="none"))(stacked)
    for rows, each in zip(mapped, stacked, strict=True):
        assert torch.equal(rows, loss_of(each, target, reduction="none"))
    each = torch.func.vmap(torch.func.grad(lambda q: loss_of(q, target)))(stacked)
    assert relative_error(each[0], exact) < 1e-5
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda q: loss_of(q, target), (query,), (query,))


def test_inputs_and_modes() -> None:
    query, target = embeddings(6, 6, 4)
    plain = loss_of(query, target)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert torch.equal(loss_of(query, target), plain)
    target.requires_grad_()
    loss_of(query, target).backward()
    assert query.grad is None
    assert target.grad is not None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"logit_bias": math.inf}, ValueError, "logit_bias must be finite, got inf"),
        ({"logit_bias": "no"}, TypeError, "logit_bias must be a float, got str 'no'"),
        ({"logit_bias": torch.tensor(math.inf)}, ValueError, "logit_bias must be finite"),
        ({"logit_bias": torch.zeros(2)}, ValueError, "logit_bias must be a float or a tensor of"),
        ({"logit_scale": -1.0}, ValueError, "logit_scale must be positive and finite, got -1.0"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of mean, sum, none"),
        ({"backend": "cudnn"}, ValueError, "'cudnn' is not a backend"),
        ({"labels": torch.tensor([0, 1, 9])}, ValueError, "labels must be columns from 0 to 3"),
        ({"query_ids": torch.arange(3)}, ValueError, "query_ids needs target_ids"),
        ({"owners": torch.arange(4)}, TypeError, "owners"),
        ({"target": torch.zeros(2, 5)}, ValueError, "pass labels"),
        ({"target": torch.zeros(4)}, ValueError, "target must have shape"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_wrong_arguments(given: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"query": torch.zeros(3, 5), "target": torch.zeros(4, 5)}
    good |= {"logit_scale": 10.0, "logit_bias": -10.0}
    with pytest.raises(error, match=message):
        sigmoid_contrastive_loss(**(good | given))


def test_wrong_operands() -> None:
    query, target, scale, bias, *_ = operands(pairs=False)
    op = sigmoid_ops.sigmoid_rows
    with pytest.raises(ValueError, match=r"logit_bias must be torch\.float32"):
        op(query, target, scale, bias[None], None, None, None, "torch")
    with pytest.raises(ValueError, match=r"d_rows must be torch\.float32"):
        sigmoid_ops.sigmoid_rows_backward(
            torch.ones(3), query, target, scale, bias, None, None, None, "torch"
        )
    with pytest.raises(RuntimeError, match=r"cannot be transformed by torch\.func"):
        torch.func.grad(
            lambda q: sigmoid_ops.sigmoid_loss(q, target, scale, bias, None, None, None, "torch")[0]
        )(query)


def test_a_backend_without_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "choose", lambda *given: "other")
    query, target = embeddings(3, 3, 4)
    loss_of(query, target)
    with pytest.raises(ValueError, match="backend='other' has no sigmoid loss; choose one of"):
        loss_of(query, target, backend="other")


def test_module() -> None:
    query, target = embeddings(8, 10, 6)
    module = SigmoidContrastiveLoss(reduction="sum")
    assert set(module.state_dict()) == {"log_logit_scale", "logit_bias"}
    labels = torch.arange(8) + 2
    loss = module(query, target, labels=labels)
    loss.backward()
    exact = truth(query, target, 10.0, -10.0, reduction="sum", labels=labels)
    assert relative_error(loss, exact[0]) < 1e-5
    ours = outcome(sigmoid_contrastive_loss, query, target, 10.0, -10.0, reduction="sum",
                   labels=labels)  # fmt: skip
    upstream = 0.5  # of ``outcome``
    assert relative_error(module.log_logit_scale.grad, 10.0 * ours[3] / upstream) < 1e-5
    assert relative_error(module.logit_bias.grad, ours[4] / upstream) < 1e-5
    fixed = SigmoidContrastiveLoss(5.0, -3.0, learnable=False)
    assert not any(x.requires_grad for x in fixed.parameters())
    assert repr(fixed) == (
        "SigmoidContrastiveLoss(logit_scale=5, logit_bias=-3, reduction='mean', backend='auto')"
    )
    for wrong, error in (
        ({"logit_scale": 0.0}, ValueError),
        ({"logit_bias": math.nan}, ValueError),
        ({"learnable": 1}, TypeError),
        ({"gather_group": "all"}, ValueError),
        ({"reduction": "avg"}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(wrong))):
            SigmoidContrastiveLoss(**wrong)


def test_the_module_trains() -> None:
    torch.manual_seed(0)
    module = SigmoidContrastiveLoss()
    query, target = (torch.nn.Parameter(x) for x in embeddings(16, 16, 32))
    optimizer = torch.optim.Adam([query, target, *module.parameters()], lr=0.05)
    values = []
    for _ in range(40):
        loss = module(normalize(query, dim=1), normalize(target, dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < values[0] / 4


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_extra_memory() -> None:
    """The gradients, as computed and as applied, a strip and its losses. S would take 268 MB."""
    call = "sigmoid_contrastive_loss(query, target, logit_scale=10.0, logit_bias=-10.0)"
    assert measured(8192, 384, call) < 110


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_extra_memory_on_a_gpu(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward holds both gradients in float32, the workspace and the losses of its tiles."""
    accounts = accounting.pretend(monkeypatch, backend)
    pair, learned = meta_call(65536, 1536, dtype)
    with accounts:
        loss = sigmoid_contrastive_loss(*pair, **learned, backend=backend)
        forward = accounts.peak()
        loss.backward()
    bound = 2 * 65536 * 1536 * 4 + (256 << 20)
    strip = 2048 * 1536 * 4 if dtype == torch.float16 else 0
    assert bound + strip < forward < bound + strip + 16e6
    assert accounts.peak(without=[x.grad for x in pair if x.grad is not None]) < 2 * bound


@pytest.mark.parametrize(
    ("backend", "forward"),
    [
        ("cuda", "sigmoid sum sum mm mm stack sum"),
        ("triton", "sigmoid_kernel sum sum mm mm stack sum"),
    ],
)
def test_launches_of_a_small_call(
    backend: str, forward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    accounts = accounting.pretend(monkeypatch, backend)
    pair, learned = meta_call(1000, 64, torch.bfloat16)
    with accounts:
        sigmoid_contrastive_loss(*pair, **learned, reduction="sum", backend=backend)
    launches = " ".join(x for x in accounts.launches if x not in ("clone", "select", "unbind"))
    assert launches == forward + " sum"
