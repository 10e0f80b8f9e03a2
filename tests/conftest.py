import os
import zlib

# Read when torch is imported. A compiled graph remembered from an earlier version of the operators
# would call them as they were then.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch
from hypothesis import settings

# Without a GPU the Triton kernels run in its interpreter; triton reads this at its first import.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# CI repeats the same draws; a developer's runs draw anew each time.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Every test draws its own numbers, the same each time."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
