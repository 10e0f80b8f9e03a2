"""The time of a step on an H100, from a model. Nothing here is measured.

The matrix work and the traffic of one forward and backward are counted:

    main loop    of a tile: the longer of its products at the library's rate, and its operands at
                 L2's rate. Two blocks of a cluster share their targets.
    epilogue     of a tile: its instructions for each warp. A scheduler issues one a cycle. It
                 issues ``ALONE`` of that if it has a single warp, which waits for its own results.
    kernel       waves of tiles. An SM works on ``resident`` tiles at a time: those of a ping-pong
                 kernel's two groups, or as many blocks as fit. A tile takes the longest of its
                 main loop, its epilogue's issue, and both together over ``resident``. A backward
                 kernel also writes dS to memory. Where similarities are kept, the forward also
                 writes them, and the backward reads them and has no main loop.
    product      of a gradient: the fastest of some tiles and splits of the sum, or its traffic to
                 memory
    rounding     its traffic to memory

Launches, gaps between them and the small kernels around the loss are left out. They weigh on small
batches.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from llave_kernels.backends import strip_gemm

SMS = 132
CLOCK = 1.6e9  # under load
PRODUCT = 800e12  # FLOP/s of a large product in half precision
MEMORY = 3.0e12  # bytes/s
L2 = 5120 * CLOCK  # bytes/s
ALONE = 0.75
SCHEDULERS = 4
SHARED = 227 << 10  # bytes of an SM
REGISTERS = 65536  # of an SM
ITEMSIZE = 2
LIBRARY_TILES = ((128, 256), (256, 128), (128, 192), (192, 128), (128, 128))
SPLITS = (1, 2, 4, 8)
ASSUMED = (
    f"H100: {PRODUCT / 1e12:.0f} TFLOP/s, {CLOCK / 1e9:g} GHz, {MEMORY / 1e12:g} TB/s memory, "
    f"{L2 / 1e12:.2g} TB/s L2, {ALONE:g} issue of a lone warp"
)


@dataclass(frozen=True)
class Kernel:
    """What the model needs of a kernel.

    Attributes:
        bm, bn: the tile.
        threads: how many hold its accumulators.
        epilogue: instructions of a thread.
        resident: tiles that are on an SM at a time.
        cluster: blocks that share their targets.
    """

    bm: int
    bn: int
    threads: int
    epilogue: int
    resident: int
    cluster: int

    def seconds(self, n: int, m: int, d: int) -> float:
        """For a similarity matrix N x M."""
        main = _main_loop(self.bm, self.bn, d, self.cluster)
        issue = self.epilogue * self.threads / 32 / SCHEDULERS / CLOCK
        # A lone warp of each scheduler waits for its own results.
        lone = self.threads / 32 <= SCHEDULERS
        latency = main + (issue / ALONE if lone else issue)
        return _waves(n, m, self.bm, self.bn) * max(main, issue, latency / self.resident)


def step(
    forward: Kernel, backward: Kernel, kept: Kernel, n: int, m: int, d: int
) -> dict[str, float]:
    """Milliseconds of the parts, and TFLOP/s counted as 8NMD. Both directions, bfloat16.

    ``kept``: the backward that reads similarities instead of computing them.
    """
    keeps = strip_gemm.keeps(n, m, d, ITEMSIZE)
    similarities = 4 * n * m / MEMORY if keeps else 0.0
    rows = strip_gemm.strip_rows(n, m, ITEMSIZE)
    times = dict.fromkeys(("forward_ms", "backward_ms", "products_ms", "rounding_ms"), 0.0)
    for start in range(0, n, rows):
        strip = min(rows, n - start)
        ds = strip * m * ITEMSIZE
        times["forward_ms"] += max(forward.seconds(strip, m, d), similarities)
        again = kept.seconds(strip, m, 0) if keeps else backward.seconds(strip, m, d)
        times["backward_ms"] += max(again, ds / MEMORY + similarities)
        queries, targets = strip * d * ITEMSIZE, m * d * ITEMSIZE
        times["products_ms"] += _product(strip, d, m, ds + targets + queries)
        # dT: rounded at once, or in float32 that later strips read and write
        total = targets if rows >= n else m * d * 4 * (1 if start == 0 else 2)
        times["products_ms"] += _product(m, d, strip, ds + queries + total)
    if rows < n:
        times["rounding_ms"] = m * d * (4 + ITEMSIZE) / MEMORY
    seconds = sum(times.values())
    figures = {name: 1e3 * value for name, value in times.items()}
    return figures | {"step_ms": 1e3 * seconds, "tflops": 8 * n * m * d / seconds / 1e12}


def resident(registers: int, threads: int, shared: int) -> int:
    """Blocks that fit an SM."""
    return max(1, min(REGISTERS // (registers * threads), SHARED // max(1, shared)))


def _main_loop(bm: int, bn: int, d: int, cluster: int) -> float:
    products = 2 * bm * bn * d / (PRODUCT / SMS)
    return max(products, (bm + bn / cluster) * d * ITEMSIZE / (L2 / SMS))


def _waves(n: int, m: int, bm: int, bn: int) -> int:
    return -(-(-(-n // bm) * -(-m // bn)) // SMS)


def _product(rows: int, columns: int, inner: int, traffic: float) -> float:
    """Seconds of the library's product."""
    best = min(
        _waves(rows, columns * split, bm, bn) * _main_loop(bm, bn, inner / split, 2)
        + (split > 1) * 2 * split * rows * columns * 4 / MEMORY
        for (bm, bn), split in itertools.product(LIBRARY_TILES, SPLITS)
    )
    return max(best, traffic / MEMORY)


def markdown(rows: list[dict[str, str]]) -> str:
    """The table of predictions: TFLOP/s of each backend and width against N."""
    sizes = sorted({int(row["n"]) for row in rows})
    found = {(row["backend"], int(row["d"]), int(row["n"])): float(row["tflops"]) for row in rows}
    lines = [["TFLOP/s, counted as 8NMD", *(f"N = {n:,}" for n in sizes)]]
    for backend, d in sorted({key[:2] for key in found}):
        cells = (f"{found[backend, d, n]:.0f}" for n in sizes)
        lines.append([f"`{backend}`, D = {d:,}", *cells])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
