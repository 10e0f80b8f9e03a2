"""The gradient GEMMs of the GPU backends.

Strips of dS go through a bounded workspace to the library's GEMM. Embeddings are wide (896 to
3,584). A float32 output tile of such a gradient does not fit in registers. One fused kernel would
spend its time on atomics. Two GEMMs per strip run at the library's rate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llave_kernels.backends.products import add_product, product, store_product
from llave_kernels.backends.protocol import Gradients, Sums

WORKSPACE = 256 << 20  # bytes of dS at a time, and of similarities that a forward keeps
# Bytes of a row of embeddings from which a forward keeps similarities. Keeping writes and reads 4
# bytes a pair. That takes as long as a product over 1,067 elements of 2 bytes at 800 TFLOP/s and 3
# TB/s, or over 582 at the 5.5 TB/s of an L2 cache. These rates are a model of an H100, as in
# benchmarks/prediction.py. They are not measured. The forward's writes run beside its products.
# That is worth more than the rounding of these numbers.
KEPT_ROW = 2048
KEPT_ROW_IN_L2 = 1280
L2 = 16 << 20  # bytes of similarities that stay in the L2 cache beside dS
ALIGNMENT = 16  # elements: tensor-core GEMMs need 16 bytes, Triton's stores 16 elements


def strip_rows(n: int, m: int, itemsize: int) -> int:
    """Rows of dS per strip. With several strips, a multiple of 128 if that many fit."""
    rows = max(1, WORKSPACE // (_pitch(m) * itemsize))
    return n if rows >= n else max(1, rows // 128 * 128 or rows)


def keeps(n: int, m: int, d: int, itemsize: int) -> bool:
    """Whether a forward keeps the similarities for its backward.

    It does if they all fit the workspace, so that there is one strip, and if that is faster than
    computing them again.
    """
    row = d * itemsize
    fit = 4 * n * _pitch(m) <= (L2 if row < KEPT_ROW else WORKSPACE)
    return row >= KEPT_ROW_IN_L2 and fit


def kept_shape(query: Tensor, target: Tensor) -> tuple[int, ...]:
    """Shape of the float32 similarities that a forward keeps: (N, pitch), or (0,)."""
    n, (m, d) = query.shape[0], target.shape
    return (n, _pitch(m)) if keeps(n, m, d, query.dtype.itemsize) else (0,)


def new_kept(query: Tensor, target: Tensor) -> Tensor | None:
    """Room for what a forward keeps, or None."""
    shape = kept_shape(query, target)
    return None if shape == (0,) else query.new_empty(shape, dtype=torch.float32)


def gradients(
    query: Tensor,
    target: Tensor,
    logit_scale: float | Tensor,
    fill: Callable[[Tensor, int, int], Tensor | None],
    gain: Tensor | None,
    d_biases: tuple[Tensor | None, Tensor | None] = (None, None),
    *,
    scale_gradient: bool,
    dtype: torch.dtype | None = None,
) -> Gradients:
    """The gradients. That of logit_scale is uninitialised unless ``scale_gradient``.

    Those of query and target are in ``dtype``, by default the inputs'.

    ``fill(ds, start, stop)`` writes ``gain * dS`` of those rows into the first M columns of ``ds``.
    ``ds`` is contiguous, and its width is a multiple of 16. ``gain`` is 0-d, or None for 1. If
    ``fill`` returns a tensor (), that is the strip's part of the scale's gradient, times ``gain``.
    If it returns None, the part is summed from the strip of dQ. ``d_biases`` are zeros for the
    gradients of the biases, or None. They are summed from dS as it is stored.
    """
    n, m = query.shape[0], target.shape[0]  # len(x) takes three times as long on the host
    workspace = strip_workspace(query, target)
    rows = workspace.shape[0]
    d_query = query.new_empty(query.shape, dtype=dtype)
    final = rows >= n and gain is None  # the first product is dT itself
    d_target = target.new_empty(target.shape, dtype=d_query.dtype if final else torch.float32)
    sums: list[Tensor] = []
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        ds, queries, out = workspace, query, d_query
        if rows < n:
            ds, queries, out = workspace[: stop - start], query[start:stop], d_query[start:stop]
        d_scale = fill(ds, start, stop)
        ds = ds[:, :m]
        if d_biases[0] is not None:
            d_biases[0][start:stop] = ds.sum(1, dtype=torch.float32)
        if d_biases[1] is not None:
            d_biases[1].add_(ds.sum(0, dtype=torch.float32))
        sums_products = scale_gradient and d_scale is None
        if gain is None and not sums_products:
            store_product(out, ds, target)
        else:
            strip = product(ds, target)
            _round(out, strip, gain)
            if sums_products:  # from dQ before it is rounded, because the terms cancel
                d_scale = strip.mul_(queries).sum().div_(logit_scale)
            del strip
        if d_scale is not None:
            sums.append(d_scale)
        put = add_product if start else store_product
        put(d_target, ds.T, queries)
    del workspace, ds  # before the last allocation
    if d_target.dtype != d_query.dtype:
        total, d_target = d_target, target.new_empty(target.shape, dtype=d_query.dtype)
        _round(d_target, total, gain)
    elif gain is not None:
        d_target.div_(gain)
    for x in d_biases:
        if x is not None:
            _divide(x.div_(logit_scale), gain)
    if not sums:
        return Gradients(d_query, d_target, query.new_empty((), dtype=torch.float32), *d_biases)
    d_scale = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
    return Gradients(d_query, d_target, _divide(d_scale, gain), *d_biases)


def _divide(x: Tensor, gain: Tensor | None) -> Tensor:
    """``x / gain`` in place."""
    return x if gain is None else x.div_(gain)


def add_gradients(
    query: Tensor,
    target: Tensor,
    fill: Callable[[Tensor, int, int], Tensor | None],
    sums: Sums,
) -> Gradients:
    """Add the gradients to ``sums``. ``fill`` is as in ``gradients``, with the gain of ``sums``."""
    workspace = strip_workspace(query, target)
    n, rows = query.shape[0], workspace.shape[0]
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        fill(workspace[: stop - start], start, stop)
        ds = workspace[: stop - start, : target.shape[0]]
        add_product(sums.query[start:stop], ds, target)
        add_product(sums.target, ds.T, query[start:stop])
    return Gradients(*sums)


def _round(out: Tensor, x: Tensor, gain: Tensor | None) -> None:
    """``out = x / gain``. Before the division ``x`` may not fit the type of ``out``."""
    if gain is None:
        out.copy_(x)
    else:
        torch.div(x, gain, out=out)


def strip_workspace(query: Tensor, target: Tensor) -> Tensor:
    """(rows, M rounded up to a multiple of 16) of the inputs' dtype, uninitialised."""
    n, m = query.shape[0], target.shape[0]
    return query.new_empty((strip_rows(n, m, query.dtype.itemsize), _pitch(m)))


def _pitch(m: int) -> int:
    return -(-m // ALIGNMENT) * ALIGNMENT
