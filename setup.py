"""Builds ``llave_kernels._cuda`` with CMake if nvcc is found. All metadata is in pyproject.toml.

Environment:
    LLAVE_CUDA        1: build or fail. 0: leave the extension out. Unset: build if nvcc is found
    LLAVE_CUDA_ARCHS  targets. Default: those of "80;90a" that this nvcc can compile
    CUDA_HOME         a folder whose bin/ is searched for nvcc before PATH
    MAX_JOBS          files compiled at a time. Default: the number of cores
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TextIO

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
PACKAGE = "llave_kernels"
NOTE = "cuda_build.txt"  # how the extension was built, or why not; available_backends shows it
# The first nvcc that compiles our kernels for each target.
NVCC_FOR = {
    "80": (11, 8),
    "86": (11, 8),
    "89": (11, 8),
    "90a": (12, 0),
    "100": (12, 8),
    "120": (12, 8),
}


class Skip(Exception):
    """Why the extension is left out."""


def find_nvcc() -> Path:
    home = os.environ.get("CUDA_HOME")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    for candidate in [*candidates, "nvcc"]:
        if found := shutil.which(candidate):
            return Path(found).resolve()
    raise Skip("nvcc was not found under CUDA_HOME or on PATH when this was installed")


def nvcc_version(nvcc: Path) -> tuple[int, int]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    if match is None:
        raise CompileError(f"no version in the output of {nvcc} --version:\n{text}")
    return int(match[1]), int(match[2])


def choose_targets(version: tuple[int, int]) -> list[str]:
    asked = os.environ.get("LLAVE_CUDA_ARCHS")
    targets = [t for t in re.split(r"[;,\s]+", asked or "80;90a") if t]
    if unknown := [t for t in targets if t not in NVCC_FOR]:
        raise CompileError(
            f"LLAVE_CUDA_ARCHS={asked!r}: {unknown[0]!r} is not one of {', '.join(NVCC_FOR)}"
        )
    fit = [t for t in targets if NVCC_FOR[t] <= version]
    if asked and fit != targets:
        late = next(t for t in targets if t not in fit)
        raise CompileError(
            f"LLAVE_CUDA_ARCHS={asked!r}: sm_{late} needs nvcc {dotted(NVCC_FOR[late])}, this is "
            f"{dotted(version)}"
        )
    if not fit:
        raise Skip(f"nvcc {dotted(version)} is older than {dotted(NVCC_FOR['80'])}")
    return fit


def dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def plan() -> tuple[Path, list[str], str]:
    """nvcc, the targets, and a line that describes the build.

    Raises:
        Skip: there is nothing to build.
        CompileError: the environment asks for something that cannot be built.
    """
    asked = os.environ.get("LLAVE_CUDA", "")
    if asked not in ("", "0", "1"):
        raise CompileError(f"LLAVE_CUDA={asked!r}; expected 0, 1 or nothing")
    if asked == "0":
        raise Skip("LLAVE_CUDA=0 when this was installed")
    try:
        nvcc = find_nvcc()
        version = nvcc_version(nvcc)
        targets = choose_targets(version)
    except Skip as reason:
        if asked == "1":
            raise CompileError(f"LLAVE_CUDA=1, but {reason}") from None
        raise
    names = ", ".join(f"sm_{t}" for t in targets)
    return nvcc, targets, f"built with nvcc {dotted(version)} for {names}"


class CudaExtension(Extension):
    def __init__(self, nvcc: Path, targets: list[str]) -> None:
        super().__init__(f"{PACKAGE}._cuda", [])
        self.nvcc, self.targets = nvcc, targets


class BuildExtension(build_ext):
    """Configures and builds with CMake. The output is shown, and kept in build.log.

    The module stays in the build folder. A later install takes it if its fingerprint is the same.
    """

    def build_extension(self, ext: CudaExtension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"cuda-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        module, note = folder / output.name, folder / "fingerprint.txt"
        current = fingerprint(ext)
        if self.force or not (module.exists() and note.exists() and note.read_text() == current):
            note.unlink(missing_ok=True)
            compile_module(ext, folder)
            note.write_text(current)
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(module, output)


def fingerprint(ext: CudaExtension) -> str:
    """A digest of the sources, the tools' versions and the settings."""
    tools = [subprocess.run([ext.nvcc, "--version"], capture_output=True, check=True).stdout]
    tools += [metadata.version(name).encode() for name in ("nvidia-cutlass", "pybind11")]
    variables = ("CXX", "CXXFLAGS", "CUDAFLAGS", "CUDAHOSTCXX", "LDFLAGS", "NVCC_APPEND_FLAGS")
    settings = [ext.nvcc, ext.targets, *(os.environ.get(name) for name in variables)]
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    digest = hashlib.sha256(repr([settings, tools]).encode())
    for path in [ROOT / "CMakeLists.txt", ROOT / "setup.py", *sources]:
        digest.update(repr([path.relative_to(ROOT).as_posix(), path.read_bytes()]).encode())
    return digest.hexdigest()


def compile_module(ext: CudaExtension, folder: Path) -> None:
    import cutlass_library
    import pybind11

    include = Path(cutlass_library.__file__).parent / "source" / "include"
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CUDA_COMPILER": ext.nvcc,
        "CMAKE_CUDA_ARCHITECTURES": "80",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": folder,
        "LLAVE_CUDA_ARCHS": ";".join(ext.targets),
        "LLAVE_CUTLASS_INCLUDE": include,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    configure = ["cmake", "--fresh", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in settings.items()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = os.environ.get("MAX_JOBS") or str(cores)
    with open(folder / "build.log", "w") as log:
        for command in (configure, ["cmake", "--build", str(folder), "-j", jobs]):
            run(command, log)


def run(command: list[str], log: TextIO) -> None:
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            sys.stdout.write(line)
            log.write(line)
    if process.returncode:
        raise CompileError(
            f"{' '.join(command[:2])} failed; LLAVE_CUDA=0 installs without the CUDA extension"
        )


class BuildPackage(build_py):
    """Writes a note about the extension's build. Removes an old extension if none is built."""

    note = ""

    def run(self) -> None:
        super().run()
        folder = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NOTE).write_text(self.note + "\n")
        if not self.distribution.ext_modules:
            for stale in folder.glob("_cuda*.so"):
                stale.unlink()


def main() -> None:
    extensions: list[Extension] = []
    try:
        nvcc, targets, BuildPackage.note = plan()
        extensions = [CudaExtension(nvcc, targets)]
    except Skip as reason:
        BuildPackage.note = str(reason)
    skipped = "" if extensions else "skipped: "
    print(f"llave: CUDA extension: {skipped}{BuildPackage.note}", file=sys.stderr)
    setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension, "build_py": BuildPackage})


if __name__ == "__main__":
    main()
