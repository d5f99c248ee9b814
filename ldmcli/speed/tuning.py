"""What makes a device fast or small beyond the plain way, as the user asked for it. Imports nothing heavy."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

KERNELS = ("auto", "triton", "torch")


@dataclasses.dataclass(frozen=True)
class Tuning:
    """`kernels`: this program's own (on a GPU fused ones, `triton`; on a CPU convolutions in fewer multiplications), or
    torch's alone; `auto` takes the former where they work. `graph`: record a step once as a CUDA graph and replay it.
    `compiled`: run the U-Net through torch.compile. `low_vram`: only the part at work is on the GPU."""

    kernels: str = "auto"
    graph: bool = True
    compiled: bool = False
    low_vram: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """By the options of the command line."""
        return cls(options["kernels"], not options["no_cuda_graph"], options["compile"], options["low_vram"])
