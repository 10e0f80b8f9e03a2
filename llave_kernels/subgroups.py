"""Process groups among some processes of a group, made once through the group's own store.

``new_group`` would need all processes of the world, or it would name the group by a count of the
process's groups. Processes with different counts would then wait for each other forever.

The groups are c10d backends. The functions of ``torch.distributed`` take them like process groups,
except those that look a group up, such as ``get_rank``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

# By the class of a group's backend: (store, rank, size, the group's backend) -> a new one.
_MAKERS: dict[str, Callable[[Any, int, int, Any], Any]] = {
    "ProcessGroupGloo": lambda store, rank, size, like: dist.ProcessGroupGloo(
        store, rank, size, like.options._timeout
    ),
    "ProcessGroupNCCL": lambda store, rank, size, like: dist.ProcessGroupNCCL(
        store, rank, size, _nccl_options(like)
    ),
}
_made: WeakKeyDictionary[dist.ProcessGroup, dict[str, Any]] = WeakKeyDictionary()


def can_split(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether ``of_ranks`` knows the group's backend for a device: gloo or nccl."""
    return type(_backend(group, device)).__name__ in _MAKERS


def of_ranks(group: dist.ProcessGroup, ranks: range, device: torch.device) -> Any:
    """A group of these ranks of a group, for tensors on a device. The process is one of them."""
    if len(ranks) == dist.get_world_size(group):
        return group
    like = _backend(group, device)
    make = _MAKERS[type(like).__name__]
    place = ranks.index(dist.get_rank(group))
    name = f"{device.type}/{ranks.start}:{ranks.stop}:{ranks.step}"
    return _once(group, name, lambda store: make(store, place, len(ranks), like))


def on_host(group: dist.ProcessGroup) -> Any:
    """A gloo group of the same processes, for a group that only takes tensors on a device."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return _once(group, "host", lambda store: dist.ProcessGroupGloo(store, rank, size))


def _once(group: dist.ProcessGroup, name: str, make: Callable[[Any], Any]) -> Any:
    made = _made.setdefault(group, {})
    if name not in made:
        own = dist.distributed_c10d._get_process_group_store(group)
        made[name] = make(dist.PrefixStore(f"llave/{name}", own))  # type: ignore[attr-defined]
    return made[name]


def _backend(group: dist.ProcessGroup, device: torch.device) -> Any:
    """The group's backend for a device, None if it has none."""
    try:
        return group._get_backend(device)
    except RuntimeError:
        return None


def _nccl_options(like: Any) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = like.options._timeout
    return options
