"""Let pickle take models that have encoded images. transformers leaves local functions in them."""

from __future__ import annotations

import copyreg
from collections import OrderedDict
from copy import deepcopy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_CAPTURING = "transformers.utils.output_capturing"
_HOOKED = "_output_capturing_hooks_installed"  # transformers' flag for a model with its hooks


def make_picklable(model: nn.Module) -> None:
    """Let pickle take a model after use: for ``torch.save``, ``copy`` and spawned processes.

    transformers adds a forward hook to a layer when its output is first requested.
    LLaVA-OneVision requests one for an image. The hook is a local function, so pickle refuses it.
    The pickle leaves the hook out, and transformers adds it again when the copy needs it.

    Pickling is registered by class, so it changes for other models of the same classes too. Reading
    such a pickle needs this package.
    """
    for kind in {type(module) for module in model.modules()} - copyreg.dispatch_table.keys():
        copyreg.pickle(kind, _reduce)


class _Hooks(OrderedDict[int, Any]):
    """A layer's hooks. Their pickle leaves out transformers' hooks."""

    def __reduce__(self) -> Any:
        kept = [(k, hook) for k, hook in self.items() if _module(hook) != _CAPTURING]
        return OrderedDict, (kept,)


class _Hooked(int):
    """A true value that pickles as False. ``copy.copy`` shares the hooks and keeps the value."""

    def __reduce__(self) -> Any:
        return bool, ()


def _module(hook: object) -> str | None:
    return getattr(hook, "__module__", None)


def _reduce(module: nn.Module) -> tuple[Any, ...]:
    reduced: Any = module.__reduce_ex__(2)
    _, _, state, *rest = reduced
    state = state | {"_forward_hooks": _Hooks(state["_forward_hooks"])}
    if state.get(_HOOKED):
        state[_HOOKED] = _Hooked(True)
    config = module.config if isinstance(module, PreTrainedModel) else None
    return _make, (type(module), config), state, *rest


def _make(kind: type[nn.Module], config: Any) -> nn.Module:
    copyreg.pickle(kind, _reduce)
    if config is not None:
        # transformers can capture a class's outputs only after one instance was constructed in the
        # process.
        constructed: Any = kind.__new__(kind)
        PreTrainedModel.__init__(constructed, deepcopy(config))
    return kind.__new__(kind)
