"""Agreement between the processes of a group before a loss exchanges data.

Each process sends a few integers. They are gathered on the host, so no process waits for its GPU.
Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import device_mesh

from llave_kernels import checks, subgroups, transforms
from llave_kernels.precision import float32_matmul

# A string, because some builds of torch lack the classes.
Group: TypeAlias = "dist.ProcessGroup | device_mesh.DeviceMesh | None"
T = TypeVar("T")


class Peer(NamedTuple):
    """A process's part of the global batch. It may differ between processes.

    Attributes:
        rows, columns: numbers of queries and targets.
        owners: whether the process has owners. Without them, every column is its own owner.
        node: a number for the process's machine. ``agree`` fills it in.
    """

    rows: int
    columns: int
    owners: bool = False
    node: int = 0


class Terms(NamedTuple):
    """What a process tells the others about a call.

    Attributes:
        part: the process's part of the batch.
        settings: what must be the same on every process, keyed by the name used in messages. The
            loss or the data exchanged depends on it.
        scale: the logit scale. It must be the same too.
    """

    part: Peer
    settings: dict[str, Any]
    scale: Tensor


def group_of(name: str, value: Any) -> Group:
    """A process group, a 2-D DeviceMesh, or None for all processes.

    Raises:
        TypeError: anything else.
        ValueError: a mesh of another number of dimensions, or without this process.
    """
    if is_mesh(value):
        if value.ndim != 2:
            raise ValueError(
                f"{name} must be a DeviceMesh of 2 dimensions, got {value.ndim}: {value}; pass two "
                "of its dimensions, or get_group() of one"
            )
        if value.get_coordinate() is None:
            raise ValueError(f"{name} must be a DeviceMesh with this process, got {value}")
    elif value is not None and not isinstance(value, dist.ProcessGroup):
        raise TypeError(
            f"{name} must be a process group, a 2-D DeviceMesh or None, got {checks.typed(value)}; "
            "new_group gives a process outside the group no group"
        )
    return value


def is_mesh(value: Any) -> bool:
    return dist.is_available() and isinstance(value, device_mesh.DeviceMesh)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def agree(prepare: Callable[[], tuple[T, Terms]], group: Group) -> tuple[T, list[Peer]]:
    """Return what ``prepare`` makes and every process's part. If they disagree, all raise.

    Args:
        prepare: checks this process's arguments. Its exception is raised after the other processes
            have been told. Otherwise they would wait.

    Raises:
        RuntimeError: another process refused its arguments; torch.distributed is not initialised.
        ValueError: a setting differs, or the scale on a device differed in an earlier call.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialised: call torch.distributed.init_process_group, or "
            "use hardness_weighted_contrastive_loss in a single process"
        )
    given: Any = group_of("group", group) or dist.group.WORLD
    refusal, text, part, late = None, b"", Peer(0, 0), None
    try:
        transforms.refuse_all()
        made, terms = prepare()
        part = terms.part._replace(node=_digest(socket.gethostname().encode()))
        late = None if _capturing() else _LATE.get(given)
        text = _text(terms)
    except Exception as problem:
        refusal = problem
    digest = _digest(text)
    scale = late.bits() if late is not None else None
    words = [refusal is None, *part, len(text), digest, scale is not None, scale or 0]
    # Inside a transform tensors have no data, yet the other processes must learn of the refusal.
    with transforms.outside():
        gathered = _gather(torch.tensor(words, dtype=torch.int64), given)
        everyone = [each.tolist() for each in gathered]
    if refusal is not None:
        raise refusal
    for rank, (accepts, *_) in enumerate(everyone):
        if not accepts:
            raise RuntimeError(f"rank {rank} refused its arguments; its own error says why")
    *_, lengths, digests, known, scales = zip(*everyone, strict=True)
    if len(set(digests)) > 1:
        longest = torch.zeros(max(lengths), dtype=torch.uint8)
        longest[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        texts = [bytes(each.tolist()) for each in _gather(longest, given)]
        _compare([json.loads(x[:n]) for x, n in zip(texts, lengths, strict=True)], given)
    if all(known):
        del _LATE[given]
        name = "the logit_scale of an earlier call"
        _compare([{name: _number(bits)} for bits in scales], given)
    if given not in _LATE and _unread(terms.scale) and not _capturing():
        _LATE[given] = _Late(terms.scale)
    return made, [
        Peer(rows, columns, bool(owners), node) for _, rows, columns, owners, node, *_ in everyone
    ]


def learns(x: Tensor) -> bool:
    """Whether a gradient will be computed and exchanged."""
    return torch.is_grad_enabled() and x.requires_grad


def _digest(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def _compare(everyone: list[dict[str, str]], group: Any) -> None:
    if is_mesh(group):
        own = group.get_local_rank(0) * group.size(1) + group.get_local_rank(1)
    else:
        own = dist.get_rank(group)
    mine = everyone[own]
    for rank, theirs in enumerate(everyone):
        for name in mine | theirs:
            there, here = (settings.get(name, "not told") for settings in (theirs, mine))
            if there != here:
                raise ValueError(
                    f"{name} is {there} on rank {rank} and {here} here; it must be the same on "
                    "every process"
                )


def _text(terms: Terms) -> bytes:
    settings = terms.settings | {"float32's matmul precision": _precision()}
    if not _unread(terms.scale):
        settings["logit_scale"] = terms.scale.item()
    plain = {k: x + 0.0 if isinstance(x, float) else x for k, x in settings.items()}  # no -0.0
    return json.dumps({name: str(x) for name, x in plain.items()}).encode()


def _precision() -> str:
    """The precision of both kinds of devices, once if they share it."""
    return ", ".join(dict.fromkeys(float32_matmul(kind) for kind in ("cuda", "cpu")))


def _unread(scale: Tensor) -> bool:
    """Whether the scale is on a device. The host would have to wait for it."""
    return scale.device.type != "cpu"


def _capturing() -> bool:
    """Whether a CUDA graph is being captured. The host may not query the GPU meanwhile."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class _Late:
    """A scale that is being copied from a device. The processes compare it in a later call."""

    def __init__(self, scale: Tensor) -> None:
        self.copy = scale.detach().to("cpu", torch.float64, non_blocking=True)
        self.arrival = torch.Event(scale.device.type)
        self.arrival.record()

    def bits(self) -> int | None:
        """The bits of the scale as an integer. None until the copy has arrived."""
        if not self.arrival.query():
            return None
        return struct.unpack("<q", struct.pack("<d", self.copy.item()))[0]


def _number(bits: int) -> str:
    return str(struct.unpack("<d", struct.pack("<q", bits))[0])


def _gather(mine: Tensor, group: Any) -> list[Tensor]:
    """Every process's tensor, on the host. Those of a mesh row by row."""
    if is_mesh(group):
        row = torch.stack(_gather(mine, group.get_group(1)))
        return [x for part in _gather(row, group.get_group(0)) for x in part]
    if group is None or (world := dist.get_world_size(group)) == 1:
        return [mine]
    everyone = [torch.empty_like(mine) for _ in range(world)]
    if "cpu:" in dist.get_backend_config(group):
        dist.all_gather(everyone, mine, group)
    else:
        subgroups.on_host(group).allgather([everyone], [mine]).wait()
    return everyone


# All processes add and remove entries in the same calls.
_LATE: WeakKeyDictionary[Any, _Late] = WeakKeyDictionary()
