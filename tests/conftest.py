import os
import zlib
from collections.abc import Iterator

# torch reads this at import. A graph cached from an earlier version of the operators would call
# them with their old arguments.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a hub for anything
if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from tests.csrc import simulator

# Without a GPU the Triton kernels run in Triton's interpreter, and the CUDA extension's kernels in
# the simulation. triton reads TRITON_INTERPRET at its first import.
NO_SIMULATOR = None
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    NO_SIMULATOR = simulator.load()


from llave_kernels import available_backends  # noqa: E402
from llave_kernels.backends import cuda  # noqa: E402

BACKENDS = [
    name
    for name in ("torch", "triton", "cuda 80", "cuda 90")
    if available_backends()[name.split()[0]] is None
]


def pytest_report_header() -> str:
    simulated = f"simulation: {NO_SIMULATOR}" if NO_SIMULATOR else "simulation"
    return f"backends: {', '.join(BACKENDS)} (CUDA extension: {simulated})"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each backend that runs here. The kernels run on a GPU if there is one.

    New tensors are made on that device. Fresh memory is filled with NaN.
    """
    name, *architecture = request.param.split()
    if architecture:  # the CUDA extension multiplies float32 as TF32
        monkeypatch.setenv(cuda.ARCHITECTURE, architecture[0])
        torch.set_float32_matmul_precision("high")
    if name != "torch" and torch.cuda.is_available():
        torch.set_default_device("cuda")
    torch.use_deterministic_algorithms(True)
    yield name
    torch.use_deterministic_algorithms(False)
    torch.set_default_device(None)
    torch.set_float32_matmul_precision("highest")


# CI repeats the same draws. Other runs draw new examples each time.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Seed each test by its name, so that it draws the same numbers in every run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
