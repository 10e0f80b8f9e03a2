import os
import zlib

# Read when torch is imported. A compiled graph remembered from an earlier version of the operators
# would call them as they were then.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch
from hypothesis import settings

from tests import simulator

# Without a GPU the Triton kernels run in its interpreter, which triton asks for at its first
# import, and those of the CUDA extension in the simulation.
NO_SIMULATOR = None
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    NO_SIMULATOR = simulator.load()


def pytest_report_header() -> str:
    return f"CUDA extension: {NO_SIMULATOR or 'GPU or simulation'}"


# CI repeats the same draws; a developer's runs draw anew each time.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Every test draws its own numbers, the same each time."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
