"""Check an installed wheel, without nvcc and without a GPU. Prints its size and its architectures.

Run it with ``python -I`` in the wheel's own environment. Otherwise this folder's packages hide the
installed ones. It uses no test framework.
"""

from __future__ import annotations

import shutil
from importlib.metadata import files
from pathlib import Path

import torch

import llave_kernels
from llave_kernels import _cuda, available_backends, hardness_weighted_contrastive_loss
from llave_kernels.reference import reference_loss


def main() -> None:
    assert shutil.which("nvcc") is None, "nvcc is on PATH"
    package = Path(llave_kernels.__file__).parent
    assert not package.is_relative_to(Path(__file__).parents[1] / "llave_kernels"), package

    backends = available_backends()
    assert backends["torch"] is None, backends
    assert backends["cuda"] is None or backends["cuda"].startswith("no GPU"), backends
    assert list(_cuda.architectures) == [80, 90], _cuda.architectures

    query, target = (torch.randn(37, 19, requires_grad=True) for _ in range(2))
    loss = hardness_weighted_contrastive_loss(query, target)
    loss.backward()
    exact = reference_loss(query.detach().double(), target.detach().double())
    assert torch.allclose(loss.double(), exact, rtol=1e-5), (loss, exact)
    assert query.grad is not None
    assert query.grad.isfinite().all()

    installed = [Path(file.locate()) for file in files("llave") or ()]
    typed = {file.parent.name for file in installed if file.name == "py.typed"}
    assert typed == {"llave", "llave_kernels"}, typed
    size = sum(file.stat().st_size for file in installed if file.exists()) / 1e6
    names = ", ".join(f"sm_{number}" for number in _cuda.architectures)
    print(f"llave {llave_kernels.__version__}: {size:.1f} MB installed, kernels for {names}")


if __name__ == "__main__":
    main()
