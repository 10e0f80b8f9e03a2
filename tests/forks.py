"""Processes that start at once, because they are forks of a server.

The server has imported the large packages. It runs no threads and no operation of torch, so its
forks can use both.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

processes = get_context("forkserver")
processes.set_forkserver_preload(  # what is not installed is left out
    [
        *("llave_kernels.modules", "sentence_transformers", "transformers"),
        *("llave.cli", "llave.embedding", "llave.evaluation", "llave.modeling", "llave.training"),
    ]
)


def start(
    work: Callable[..., object],
    *arguments: Any,
    log: Path,
    folder: Path | None = None,
    **variables: str,
) -> Any:
    """Start ``work(*arguments)`` in a process of its own, on one thread. Returns the process.

    Args:
        log: gets what it writes.
        folder: where it works.
        variables: of its environment.
    """
    process = processes.Process(target=_run, args=(work, arguments, log, folder, variables))
    process.start()
    return process


def group(size: int) -> list[dict[str, str]]:
    """The variables that torchrun gives each of ``size`` processes of one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    both = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    both |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [both | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def _run(
    work: Callable[..., object],
    arguments: tuple[Any, ...],
    log: Path,
    folder: Path | None,
    variables: dict[str, str],
) -> None:
    os.setsid()  # a kill of its process group ends its children too
    os.environ |= variables
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if folder is not None:
        os.chdir(folder)
    torch.set_num_threads(1)
    work(*arguments)
