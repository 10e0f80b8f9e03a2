"""`pip install` with and without nvcc: what is built, what is said, what fails."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Distribution

ROOT = Path(__file__).parents[1]
SOURCES = ("csrc", "llave", "llave_kernels", "tests")
FILES = ("CMakeLists.txt", "MANIFEST.in", "pyproject.toml", "setup.py", "README.md", "LICENSE")
# The import hook of an editable install would find this tree's modules instead.
REPORT = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f).lower()]
from llave_kernels import available_backends
print(available_backends()["cuda"])
"""


@pytest.fixture
def setup_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("llave_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of this tree, made from a copy without built files."""
    folder = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "cuda_build.txt")
    for name in SOURCES:
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    code = "import setuptools.build_meta as b, sys; print(b.build_sdist('dist'))"
    environment = without_nvcc()
    subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, check=True, capture_output=True
    )
    return next((folder / "dist").glob("*.tar.gz"))


def without_nvcc(**extra: str) -> dict[str, str]:
    """The environment without CUDA_HOME, LLAVE_CUDA* and the PATH folders that hold nvcc.

    The interpreter's folder stays unless it holds nvcc.
    """
    folders = [str(Path(sys.executable).parent), *os.environ["PATH"].split(os.pathsep)]
    kept = [f for f in folders if not (Path(f) / "nvcc").exists()]
    names = ("CUDA_HOME", "LLAVE_CUDA", "LLAVE_CUDA_ARCHS")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    return environment | {"PATH": os.pathsep.join(kept)} | extra


def install(
    sdist: Path, where: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    options = ["--verbose", "--no-build-isolation", "--no-deps", "--target", str(where)]
    return subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(sdist)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def report(where: Path) -> str:
    run = subprocess.run(
        [sys.executable, "-c", REPORT],
        env=os.environ | {"PYTHONPATH": str(where)},
        cwd=where,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


def test_without_nvcc_the_install_succeeds_and_says_so(sdist: Path, tmp_path: Path) -> None:
    run = install(sdist, tmp_path, without_nvcc())
    assert run.returncode == 0, run.stdout
    reason = "nvcc was not found under CUDA_HOME or on PATH when this was installed"
    assert f"llave: CUDA extension: skipped: {reason}" in run.stdout
    assert not list(tmp_path.glob("llave_kernels/_cuda*"))
    assert report(tmp_path) == f"not built: {reason}"


def test_the_sdist_has_what_the_build_reads(sdist: Path) -> None:
    """``make wheels`` builds from it. An editable install builds from the tree."""
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    read = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    needed = {path.relative_to(ROOT).as_posix() for path in read}
    assert needed | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE"} <= held


@pytest.mark.long
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_failing_nvcc_fails_the_install_with_its_message(sdist: Path, tmp_path: Path) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$*" in *gemm.cu*) echo "nvcc fatal: no licence for this planet" >&2; exit 1;; esac\n'
        f'exec {shutil.which("nvcc")} "$@"\n'
    )
    nvcc.chmod(0o755)
    run = install(sdist, tmp_path / "site", without_nvcc(CUDA_HOME=str(nvcc.parents[1])))
    assert run.returncode != 0
    assert "no licence for this planet" in run.stdout
    assert "LLAVE_CUDA=0 installs without the CUDA extension" in run.stdout


@pytest.fixture
def nvcc_of(monkeypatch: pytest.MonkeyPatch, setup_module: ModuleType):
    def pretend(version: tuple[int, int] | None, **environment: str) -> ModuleType:
        for name in ("LLAVE_CUDA", "LLAVE_CUDA_ARCHS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if version is None:
            monkeypatch.setattr(setup_module.shutil, "which", lambda _: None)
        else:
            monkeypatch.setattr(setup_module, "find_nvcc", lambda: Path("nvcc"))
            monkeypatch.setattr(setup_module, "nvcc_version", lambda _: version)
        return setup_module

    return pretend


def test_targets_follow_the_nvcc(nvcc_of) -> None:
    assert nvcc_of((13, 0)).plan()[1] == ["80", "90a"]
    assert nvcc_of((11, 8)).plan()[1] == ["80"]
    assert nvcc_of((13, 0), LLAVE_CUDA_ARCHS="86;90a").plan()[1] == ["86", "90a"]
    assert nvcc_of((13, 0)).plan()[2] == "built with nvcc 13.0 for sm_80, sm_90a"


@pytest.mark.parametrize(
    ("version", "environment", "message"),
    [
        ((11, 8), {"LLAVE_CUDA_ARCHS": "90a"}, "sm_90a needs nvcc 12.0, this is 11.8"),
        ((13, 0), {"LLAVE_CUDA_ARCHS": "70"}, "'70' is not one of 80, 86"),
        ((13, 0), {"LLAVE_CUDA": "yes"}, "LLAVE_CUDA='yes'; expected 0, 1 or nothing"),
        ((11, 0), {"LLAVE_CUDA": "1"}, "LLAVE_CUDA=1, but nvcc 11.0 is older than 11.8"),
        (None, {"LLAVE_CUDA": "1"}, "LLAVE_CUDA=1, but nvcc was not found under CUDA_HOME"),
    ],
)
def test_what_cannot_be_is_an_error(nvcc_of, version, environment, message) -> None:
    module = nvcc_of(version, **environment)
    with pytest.raises(module.CompileError, match=message):
        module.plan()


@pytest.mark.parametrize(
    ("version", "environment", "message"),
    [
        (None, {}, "nvcc was not found"),
        ((11, 0), {}, "nvcc 11.0 is older than 11.8"),
        ((13, 0), {"LLAVE_CUDA": "0"}, "LLAVE_CUDA=0 when this was installed"),
    ],
)
def test_what_is_left_out_says_why(nvcc_of, version, environment, message) -> None:
    module = nvcc_of(version, **environment)
    with pytest.raises(module.Skip, match=message):
        module.plan()


@pytest.fixture
def builds(setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """``build(targets, force)`` builds in a copy of the sources; the list has its compilations."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for name in ("CMakeLists.txt", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho release 13.0\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(setup_module, "ROOT", tmp_path)
    compiled: list[str] = []
    output = tmp_path / "site" / "_cuda.so"

    def compile_module(_: object, folder: Path) -> None:
        compiled.append("once")
        (folder / output.name).write_text(str(len(compiled)))

    def build(targets: tuple[str, ...] = ("80",), force: bool = False) -> str:
        output.unlink(missing_ok=True)
        command = setup_module.BuildExtension(Distribution())
        command.force = force
        monkeypatch.setattr(command, "get_ext_fullpath", lambda _: str(output))
        command.build_extension(setup_module.CudaExtension(nvcc, list(targets)))
        return output.read_text()

    monkeypatch.setattr(setup_module, "compile_module", compile_module)
    return build, compiled, tmp_path


def test_an_unchanged_extension_is_not_built_again(builds) -> None:
    build, compiled, _ = builds
    assert build() == build() == "1"
    assert build(force=True) == "2"
    assert build() == "2"
    assert len(compiled) == 2


def test_a_change_builds_the_extension_again(builds, monkeypatch: pytest.MonkeyPatch) -> None:
    build, _, root = builds
    build()
    assert build(("80", "90a")) == build(("80", "90a")) == "2"
    for count, name in enumerate(("csrc/gemm.cu", "csrc/sm90/gemm.h", "CMakeLists.txt"), 3):
        (root / name).write_text("changed")
        assert build(("80", "90a")) == build(("80", "90a")) == str(count)
    (root / "csrc" / "gemm.cu").unlink()
    assert build(("80", "90a")) == "6"
    (root / "nvcc").write_text("#!/bin/sh\necho release 13.1\n")
    assert build(("80", "90a")) == "7"
    monkeypatch.setenv("CUDAFLAGS", "-O1")
    assert build(("80", "90a")) == "8"


def test_a_build_that_failed_is_done_again(
    builds, setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, _, root = builds
    build()
    (root / "csrc" / "gemm.cu").write_text("changed")

    def fail(*_: object) -> None:
        raise setup_module.CompileError("failed")

    with monkeypatch.context() as patch:
        patch.setattr(setup_module, "compile_module", fail)
        with pytest.raises(setup_module.CompileError):
            build()
    assert build() == "2"
