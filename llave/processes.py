"""Let several processes share work and agree. Without torchrun there is one process."""

from __future__ import annotations

import atexit
import json
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

T = TypeVar("T")


def rank_and_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Return this process's number and the number of processes, which torchrun's environment says.

    Args:
        rank, world_size: what to return instead, or None.

    Raises:
        ValueError: the number is not below the number of processes.
    """
    if rank is None:
        rank = int(os.environ.get("RANK", "0"))
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..world_size - 1, got {rank} of {world_size}")
    return rank, world_size


def several() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def from_first(work: Callable[[], T]) -> T:
    """Call ``work`` on rank 0 and return its result on all ranks. Every process must call this.

    Args:
        work: a function that returns a JSON value.

    Raises:
        ValueError, OSError: ``work`` raised it. Every process raises it.
    """
    if not several():
        return work()
    answer: dict[str, Any] | None = None
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            answer = {"found": work()}
        except Exception as error:
            failure = error
            answer = {"error": str(error), "value": isinstance(error, ValueError)}
    told = json.loads(_broadcast(json.dumps(answer).encode()))
    if "error" in told:
        part_at_exit()
    if failure is not None:
        raise failure
    if "error" in told:
        raise (ValueError if told["value"] else OSError)(told["error"])
    found: T = told["found"]
    return found


def largest(number: int) -> int:
    """Return the largest of the processes' numbers. Every process must call this."""
    if not several():
        return number
    found = torch.tensor(number, device=PartialState().device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def part_at_exit() -> None:
    """Destroy the process group when this process exits. All processes must be about to exit."""
    if several():
        atexit.unregister(_part)
        atexit.register(_part)


def _part() -> None:
    # A gloo thread holds the last collective for a moment after it completes. A process that exits
    # in that moment is aborted, whatever its exit status.
    time.sleep(0.5)
    if dist.is_initialized():
        dist.destroy_process_group()


def _broadcast(data: bytes) -> bytes:
    device = PartialState().device
    size = torch.tensor(len(data), device=device)
    dist.broadcast(size, 0)
    sent = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if dist.get_rank() == 0:
        sent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(sent, 0)
    return bytes(sent.cpu().tolist())
