"""What a call would allocate and launch on a GPU, from meta tensors. No GPU is needed."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llave_kernels import ops, sigmoid_ops
from llave_kernels.backends import cuda, products, tiles, triton_backend, triton_sigmoid

BLOCK = 512  # bytes to which torch's allocator rounds
# They launch nothing: allocations and views.
IDLE = {
    "empty", "empty_like", "empty_strided", "new_empty", "alias", "as_strided", "detach", "expand",
    "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose",
    "unbind", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip


class Accounts(TorchDispatchMode):
    """Counts bytes of live storages and operators that launch a kernel.

    torch's libraries may use workspaces of their own. They are not counted.

    Attributes:
        launches: names of the operators, and of the stubs of our kernels, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self._events: list[tuple[int, int]] = []  # (number of a storage, bytes gained or lost)
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if func.namespace == "llave":  # on meta tensors torch would take the operator's fake
            with self:
                module = sigmoid_ops if hasattr(sigmoid_ops, name) else ops
                return getattr(module, name)._init_fn(*args, **kwargs)
        with self:  # operators that are made of others
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        # Several versions of torch lack the products of half precision into float32 here.
        if func._overloadname == "dtype_out":
            out = kwargs["out"]
        elif func._overloadname == "dtype" and name == "mm":
            a, b, dtype = args
            out = a.new_empty((len(a), b.shape[1]), dtype=dtype)
        else:
            out = func(*args, **kwargs)
        if name not in IDLE:
            self.launches.append(name)
        given = {_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and _key(x) not in given | self._alive.keys():
                self._add(x)
        return out

    def _add(self, x: Tensor) -> None:
        key, number, storage = _key(x), len(self._events), x.untyped_storage()
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._alive[key] = number
        self._events.append((number, size))
        weakref.finalize(storage, self._remove, key, number, size)

    def _remove(self, key: int, number: int, size: int) -> None:
        del self._alive[key]
        self._events.append((number, -size))

    def peak(self, without: Collection[Tensor] = ()) -> int:
        """The most bytes that were alive at a time, not counting these tensors."""
        numbers = {self._alive[_key(x)] for x in without}
        now = most = 0
        for number, size in self._events:
            now += 0 if number in numbers else size
            most = max(most, now)
        return most


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class _Kernel:
    """A Triton kernel that does nothing."""

    def __init__(self, accounts: Accounts, name: str) -> None:
        self.accounts, self.name = accounts, name

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.accounts.launches.append(self.name)


def pretend(monkeypatch: pytest.MonkeyPatch, backend: str) -> Accounts:
    """Let a GPU backend run on meta tensors. Its own kernels do nothing but count."""
    accounts = Accounts()
    monkeypatch.setattr(products, "multiplies_halves", lambda device_type: True)
    if backend == "cuda":
        launch = accounts.launches.append

        def backward(**given: Any) -> int:
            launch("backward")
            # As in csrc: only small tiles write parts of the scale's gradient.
            return 8 if given["scale_parts"] is not None and given["problem"].n <= 1024 else 0

        stub = SimpleNamespace(
            device="meta",
            architectures=(80, 90),
            Problem=lambda **given: SimpleNamespace(**given),
            # tests/csrc/test_extension.py shows that it is never more.
            forward_workspace=lambda problem, rows: rows * problem.m * 2 // 10 + (1 << 20),
            forward=lambda **given: launch("forward"),
            loss=lambda **given: launch("loss"),
            most_scale_parts=lambda problem, rows: -(-rows // 64) * -(-problem.m // 128) * 8,
            backward=backward,
            sigmoid=lambda **given: (launch("sigmoid"), (1, 1))[1],
            most_sigmoid_parts=lambda problem, rows: (
                -(-problem.m // 128) * 2,
                -(-rows // 64) * -(-problem.m // 128) * 8,
            ),
        )
        monkeypatch.setattr(cuda, "_cuda", stub)
        monkeypatch.setattr(cuda, "_missing", None)
        monkeypatch.setenv(cuda.ARCHITECTURE, "90")
    else:
        for name in ("positive_kernel", "forward_kernel", "combine_kernel", "strip_kernel"):
            monkeypatch.setattr(triton_backend.kernels, name, _Kernel(accounts, name))
        kernel = _Kernel(accounts, "sigmoid_kernel")
        monkeypatch.setattr(triton_sigmoid.kernels, "sigmoid_kernel", kernel)
        monkeypatch.setattr(triton_backend.loss, "loss_kernel", _Kernel(accounts, "loss_kernel"))
        monkeypatch.setattr(triton_backend, "unavailable", lambda: None)
        monkeypatch.setattr(triton_backend, "supports", lambda query, target, rules: None)

        def tile(call: Any) -> tiles.Tile:
            n, d = call.query.shape
            return tiles.table(9, call.query.dtype, d, n)

        monkeypatch.setattr(triton_backend._Call, "tile", tile)
    return accounts
