"""``train_worker`` with accelerate's FSDP on a CPU, over gloo."""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from tests.llave import train_worker


def main(out: str, point: str, *overrides: str) -> None:
    """``train_worker.main`` in a process of its own, which this changes."""
    initialise = AcceleratorState.__init__

    def sharded(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        """Set FSDP up as for several GPUs. accelerate skips it on CPUs, but FSDP2 runs there."""
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = sharded
    train_worker.main(out, point, *overrides)
