"""The backend protocol, a toy backend that follows it, and what is kept between its passes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llave_kernels import (
    HardnessWeightedContrastiveLoss,
    available_backends,
    contrastive_logsumexp,
    dispatch,
    hardness_weighted_contrastive_loss,
    within,
)
from llave_kernels.backends.protocol import Gradients, LogSumExps, Sums
from llave_kernels.rules import WITHIN, Rules, biases_of
from tests.helpers import assert_contract, draw_rules, embeddings


class Dense:
    """A backend that computes the dense loss in float64. It keeps the similarities."""

    NAME = "dense"

    def unavailable(self) -> str | None:
        return None

    def supports(self, query: Tensor, target: Tensor, rules: Rules) -> str | None:
        if query.dtype != torch.float32:
            return "not float32; use backend='torch'"
        return None if rules.margin is None else "a margin; use backend='torch'"

    def margin_limit(
        self, query: Tensor, target: Tensor, labels: Tensor | None, margin: float
    ) -> Tensor:
        raise NotImplementedError  # no margin is supported

    def kept_shape(self, query: Tensor, target: Tensor, rules: Rules) -> tuple[int, ...]:
        return len(query), len(target)

    def logits(self, s: Tensor, scale: Tensor, alpha: float, rules: Rules) -> Tensor:
        columns, labels = torch.arange(s.shape[1]), rules.labels_of(s)[:, None]
        own = labels == (columns if rules.owners is None else rules.owners)
        weighted = {"in_batch": ~own, "hard_negatives": own}.get(rules.hardness, own | True)
        counts = ~own if rules.hardness == WITHIN else labels != columns
        if rules.query_ids is not None:
            counts &= rules.query_ids[:, None] != rules.target_ids
        z = s * (scale + alpha * weighted) + self.bias(s, rules)
        return z.masked_fill(~counts, -math.inf)

    def bias(self, s: Tensor, rules: Rules) -> Tensor:
        given = zip(biases_of(rules), (1, 0), strict=True)
        return sum((x.unsqueeze(dim) for x, dim in given if x is not None), torch.zeros_like(s))

    def forward(
        self, query: Tensor, target: Tensor, logit_scale: Tensor, rules: Rules, kept: Tensor
    ) -> LogSumExps:
        torch.matmul(query, target.T, out=kept)
        s = kept.double()
        z = logit_scale * s + self.bias(s, rules)
        positive = z.gather(1, rules.labels_of(s)[:, None])[:, 0]
        rows = self.logits(s, logit_scale, rules.alpha, rules).logsumexp(1)
        columns = self.logits(s, logit_scale, rules.target_alpha, rules).logsumexp(0)
        outputs = positive, rows, columns if rules.symmetric else columns[:0]
        return LogSumExps(*(x.float() for x in outputs))

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
        s = (kept if len(kept) else query @ target.T).double()
        rows, columns = (x.masked_fill(x == -math.inf, 0.0) for x in outputs[1:])
        z = self.logits(s, logit_scale, rules.alpha, rules)
        ds = upstream.query_lse[:, None] * (z - rows[:, None]).exp()
        if rules.symmetric:
            z = self.logits(s, logit_scale, rules.target_alpha, rules)
            ds += upstream.target_lse * (z - columns).exp()
        ds.scatter_(1, rules.labels_of(s)[:, None], upstream.positive.double()[:, None])
        dq, dt = logit_scale * ds @ target.double(), logit_scale * ds.T @ query.double()
        if sums is not None:
            sums.query.add_(sums.gain * dq)
            sums.target.add_(sums.gain * dt)
        d_biases = (
            ds.sum(1 - side).float() if bias_gradients and bias is not None else None
            for side, bias in enumerate(biases_of(rules))
        )
        return Gradients(dq.float(), dt.float(), (s * ds).sum().float(), *d_biases)


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(dispatch, "BACKENDS", [Dense(), *dispatch.BACKENDS])
    return Dense.NAME


def test_a_backend_that_is_listed_trains(dense: str) -> None:
    """A linear layer trains as with ``torch``, compiled or not."""
    assert available_backends()[dense] is None
    inputs, target = torch.randn(24, 12), torch.randn(40, 6)
    target = torch.nn.functional.normalize(target, dim=1)

    def trained(backend: str, *, compiled: bool) -> list[float]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(12, 6)
        loss_fn = HardnessWeightedContrastiveLoss(5.0, learnable=True, backend=backend)
        optimizer = torch.optim.SGD([*layer.parameters(), *loss_fn.parameters()], lr=0.5)

        def loss_of(x: Tensor) -> Tensor:
            return loss_fn(torch.nn.functional.normalize(layer(x), dim=1), target)

        step = torch.compile(loss_of, fullgraph=True, backend="aot_eager") if compiled else loss_of
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = step(inputs)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    expected = trained("torch", compiled=False)
    assert expected[-1] < 0.8 * expected[0]
    for compiled in (False, True):
        assert trained(dense, compiled=compiled) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["biases", "within"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_contract_holds_for_a_backend_that_is_listed(
    dense: str, symmetric: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This backend has no pass that computes loss and gradients of one direction together."""
    pair = embeddings(9, 15, 4)
    monkeypatch.setattr(within, "strip_rows", lambda n, device: min(n, 4))
    rules = draw_rules(9, 15, {"ids", "owners", "target_alpha", kind})
    assert_contract(*pair, 20.0, backend=dense, symmetric=symmetric, **rules)


def test_a_listed_backend_may_refuse_a_call(dense: str) -> None:
    pair = embeddings(4, 4, 3, torch.float64)
    with pytest.raises(ValueError, match="backend='dense' does not support this call: not float32"):
        hardness_weighted_contrastive_loss(*pair, backend=dense)


def test_default_labels_are_the_first_columns(backend: str) -> None:
    """Omitted labels and the same labels passed give equal bits."""
    for n, m in ((1, 1), (5, 5), (37, 90)):
        for kinds in (set(), {"ids", "margin"}, {"owners", "target_alpha"}):
            rules = {k: x for k, x in draw_rules(n, m, kinds).items() if k != "labels"}
            results = []
            pair = [x.requires_grad_() for x in embeddings(n, m, 6)]
            for given in ({}, {"labels": torch.arange(n)}):
                outputs = contrastive_logsumexp(*pair, backend=backend, **given, **rules)
                assert outputs.target is not None
                total = outputs.positive.sum() + (outputs.query.exp() + 1).log().sum()
                total = total + (outputs.target.exp() + 1).log().sum()
                results.append([*outputs, *torch.autograd.grad(total, pair)])
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b)
