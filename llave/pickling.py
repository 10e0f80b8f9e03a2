"""Pickles of models that have encoded images, in spite of what transformers leaves in them."""

from __future__ import annotations

import copyreg
from collections import OrderedDict
from copy import deepcopy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_CAPTURING = "transformers.utils.output_capturing"
_HOOKED = "_output_capturing_hooks_installed"  # by which transformers knows that it was there


def make_picklable(model: nn.Module) -> None:
    """Let pickle take a model after use: for ``torch.save``, ``copy``, and processes that spawn.

    transformers hooks a function into a layer when its output is first asked for, as
    LLaVA-OneVision does for an image. Such a function is local to another, so pickle refuses it. A
    copy does without: transformers hooks it in again when it needs it.

    How to pickle is registered by class, so this holds for other models of the same classes too.
    Reading such a pickle takes this package.
    """
    for kind in {type(module) for module in model.modules()} - copyreg.dispatch_table.keys():
        copyreg.pickle(kind, _reduce)


class _Hooks(OrderedDict[int, Any]):
    """Hooks that are pickled without those of transformers."""

    def __reduce__(self) -> Any:
        kept = [(k, hook) for k, hook in self.items() if _module(hook) != _CAPTURING]
        return OrderedDict, (kept,)


class _Hooked(int):
    """A true value that pickles as a false one; ``copy.copy``, which shares the hooks, keeps it."""

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
        # A process must have constructed one of a class before its outputs can be captured.
        constructed: Any = kind.__new__(kind)
        PreTrainedModel.__init__(constructed, deepcopy(config))
    return kind.__new__(kind)
