"""What the processes of a group tell each other before a loss's first exchange of data.

One vector of integers a process, gathered on the host: a GPU's queue of kernels never drains for
it, and nothing is unpickled.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from llave_kernels.checks import FLOATS, REDUCTIONS
from llave_kernels.rules import HARDNESS_MODES, Rules

Group: TypeAlias = "dist.ProcessGroup | None"  # a string: some builds of torch lack the class


class Call(NamedTuple):
    """Checked arguments of a distributed loss."""

    query: Tensor
    target: Tensor
    scale: Tensor
    rules: Rules
    reduction: str


class Peer(NamedTuple):
    """What a process adds to the global batch. Processes may differ in it.

    Attributes:
        rows, columns: numbers of queries and targets.
        owners: whether not every column is its own owner.
    """

    rows: int
    columns: int
    owners: bool


class _Setting(NamedTuple):
    """What must be the same everywhere: the loss, or what its backward exchanges, depends on it."""

    name: str  # in messages
    of: Callable[[Call], Any]
    encode: Callable[[Any], int] = int
    decode: Callable[[int], Any] = int


def _flag(name: str, of: Callable[[Call], bool]) -> _Setting:
    return _Setting(name, of, int, bool)


def _choice(name: str, of: Callable[[Call], Any], choices: Sequence[Any]) -> _Setting:
    return _Setting(name, of, choices.index, choices.__getitem__)


def _number(name: str, of: Callable[[Call], float | None]) -> _Setting:
    """By its 64 bits; None as one NaN."""

    def encode(x: float | None) -> int:
        # Adding zero makes -0.0 the same as 0.0.
        known = math.nan if x is None or math.isnan(x) else x + 0.0
        return struct.unpack("<q", struct.pack("<d", known))[0]

    def decode(bits: int) -> float | None:
        x = struct.unpack("<d", struct.pack("<q", bits))[0]
        return None if math.isnan(x) else x

    return _Setting(name, of, encode, decode)


def _readable_scale(call: Call) -> float | None:
    """None on a device, which the host would have to wait for."""
    return call.scale.item() if call.scale.device.type == "cpu" else None


SETTINGS = (
    _Setting("the width of the embeddings", lambda call: call.query.shape[1]),
    _choice("their dtype", lambda call: call.query.dtype, FLOATS),
    _flag("requires_grad of query", lambda call: _learns(call.query)),
    _flag("requires_grad of target", lambda call: _learns(call.target)),
    _flag("requires_grad of logit_scale", lambda call: _learns(call.scale)),
    _flag("presence of ids", lambda call: call.rules.query_ids is not None),
    _flag("symmetric", lambda call: call.rules.symmetric),
    _choice("hardness", lambda call: call.rules.hardness, HARDNESS_MODES),
    _choice("reduction", lambda call: call.reduction, REDUCTIONS),
    _number("alpha", lambda call: call.rules.alpha),
    _number("target_alpha", lambda call: call.rules.target_alpha),
    _number("false_negative_margin", lambda call: call.rules.margin),
    _number("logit_scale", _readable_scale),
)


def _learns(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def agree(call: Call | None, refusal: Exception | None, group: Group) -> list[Peer]:
    """Every process's part of the batch; an error on all of them where they disagree.

    Args:
        call: None where this process refuses its arguments.
        refusal: its reason, raised when the others, who would wait for it, have been told.

    Raises:
        RuntimeError: another process refused its arguments.
        ValueError: a setting differs.
    """
    words = [0] * (1 + len(Peer._fields) + len(SETTINGS))
    if call is not None:
        part = Peer(len(call.query), len(call.target), call.rules.owners is not None)
        words = [1, *part, *(s.encode(s.of(call)) for s in SETTINGS)]
    everyone = _gather_words(words, group)
    if refusal is not None:
        raise refusal
    peers = []
    for rank, (accepts, *theirs) in enumerate(everyone):
        if not accepts:
            raise RuntimeError(f"rank {rank} refused its arguments; its own error says why")
        part = Peer._make(theirs[: len(Peer._fields)])
        values = zip(theirs[len(part) :], words[1 + len(part) :], strict=True)
        for setting, (there, here) in zip(SETTINGS, values, strict=True):
            if there != here:
                raise ValueError(
                    f"{setting.name} is {setting.decode(there)} on rank {rank} and "
                    f"{setting.decode(here)} here; it must be the same on every process"
                )
        peers.append(part)
    return peers


def _gather_words(words: list[int], group: Group) -> list[list[int]]:
    world = dist.get_world_size(group)
    if world == 1:
        return [words]
    mine = torch.tensor(words, dtype=torch.int64)
    everyone = [torch.empty_like(mine) for _ in range(world)]
    given = dist.group.WORLD if group is None else group
    assert given is not None
    if "cpu:" in dist.get_backend_config(given):
        dist.all_gather(everyone, mine, given)
    else:
        _on_host(given).allgather([everyone], [mine]).wait()
    return [each.tolist() for each in everyone]


_hosts: WeakKeyDictionary[dist.ProcessGroup, Any] = WeakKeyDictionary()


def _on_host(group: dist.ProcessGroup) -> Any:
    """The processes of a group that takes tensors on a device only, over gloo; made once.

    Through the group's own store. ``new_group`` counts the groups of a process, and members of a
    group may have counted differently: they would wait for each other under two names.
    """
    if group not in _hosts:
        own = dist.distributed_c10d._get_process_group_store(group)
        store = dist.PrefixStore("llave", own)  # type: ignore[attr-defined]
        size = dist.get_world_size(group)
        _hosts[group] = dist.ProcessGroupGloo(store, dist.get_rank(group), size)
    return _hosts[group]
