"""The gradient products of the ``torch`` backend, strip by strip."""

from __future__ import annotations

import torch
from torch import Tensor

from llave_kernels.backends.products import add_product, product
from llave_kernels.backends.protocol import Gradients, Sums
from llave_kernels.backends.torch_strips import Strips, rounds_gradients


class StripGradients:
    """The gradients, summed over strips of ``factor * dS``. dQ and dT are in ``dtype``."""

    def __init__(
        self,
        strips: Strips,
        dtype: torch.dtype,
        factor: Tensor | None,
        *,
        bias_gradients: bool = False,
    ) -> None:
        self.strips, self.factor = strips, factor
        self.d_query = strips.query.new_empty(strips.query.shape, dtype=dtype)
        self.d_target = strips.target.new_zeros(strips.target.shape, dtype=strips.dtype)
        self.d_scales: list[Tensor] = []
        self.d_biases = strips.rules.bias_gradients(bias_gradients)

    def add(self, strip: slice, ds: Tensor, d_positive: Tensor) -> None:
        """Complete ``ds`` (M, rows) with the positives' gradient, then run both GEMMs."""
        strips, queries = self.strips, self.strips.queries(strip)
        strips.put_positives(strip, ds, d_positive)
        d_query_bias, d_target_bias = self.d_biases
        if d_query_bias is not None:
            d_query_bias[strip] = ds.sum(0)
        if d_target_bias is not None:
            d_target_bias += ds.sum(1)
        if rounds_gradients(strips.query):
            ds = ds.to(queries.dtype)
        d_query = product(ds.T, strips.target)
        add_product(self.d_target, ds, queries)
        # d logit_scale follows from dQ, because s has a gradient only through kappa s. It takes dQ
        # before that is rounded, because the terms cancel.
        self.d_scales.append(torch.linalg.vecdot(queries.to(strips.dtype), d_query).sum())
        self.d_query[strip] = d_query if self.factor is None else d_query.div_(self.factor)

    def result(self) -> Gradients:
        if self.factor is not None:
            self.d_target /= self.factor
        divisor = self.strips.scale if self.factor is None else self.strips.scale * self.factor
        d_scale = torch.stack(self.d_scales).sum() / divisor
        d_biases = (None if x is None else x / divisor for x in self.d_biases)
        return Gradients(self.d_query, self.d_target.to(self.d_query.dtype), d_scale, *d_biases)


class AddedGradients:
    """As ``StripGradients``, added to ``sums``."""

    def __init__(self, strips: Strips, sums: Sums) -> None:
        self.strips, self.sums = strips, sums

    def add(self, strip: slice, ds: Tensor, d_positive: Tensor) -> None:
        strips, queries = self.strips, self.strips.queries(strip)
        strips.put_positives(strip, ds, d_positive)
        if rounds_gradients(strips.query):
            ds = ds.to(queries.dtype)
        add_product(self.sums.query[strip], ds.T, strips.target)
        add_product(self.sums.target, ds, queries)

    def result(self) -> Gradients:
        return Gradients(*self.sums)
