"""The losses that ``loss_bench.py --loss`` measures. Each but the contrastive one has a file here.

A file has ``FAMILY``: its implementations and its dense formula.
"""

from __future__ import annotations

from benchmarks import peers
from benchmarks.losses import log_q, matryoshka, sigmoid, supcon, within
from benchmarks.peer import Family

LOSSES: dict[str, Family] = {
    "contrastive": peers.FAMILY,
    "supcon": supcon.FAMILY,
    "matryoshka": matryoshka.FAMILY,
    "log-q": log_q.FAMILY,
    "within": within.FAMILY,
    "sigmoid": sigmoid.FAMILY,
}
