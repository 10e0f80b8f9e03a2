"""The grid of processes, and the block of the similarity matrix that one of them computes.

R x C processes stand in a grid. Process (r, c) computes the block of the queries of row r, from
processes (r, *), and the targets of column c, from processes (*, c). So every pair of the global
batch is in one block, and a row's positive is in the block of its own process. With C = 1 a process
has its own queries and all targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llave_kernels import subgroups
from llave_kernels.agreement import Group, Peer, is_mesh

# A value from another node takes about as long as this many from the own node: 50 and 400 GB/s.
FARTHER = 8


@dataclass(frozen=True)  # torch 2.8 cannot trace a property of a NamedTuple
class Side:
    """The rows or the columns of a block, which several processes have in parts.

    Attributes:
        group: process group of these processes. It is not used if there is one.
        sizes: numbers of rows or columns, by the rank in this group.
        rank: this process's.
    """

    group: Any
    sizes: list[int]
    rank: int

    @property
    def start(self) -> int:
        """Where this process's part begins."""
        return sum(self.sizes[: self.rank])

    @property
    def shared(self) -> bool:
        """Whether other processes have parts."""
        return len(self.sizes) > 1

    def own(self, x: Tensor) -> Tensor:
        """This process's part of values of the whole side."""
        return x[self.start : self.start + self.sizes[self.rank]] if self.shared else x


class Block(NamedTuple):
    """The rows and columns of the block that this process computes.

    Attributes:
        owners: whether some process of the grid has owners.
    """

    rows: Side
    columns: Side
    owners: bool


def block_of(group: Group, peers: list[Peer], device: torch.device) -> Block:
    """This process's block.

    Args:
        group: a 2-D DeviceMesh is the grid. Otherwise ``row_length`` chooses it.
        peers: every process's part of the batch, by its rank in the group.
        device: device of the embeddings.
    """
    across: Any
    down: Any
    if is_mesh(group):
        mesh: Any = group
        length = mesh.size(1)
        r, c = mesh.get_local_rank(0), mesh.get_local_rank(1)
        across, down = mesh.get_group(1), mesh.get_group(0)
    else:
        whole: Any = dist.group.WORLD if group is None else group
        length = 1
        if subgroups.can_split(whole, device):
            rows, columns = max(p.rows for p in peers), max(p.columns for p in peers)
            length = row_length(len(peers), rows, columns, per_node(peers))
        r, c = divmod(dist.get_rank(whole), length)
        row, column = range(r * length, (r + 1) * length), range(c, len(peers), length)
        across, down = (
            subgroups.of_ranks(whole, ranks, device) if len(ranks) > 1 else None
            for ranks in (row, column)
        )
    return Block(
        Side(across, [peer.rows for peer in peers[r * length : (r + 1) * length]], c),
        Side(down, [peer.columns for peer in peers[c::length]], r),
        any(peer.owners for peer in peers),
    )


@lru_cache
def row_length(world: int, rows: int, columns: int, per_node: int) -> int:
    """C of the grid in which a process receives least. The smallest if there are several.

    It receives the queries of C - 1 processes and the targets of R - 1 processes. What comes from
    another node counts ``FARTHER`` times. Processes fill the grid row by row.

    Args:
        world: number of processes.
        rows, columns: numbers of queries and targets of a process.
        per_node: number of consecutive processes on a node. It divides ``world``.
    """

    def cost(c: int) -> int:
        r = world // c
        near_row, near_column = 1, 1  # processes of the own node, this one too
        if per_node % c == 0:
            near_row, near_column = c, per_node // c
        elif c % per_node == 0:
            near_row = per_node
        queries = near_row - 1 + FARTHER * (c - near_row)
        targets = near_column - 1 + FARTHER * (r - near_column)
        return rows * queries + columns * targets

    return min((c for c in range(1, world + 1) if world % c == 0), key=cost)


def per_node(peers: list[Peer]) -> int:
    """The number of consecutive processes on each node. 1 if it differs."""
    nodes = [peer.node for peer in peers]
    size = next((i for i, node in enumerate(nodes) if node != nodes[0]), len(nodes))
    even = len(nodes) % size == 0
    return size if even and all(x == nodes[i - i % size] for i, x in enumerate(nodes)) else 1
