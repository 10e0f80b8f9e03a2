"""The CUDA extension without a GPU: its bindings and epilogues, compiled by the C++ compiler.

A plain matrix product replaces the tensor cores. Fibers replace the threads of a block. Index
arithmetic, rules, reductions and stores come from the kernels' own headers. The simulation leaves
out CUTLASS's main loops and the instructions of csrc/warp.h.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
RUNTIME = "include/cuda_runtime_api.h"


def load() -> str | None:
    """Put the simulation in place of ``llave_kernels._cuda``.

    Returns:
        None, or the reason why it cannot be built here.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler {compiler}"
    includes = [ROOT / "csrc", HERE, *headers()]
    missing = [name for name in ("cutlass_library", "pybind11") if not _spec(name)]
    if missing:
        return f"{missing[0]} is not installed"
    if not any((folder.parent / RUNTIME).exists() for folder in includes):
        return "no CUDA headers under CUDA_HOME or /usr/local/cuda"
    _import(_build(compiler, includes))
    return None


def _spec(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(next(iter(spec.submodule_search_locations or []))) if spec else None


def headers() -> list[Path]:
    """The include folders of Python, CUTLASS, pybind11 and a CUDA toolkit, as far as found."""
    found = [Path(sysconfig.get_paths()["include"])]
    if cutlass := _spec("cutlass_library"):
        found.append(cutlass / "source" / "include")
    if pybind11 := _spec("pybind11"):
        found.append(pybind11 / "include")
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (Path(home) / RUNTIME).exists():
            return [*found, Path(home) / "include", Path(home) / "include" / "cccl"]
    return found


def _build(compiler: str, includes: list[Path]) -> Path:
    import fcntl  # not on Windows, which lacks the headers too

    # CUTLASS's headers hold device intrinsics in templates that are not instantiated here.
    flags = ["-std=c++17", "-O2", "-fPIC", "-w", "-fpermissive"]
    flags += ["-DLLAVE_SIMULATED", "-DLLAVE_SM80", "-DLLAVE_SM90"]
    flags += [f"-I{folder}" for folder in includes]
    sources = [ROOT / "csrc" / "bindings.cpp", HERE / "launch.cpp"]
    files = sorted([*(ROOT / "csrc").glob("*.h"), *HERE.glob("*.h"), *sources])
    content = b"".join([shlex.join([compiler, *flags]).encode(), *(f.read_bytes() for f in files)])
    folder = ROOT / "build" / "simulator" / hashlib.sha256(content).hexdigest()[:16]
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the other workers of pytest-xdist wait
        if not module.exists():
            objects = [str(folder / f"{source.stem}.o") for source in sources]
            running = [
                subprocess.Popen([compiler, *flags, "-c", str(source), "-o", made])
                for source, made in zip(sources, objects, strict=True)
            ]
            statuses = [process.wait() for process in running]
            if any(statuses):
                raise RuntimeError(f"{compiler} failed; its message is above")
            beside = folder / "linking.so"
            subprocess.run([compiler, "-shared", *objects, "-o", str(beside)], check=True)
            beside.rename(module)
    return module


def _import(module: Path) -> None:
    name = "llave_kernels._cuda"
    spec = importlib.util.spec_from_file_location(name, module)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
