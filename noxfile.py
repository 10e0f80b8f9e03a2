"""Tests with the oldest versions that pyproject.toml allows, some in between, and the newest.

    make matrix                              all of them
    make matrix ARGS="-s 'kernels(oldest)'"  one; pytest's arguments follow --

Each needs its Python on PATH (python3.10, python3.12); with pyenv, `PYENV_VERSION=3.12.1:3.10.13`.
"""

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_missing_interpreters = True

# Triton's interpreter breaks on numpy 2.4 in versions below 3.7.1. Only tests use it.
SETS = {
    "oldest": ("3.10", ["torch==2.8.0", "triton==3.4.0", "numpy<2.4"]),
    "middle": ("3.12", ["torch==2.11.0", "triton==3.6.0", "numpy<2.4"]),
    "newest": ("3.12", ["--constraint", "constraints.txt"]),
}
HOSTS = "tests/llave_kernels/integrations"  # they come with `hosts` below
KERNELS = ["tests/llave_kernels", f"--ignore={HOSTS}"]
RUNNER = ["pytest", "pytest-xdist", "hypothesis"]
ON_ALL_CORES = ["--numprocesses", "auto", "--maxprocesses", "8", "--dist", "loadfile"]
SIMULATOR = ["pybind11>=2.13", "nvidia-cutlass>=4.2,<4.3"]
LOWEST = [
    "sentence-transformers==6.2.0",
    "transformers==5.16.0",
    "torchvision==0.23.0",
]


def install(session: nox.Session, package: str, *versions: str) -> None:
    session.install(package, *RUNNER, *versions, env={"LLAVE_CUDA": "0"})


@nox.session
@nox.parametrize(("python", "versions"), [nox.param(*SETS[name], id=name) for name in SETS])
def kernels(session: nox.Session, versions: list[str]) -> None:
    """Tests of the loss: simulated backends, compiled kernels and several processes."""
    install(session, ".", *SIMULATOR, *versions)
    session.run("python", "-m", "pytest", *ON_ALL_CORES, *KERNELS, *session.posargs)


@nox.session(python=SETS["oldest"][0])
def hosts(session: nox.Session) -> None:
    """Trainers and the model package with the lowest versions of their dependencies."""
    install(session, ".[test]", *SETS["oldest"][1], *LOWEST)
    paths = [HOSTS, "tests/llave", "tests/test_docs.py"]
    session.run("python", "-m", "pytest", *ON_ALL_CORES, *paths, *session.posargs)
