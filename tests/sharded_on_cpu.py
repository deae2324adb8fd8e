"""The command line with FSDP2 on CPUs. By itself, accelerate shards models only on accelerators.

torchrun --nproc-per-node 2 tests/sharded_on_cpu.py train RECIPE --output DIR
"""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from convllava.cli import main

begin = AcceleratorState.__init__


def begin_sharded(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    """Use FSDP as on accelerators. The state is shared by all instances."""
    begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if plugin := fsdp_plugin or vars(self).get("fsdp_plugin"):
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin


AcceleratorState.__init__ = begin_sharded  # type: ignore[method-assign]
main()
