"""What a small step costs the host: the time to prepare and launch it, without the kernels.

    python benchmarks/host_time.py --out benchmarks/results/cpu/host_time

The ``cuda`` backend runs on a CPU with a stub in place of its launches. The matrices are so small
that the library's products take next to nothing. The ways take turns. Times are processor time of
one thread, forward and backward. ``ratio`` is to the dense loss of the same turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks import loss_bench, report
from llave_kernels import autograd, hardness_weighted_contrastive_loss
from llave_kernels.backends import cuda

ROWS, WIDTH = 16, 16
STEPS = 50  # of each way in a turn
COLUMNS = [
    "way", "us", "least_us", "ratio", "turns", "machine", "cores", "python", "torch", "llave",
    "date", "command",
]  # fmt: skip


def stub_launches() -> None:
    """Let the ``cuda`` backend prepare its launches on a CPU, and launch nothing."""

    def nothing(**_: object) -> int:
        return 1  # part of the scale's gradient, of a backward

    cuda._missing = None
    cuda._cuda = SimpleNamespace(
        device="cpu", architectures=(80, 90), Problem=SimpleNamespace,
        forward_workspace=lambda problem, rows: 1024,
        most_scale_parts=lambda problem, rows: 1,
        forward=nothing, loss=nothing, backward=nothing,
    )  # fmt: skip
    torch.set_float32_matmul_precision("high")


def ways() -> dict[str, Callable[[], object]]:
    """Steps by name. Each computes a loss and the gradients of both sides."""
    torch.manual_seed(0)
    query, target = (torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(2))
    scale = torch.tensor(50.0, requires_grad=True)
    columns = torch.arange(ROWS)

    def ours(**rules: Any) -> Callable[[], object]:
        inputs = [query, target, *(x for x in rules.values() if x is scale)]

        def step() -> object:
            loss = hardness_weighted_contrastive_loss(query, target, backend="cuda", **rules)
            return torch.autograd.grad(loss, inputs)

        return step

    def by_operator() -> object:
        serves, autograd.serves = autograd.serves, lambda *inputs: False
        try:
            return ours()()
        finally:
            autograd.serves = serves

    def dense() -> object:
        similarity: Tensor = query @ target.T * 50
        loss = (cross_entropy(similarity, columns) + cross_entropy(similarity.T, columns)) / 2
        return torch.autograd.grad(loss, (query, target))

    return {
        "dense, alpha 0": dense,
        "ours": ours(),
        "ours, scale as a tensor that learns": ours(logit_scale=scale),
        "ours, labels": ours(labels=columns),
        "ours, one direction": ours(symmetric=False),
        "ours, by the operator that graphs take": by_operator,
    }


def measure(turns: int) -> list[dict[str, Any]]:
    """A row for each way."""
    steps = ways()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            start = time.process_time()
            for _ in range(STEPS):
                step()
            times[name].append((time.process_time() - start) / STEPS * 1e6)
    dense = min(times["dense, alpha 0"])
    return [
        {
            "way": name, "us": round(statistics.median(each), 1), "least_us": round(min(each), 1),
            "ratio": round(min(each) / dense, 2), "turns": turns,
        }
        for name, each in times.items()
    ]  # fmt: skip


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--out", type=Path, help="folder for host_time.csv")
    options = parser.parse_args(given)
    torch.set_num_threads(1)
    stub_launches()
    rows = measure(options.turns)
    for row in rows:
        print(f"{row['way']:40} {row['us']:7.1f} us  least {row['least_us']:7.1f}  {row['ratio']}x")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        about = loss_bench.where("cpu", ["benchmarks/host_time.py", *(given or sys.argv[1:])])
        report.write_csv([row | about for row in rows], options.out / "host_time.csv", COLUMNS)


if __name__ == "__main__":
    main()
