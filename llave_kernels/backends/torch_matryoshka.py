"""Log-sum-exps of several prefixes of the embeddings from one matrix product (``torch`` backend).

The product of two rows over the first d columns is a running sum over the columns. So the product
over the longest prefix passes through those over all others. The rows' lengths over a prefix turn
its products into cosines. Each prefix has its own logits and sums (``torch_backend``).

    forward   2NMD  a strip of products grows from prefix to prefix
    backward  6NMD  the same, then dQ_strip = dS T and dT += dS^T Q_strip. A range of columns takes
                    the sum of the dS of all prefixes that contain it
    one_direction   6NMD: both together

D is the longest prefix. Half precision is widened to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from llave_kernels.backends.positives import positive_similarity
from llave_kernels.backends.products import add_product, gain, product
from llave_kernels.backends.protocol import Gradients, LogSumExps
from llave_kernels.backends.torch_backend import ColumnSums, Slopes, merged, reduced
from llave_kernels.backends.torch_strips import SAFE_EXPONENT, Strips, strip_rows
from llave_kernels.precision import accumulation_dtype
from llave_kernels.rules import Rules, at_labels, biases_of

EPS = 1e-12  # as in torch.nn.functional.normalize
ENOUGH_ROWS = 256  # from which the products of a strip run at full speed


class _Rows:
    """The rows of one side (R, D), divided by their lengths over the longest prefix.

    Attributes:
        parts: the columns that each prefix adds to the one before, (R, d_k - d_{k-1}) each.
        length: (R,) length over the longest prefix, at least ``EPS``.
        factors: (K, R) that length over the length of each prefix.
        bends: (K, R) the square of the factor. 0 where ``EPS`` stands in for the length, which
            then has no gradient.
    """

    def __init__(self, x: Tensor, dims: Sequence[int]) -> None:
        dtype = accumulation_dtype(x.dtype)
        self.ranges = [slice(*pair) for pair in zip((0, *dims), dims, strict=False)]
        norms = [torch.linalg.vector_norm(x[:, part], dim=1, dtype=dtype) for part in self.ranges]
        lengths = torch.stack(norms).square_().cumsum(0).sqrt_()
        live, lengths = lengths > EPS, lengths.clamp(min=EPS)
        self.length = lengths[-1]
        self.factors = self.length / lengths
        self.bends = self.factors.square().mul_(live)
        self.parts = [x[:, part].to(dtype) / self.length[:, None] for part in self.ranges]

    def gradient(self, of_parts: list[Tensor], pulls: Tensor, width: int) -> Tensor:
        """(R, width) gradient of the rows. 0 beyond the longest prefix.

        Args:
            of_parts: that of ``parts``, as if the factors were constants. They are overwritten.
            pulls: (K, R) sums of dS times cosine over each row.
        """
        gradient = self.length.new_zeros(len(self.length), width)
        # A factor depends on all columns of its prefix.
        along = (pulls * self.bends).flip(0).cumsum(0).flip(0)
        for d, x, pull, columns in zip(of_parts, self.parts, along, self.ranges, strict=True):
            gradient[:, columns] = d.sub_(pull[:, None] * x).div_(self.length[:, None])
        return gradient


class _Prefix(Strips):
    """The cosine matrix of one prefix. Its strips are made from products of ``parts``."""

    def __init__(self, query: _Rows, target: _Rows, k: int, scale: Tensor, rules: Rules) -> None:
        self.longest = k == len(query.parts) - 1  # its factors are 1
        self.row_factor, self.column_factor = query.factors[k], target.factors[k]
        # The base class takes the number of rows, dtype and device from these. It never multiplies.
        part, other = query.parts[k], target.parts[k]
        super().__init__(part, other, scale, rules.of_prefix(k), part.new_empty(len(other), 0))

    def _bounded(self) -> bool:
        if self.query.device.type != "cpu":
            return False
        bound = self.scale + max(self.rules.alpha, self.rules.target_alpha)
        bound = bound + sum(x.abs().max() for x in biases_of(self.rules) if x is not None)
        return bool(bound <= SAFE_EXPONENT)

    def scaled(self, strip: slice, matrix: Tensor, out: Tensor | None = None) -> Tensor:
        """``matrix`` (M, rows) times the factors of its rows and columns."""
        if self.longest:
            return matrix if out is matrix else matrix.clone()
        found = torch.mul(matrix, self.column_factor[:, None], out=out)
        return found.mul_(self.row_factor[strip])


class _Prefixes:
    """The cosine matrices of all prefixes of one call, ``rows`` rows at a time."""

    def __init__(
        self, query: Tensor, target: Tensor, scale: Tensor, dims: Sequence[int], rules: Rules
    ) -> None:
        self.query, self.target = _Rows(query, dims), _Rows(target, dims)
        self.rules = rules
        self.each = [_Prefix(self.query, self.target, k, scale, rules) for k in range(len(dims))]
        # The strips of all prefixes share the budget of one, if that is enough rows.
        fit = strip_rows(len(query), len(target), query.dtype)
        self.n, self.rows = len(query), max(fit // (1 + len(dims)), min(fit, ENOUGH_ROWS))

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, self.n, self.rows):
            yield slice(start, min(start + self.rows, self.n))

    def products(self, strip: slice) -> Iterator[tuple[_Prefix, Tensor]]:
        """Each prefix and its products (M, rows), which the next prefix's overwrite."""
        total = None
        for prefix, q, t in zip(self.each, self.query.parts, self.target.parts, strict=True):
            if total is None:
                total = product(t, q[strip].T)
            else:
                add_product(total, t, q[strip].T)
            yield prefix, total

    def positives(self) -> Tensor:
        """(K, N) logits of the positives."""
        labels = self.rules.labels
        parts = zip(self.query.parts, self.target.parts, strict=True)
        found = torch.stack([positive_similarity(q, t, labels) for q, t in parts]).cumsum(0)
        cosines = found * self.query.factors * at_labels(self.target.factors, labels, self.n)
        return self.rules.add_biases(cosines * self.each[0].scale)


def forward(
    query: Tensor, target: Tensor, logit_scale: Tensor, dims: Sequence[int], rules: Rules
) -> LogSumExps:
    """The log-sum-exps of every prefix: (K, N), (K, N) and (K, M), or (K, 0) in one direction.

    Args:
        query, target, logit_scale: as in ``Backend.forward``. The rows need no unit length.
        dims: lengths of the K prefixes, ascending.
        rules: as in ``Backend.forward``. ``row_limit`` is (K, N) with a margin, and
            ``column_limit`` (K, M) or None.
    """
    prefixes = _Prefixes(query, target, logit_scale, dims, rules)
    rows = torch.empty_like(prefixes.query.factors)
    columns = [ColumnSums.of(prefix) for prefix in prefixes.each]
    for strip in prefixes:
        for k, (prefix, products) in enumerate(prefixes.products(strip)):
            cosines = prefix.scaled(strip, products, products if prefix.longest else None)
            rows[k, strip] = reduced(prefix, strip, cosines, columns[k])
    for prefix, lse in zip(prefixes.each, rows, strict=True):
        prefix.nan_outside(lse)
    target_lse = rows.new_empty(len(dims), 0)
    if rules.symmetric:
        target_lse = torch.stack([each.logsumexp() for each in columns])
    return LogSumExps(prefixes.positives(), rows, target_lse)


def backward(
    upstream: LogSumExps,
    outputs: LogSumExps,
    query: Tensor,
    target: Tensor,
    logit_scale: Tensor,
    dims: Sequence[int],
    rules: Rules,
    *,
    bias_gradients: bool,
) -> Gradients:
    """The gradients, from those of ``forward``'s outputs."""
    prefixes = _Prefixes(query, target, logit_scale, dims, rules)
    scale = prefixes.each[0].scale
    factor = gain(scale, *upstream)
    slopes = [
        Slopes(prefix, LogSumExps(*d), LogSumExps(*x), scale * factor)
        for prefix, d, x in zip(
            prefixes.each, zip(*upstream, strict=True), zip(*outputs, strict=True), strict=True
        )
    ]
    gradients = _Gradients(prefixes, bias_gradients=bias_gradients)

    def ds_of(k: int, strip: slice, cosines: Tensor) -> tuple[Tensor, Tensor]:
        return slopes[k].of(strip, cosines), slopes[k].positive[strip]

    for strip in prefixes:
        gradients.add(strip, ds_of)
    d_query, d_target, d_scale, *d_biases = gradients.result(query, target)
    d_query, d_target = (x.div_(factor).to(query.dtype) for x in (d_query, d_target))
    of_biases = (None if x is None else x / factor for x in d_biases)
    return Gradients(d_query, d_target, d_scale / factor, *of_biases)


def one_direction(
    query: Tensor,
    target: Tensor,
    logit_scale: Tensor,
    nested: tuple[Sequence[int], Sequence[float]],
    rules: Rules,
    *,
    bias_gradients: bool,
) -> tuple[Tensor, Gradients]:
    """As ``OneDirection.one_direction``, for the weighted sum over prefixes.

    Args:
        nested: dims, ascending, and their weights.
    """
    dims, weights = nested
    prefixes = _Prefixes(query, target, logit_scale, dims, rules)
    gradients = _Gradients(prefixes, bias_gradients=bias_gradients)
    positives = prefixes.positives()
    loss = torch.zeros_like(positives[0])

    def ds_of(k: int, strip: slice, cosines: Tensor) -> tuple[Tensor, Tensor]:
        each = merged(prefixes.each[k], strip, cosines, positives[k, strip], weights[k])
        loss[strip] += each[0]
        return each[1:]

    for strip in prefixes:
        gradients.add(strip, ds_of)
    return loss, gradients.result(query, target)


class _Gradients:
    """The gradients of one call, summed over strips."""

    def __init__(self, prefixes: _Prefixes, *, bias_gradients: bool) -> None:
        self.prefixes = prefixes
        self.d_biases = prefixes.rules.bias_gradients(bias_gradients)
        # Of the parts, as if the factors were constants; sums of dS times cosine of rows, columns.
        self.d_query = [torch.empty_like(x) for x in prefixes.query.parts]
        self.d_target = [torch.zeros_like(x) for x in prefixes.target.parts]
        self.row_pulls = torch.empty_like(prefixes.query.factors)
        self.column_pulls = torch.zeros_like(prefixes.target.factors)

    def add(
        self, strip: slice, ds_of: Callable[[int, slice, Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        """Make dS of every prefix from the strip, then run the products of every range.

        Args:
            ds_of: makes dS of a prefix's negatives (M, rows) and positives (rows,) from its cosines
                (M, rows), which it may overwrite.
        """
        waiting = []
        for k, (prefix, products) in enumerate(self.prefixes.products(strip)):
            ds, d_positive = ds_of(k, strip, prefix.scaled(strip, products))
            prefix.put_positives(strip, ds, d_positive)
            self._add_biases(strip, ds)
            ds = prefix.scaled(strip, ds, ds)
            pulls = ds * products
            self.row_pulls[k, strip] = pulls.sum(0)
            self.column_pulls[k] += pulls.sum(1)
            waiting.append(ds)
        del pulls
        total = waiting.pop()
        query, target = self.prefixes.query.parts, self.prefixes.target.parts
        for i in reversed(range(len(query))):
            self.d_query[i][strip] = product(total.T, target[i])
            add_product(self.d_target[i], total, query[i][strip])
            if waiting:
                total += waiting.pop()

    def _add_biases(self, strip: slice, ds: Tensor) -> None:
        query, target = self.d_biases
        if query is not None:
            query[strip] += ds.sum(0)
        if target is not None:
            target += ds.sum(1)

    def result(self, query: Tensor, target: Tensor) -> Gradients:
        """The gradients of the inputs, in the accumulation dtype."""
        rows, columns = self.prefixes.query, self.prefixes.target
        scale = self.prefixes.each[0].scale  # dS is that times dz
        return Gradients(
            rows.gradient(self.d_query, self.row_pulls, query.shape[1]),
            columns.gradient(self.d_target, self.column_pulls, target.shape[1]),
            self.row_pulls.sum() / scale,
            *(None if x is None else x / scale for x in self.d_biases),
        )
