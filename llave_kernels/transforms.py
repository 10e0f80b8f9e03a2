"""Our operators under ``torch.func`` transforms and forward-mode differentiation.

``torch.library`` supports neither. A transform would find no derivative. A tangent would be
dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

INSTEAD = (
    "call backward() or torch.autograd.grad without create_graph=True, or torch.func.grad, vjp or "
    "jacrev once, or differentiate llave_kernels.reference instead"
)
_library: Any = torch.library.Library("llave", "FRAGMENT")  # type: ignore[no-untyped-call]

# Of the gradients in torch.autograd.grad(is_grads_batched=True).
_BATCHED: Any = torch._C._parse_dispatch_key("Batched")


def active() -> bool:
    """Whether the code runs inside a ``torch.func`` transform."""
    return torch._C._are_functorch_transforms_active()


def of_backward(*upstream: Tensor) -> bool:
    """Whether a backward is itself differentiated, transformed or run for a batch of gradients."""
    if torch.is_grad_enabled() or active():
        return True
    return any(torch._C._dispatch_keys(d).has(_BATCHED) for d in upstream)


def support(
    operator: Any, setup_context: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Register an operator's derivative and its ``vmap`` rule, for transforms too.

    Args:
        operator: made by ``torch.library.custom_op``.
        setup_context, backward: as for its ``register_autograd``.
    """

    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        def sample(i: int) -> list[Any]:
            pairs = zip(arguments, in_dims, strict=True)
            # A list has a list of dims, all None.
            return [x.select(dim, i) if isinstance(dim, int) else x for x, dim in pairs]

        found = [operator(*sample(i)) for i in range(info.batch_size)]
        if isinstance(found[0], Tensor):
            return torch.stack(found), 0
        stacked = tuple(torch.stack(each) for each in zip(*found, strict=True))
        return stacked, (0,) * len(stacked)

    rules = {
        "forward": operator,
        "setup_context": setup_context,
        "backward": backward,
        "jvp": refuse_forward_mode,
        "vmap": vmap,
    }
    kind: Any = type(
        "Transformed", (torch.autograd.Function,), {k: staticmethod(f) for k, f in rules.items()}
    )
    operator.register_autograd(backward, setup_context=setup_context)
    # Inside a transform, run the operator as an autograd.Function, which torch can transform.
    _library.impl(operator._name, kind.apply, "FuncTorchDynamicLayerFrontMode")


def refuse(operator: Any, instead: str) -> None:
    """Make an operator raise when it is called inside a transform."""

    def refusal(*_: Any) -> NoReturn:
        raise RuntimeError(f"{operator._qualname} cannot be transformed by torch.func: {instead}")

    _library.impl(operator._name, refusal, "FuncTorchDynamicLayerFrontMode")


def outside() -> Any:
    """A context in which no ``torch.func`` transform is active."""
    return torch._C._DisableFuncTorch()


def refuse_all() -> None:
    """Raise inside any transform, for a loss that exchanges data between processes."""
    if active():
        raise RuntimeError(
            "a loss over several processes cannot be transformed by torch.func: call backward() or "
            "torch.autograd.grad"
        )


def refuse_second_derivative(*_: Any) -> NoReturn:
    raise RuntimeError(f"the loss has no second derivative: {INSTEAD}")


def refuse_forward_mode(ctx: Any = None, *tangents: Any) -> Any:
    raise RuntimeError(f"the loss has no forward-mode derivative: {INSTEAD}")


def refuse_tangents(*tensors: Tensor) -> None:
    """Raise if a tensor carries a tangent. The operators would drop it."""
    unpack_dual: Any = forward_ad.unpack_dual
    if forward_ad._current_level < 0:
        return
    with forward_ad._set_fwd_grad_enabled(True):  # it is off below autograd
        try:
            tangents = [unpack_dual(x).tangent for x in tensors]
        except RuntimeError:  # torch.func.linearize is tracing, and a tangent cannot be read
            refuse_forward_mode()
    if any(tangent is not None for tangent in tangents):
        refuse_forward_mode()
