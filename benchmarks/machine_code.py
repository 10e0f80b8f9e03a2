"""Facts about the machine code of kernels, read with the CUDA toolkit's ``cuobjdump``."""

from __future__ import annotations

import heapq
import itertools
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+) )?([A-Z][\w.]*)\s*([^;]*);")
MATRIX = re.compile(r"HGMMA|HMMA")
LOCAL = re.compile(r"(?:LDL|STL)((?:\.\w+)*)$")
EXPONENTIAL = "MUFU.EX2"
LEAVES = ("EXIT", "RET", "BRA", "JMP", "KILL", "BRX", "JMX")  # the next one follows if guarded
JUMP = re.compile(r"(0x[0-9a-f]+)\W*$")


def cuobjdump() -> str:
    """The path of the tool: triton brings it, and so does a CUDA toolkit."""
    try:
        import triton
    except ImportError:
        found = shutil.which("cuobjdump")
    else:
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if found is None:
        raise FileNotFoundError("no cuobjdump: install triton or a CUDA toolkit")
    return found


def _listing(kind: str, path: Path) -> str:
    run = subprocess.run([cuobjdump(), kind, path], capture_output=True, text=True, check=True)
    return run.stdout


def functions(path: Path, kind: str = "-sass") -> Iterator[tuple[str, str]]:
    """The mangled name and code of each kernel in ``path``: SASS, or PTX with ``-ptx``."""
    for block in _listing(kind, path).split("Function : " if kind == "-sass" else ".entry ")[1:]:
        name, _, code = block.partition("\n")
        yield name.strip(), code


def registers(path: Path) -> dict[str, int]:
    """Registers of a thread, by mangled name."""
    found = re.findall(r"Function ([^\s:]+):?\s+REG:(\d+)", _listing("-res-usage", path))
    return {name: int(count) for name, count in found}


class Instruction(NamedTuple):
    address: int
    guard: str  # predicate, or ""
    name: str
    operands: str


class Code:
    """The instructions of one kernel."""

    def __init__(self, text: str) -> None:
        self.instructions = [
            Instruction(int(address, 16), guard or "", name, operands)
            for address, guard, name, operands in LINE.findall(text)
            if name != "NOP"
        ]

    @property
    def spill_bytes(self) -> int:
        """Bytes that a thread's spills move: those of each load from and store to local memory."""
        found = [LOCAL.match(x.name) for x in self.instructions]
        widths = [re.search(r"\.(64|128)", match[1]) for match in found if match]
        return sum(int(width[1]) // 8 if width else 4 for width in widths)

    def epilogue(self, exponentials: int, shuffles: int = 0) -> int | None:
        """Instructions of the cheapest road with so many exponentials and shuffles, or None.

        A road leads from one matrix product to the next, or to the end. Without products it leads
        from the start to the end. A warp's road depends on the call and its data. Instructions that
        a predicate switches off are issued, so they count.
        """
        blocks = self._blocks
        starts = [i for block in blocks if block.matrix for i in block.followers] or [0]
        queue = [(0, i, exponentials, shuffles) for i in starts]
        seen: set[tuple[int, int, int]] = set()
        while queue:
            cost, i, *missing = heapq.heappop(queue)
            block = blocks[i]
            if block.matrix and not any(missing):
                return cost
            if block.matrix or (i, *missing) in seen:
                continue
            seen.add((i, *missing))
            taken = block.exponentials, block.shuffles
            left = [max(0, wanted - found) for wanted, found in zip(missing, taken, strict=True)]
            for follower in block.followers:
                heapq.heappush(queue, (cost + block.size, follower, *left))
        return None

    @cached_property
    def _blocks(self) -> list[_Block]:
        """Runs of instructions without a jump. A matrix instruction is one of its own.

        The last one stands for the end of the program.
        """
        code = self.instructions
        jumps = {x: int(found[1], 16) for x in code if (found := JUMP.search(x.operands))}
        jumps = {x: target for x, target in jumps.items() if _family(x) in ("BRA", "JMP")}
        heads, starts = set(jumps.values()), [0]
        for i, (before, x) in enumerate(itertools.pairwise(code), start=1):
            apart = _family(before) in LEAVES or MATRIX.match(before.name) or MATRIX.match(x.name)
            if apart or x.address in heads:
                starts.append(i)
        numbers = {code[i].address: number for number, i in enumerate(starts)}
        blocks = []
        for number, (a, b) in enumerate(zip(starts, [*starts[1:], len(code)], strict=True)):
            last = code[b - 1]
            followers = [numbers[jumps[last]]] if jumps.get(last) in numbers else []
            if _family(last) in ("EXIT", "RET"):
                followers.append(len(starts))
            # A guard or a predicate among the operands makes a jump conditional.
            passes = _family(last) not in LEAVES or last.guard or "," in last.operands
            if passes and b < len(code):
                followers.append(number + 1)
            taken = sum(x.name == EXPONENTIAL for x in code[a:b])
            shuffles = sum(_family(x) == "SHFL" for x in code[a:b])
            matrix = MATRIX.match(code[a].name) is not None
            blocks.append(_Block(b - a, taken, shuffles, matrix, followers))
        return [*blocks, _Block(0, 0, 0, True, [])]


class _Block(NamedTuple):
    """A run of instructions, and the numbers of the blocks that may follow."""

    size: int
    exponentials: int
    shuffles: int
    matrix: bool
    followers: list[int]


def _family(x: Instruction) -> str:
    return x.name.partition(".")[0]
