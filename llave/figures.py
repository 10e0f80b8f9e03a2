"""What a training logs beside its loss: throughput, memory, and how well a batch is told apart."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from llave.losses import LLaVELoss
from llave_kernels import similarity_statistics

_ROWS = 1024  # rows of similarities in memory at a time


class Figures(TrainerCallback):
    """Collects the figures of the steps since the last log entry.

    The time of evaluations and checkpoints does not count. The wait for data does.

    Args:
        loss: the loss. It keeps the embeddings of the last batch.
    """

    def __init__(self, loss: LLaVELoss) -> None:
        self._loss = loss
        self._seconds, self._rows = 0.0, 0
        self._tokens: Tensor | int = 0
        self._mark = time.monotonic()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._mark = time.monotonic()

    on_evaluate = on_save = on_train_begin

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.monotonic()
        self._seconds += now - self._mark
        self._mark = now

    def see(self, inputs: dict[str, Any]) -> None:
        """Count the rows and tokens of a batch, padding left out."""
        rows = 0
        for name, ids in inputs.items():
            if name.endswith("input_ids"):
                mask = inputs.get(f"{name.removesuffix('input_ids')}attention_mask")
                self._tokens = self._tokens + (ids.numel() if mask is None else mask.sum())
                rows = rows or len(ids if mask is None else mask)
        self._rows += rows

    def take(self, accelerator: Any) -> dict[str, float]:
        """Return the figures, and begin anew. Every process must call this.

        Returns:
            ``pairs_per_second``, ``tokens_per_second`` (all processes together; tokens of both
            sides and of mined negatives), ``peak_memory_gib`` (of the process with most: allocated
            on its GPU, or resident on a CPU, since the start), and of the last batch
            ``in_batch_accuracy`` and ``similarity_overlap``.
        """
        device = accelerator.device
        counts = torch.tensor([self._rows, float(self._tokens)], device=device)
        rows, tokens = accelerator.reduce(counts, "sum").tolist()
        peaks = accelerator.gather(torch.tensor([_peak_memory(device)], device=device))
        found = {"peak_memory_gib": round(float(peaks.max()), 3)}
        if self._seconds:
            found["pairs_per_second"] = round(rows / self._seconds, 2)
            found["tokens_per_second"] = round(tokens / self._seconds, 1)
        self._seconds, self._rows, self._tokens = 0.0, 0, 0
        if self._loss.last is not None:
            query, positive, ids = self._loss.last
            query, positive = accelerator.gather(query), accelerator.gather(positive)
            if ids is None:
                ids = torch.arange(len(query), device=query.device)
            else:
                ids = accelerator.gather(ids)
            found["in_batch_accuracy"] = in_batch_accuracy(query, positive, ids)
            told = similarity_statistics(query, positive, query_ids=ids, target_ids=ids)
            found["similarity_overlap"] = float(told.overlap)
        return found


def in_batch_accuracy(query: Tensor, positive: Tensor, ids: Tensor) -> float:
    """Return the share of queries whose positive is nearer than every other row's.

    A tie counts as wrong. A copy of the row's own positive does not count.

    Args:
        query, positive: (N, D) embeddings of length 1.
        ids: (N,) content ids of the positives.
    """
    right = 0
    for first in range(0, len(query), _ROWS):
        rows = slice(first, first + _ROWS)
        scores = query[rows] @ positive.T
        own = scores.diagonal(first)[:, None]
        others = ids[rows][:, None] != ids
        right += int(((scores >= own) & others).any(1).logical_not().sum())
    return right / len(query)


def _peak_memory(device: torch.device) -> float:
    """Return this process's peak memory in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
