"""Whether the kernels give what torch gives, tried on small random tensors."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldmcli.errors import printable
from ldmcli.speed.cuda import group_norm, rows
from ldmcli.speed.cuda.choice import DEVICES, DTYPES, code

_log = logging.getLogger(__name__)
# The kernel in its module, whose name with plain_ before it is its twin's, and what it is called with.
TRIALS: dict[str, tuple[Any, str, Callable[[Callable[..., Tensor]], tuple[Any, ...]]]] = {
    "group norm": (group_norm, "group_norm_silu", lambda n: (n(2, 32, 45, 7), 2, n(32), n(32), 1e-5)),
    "gate": (rows, "geglu", lambda n: (n(2, 9, 512),)),
    "sum": (rows, "add_bias_residual", lambda n: (n(2, 32, 9, 8), n(32), n(2, 32, 9, 8), n(32))),
    "layer norm": (rows, "add_and_norm", lambda n: (n(2, 9, 32), n(32), n(2, 9, 32), n(32), n(32), 1e-5)),
}


@functools.cache
def kernels_work(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels give torch's numbers on `device` in `dtype`; if not, one logged sentence says why. What it
    compiles, in the form that real models use, Triton keeps on disk for all later runs."""
    try:
        reason = _fault(device, dtype)
    except Exception as error:  # whatever a compiler or driver may raise: torch's kernels are there in any case
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if reason:
        _log.warning("this program's own GPU kernels cannot be used (%s); torch's are", printable(reason))
    return not reason


def _fault(device: torch.device, dtype: torch.dtype) -> str:
    """What keeps the kernels from being used; empty if nothing."""
    if device.type not in DEVICES or dtype not in DTYPES:
        return f"they are not for {dtype} on {device.type}"
    if code() is None:
        return "Triton is not installed"
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator).to(device, dtype)
        return drawn.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else drawn

    tolerance = 2 * max(torch.finfo(dtype).eps, 1e-5)
    for name, (module, kernel, inputs) in TRIALS.items():
        values = inputs(normal)
        wide = [value.float() if isinstance(value, Tensor) else value for value in values]
        right = _all(getattr(module, f"plain_{kernel}")(*wide))
        found = _all(getattr(module, kernel)(*values))  # may be written over the values
        if not all(torch.allclose(*pair, rtol=tolerance, atol=tolerance) for pair in zip(found, right, strict=True)):
            return f"the {name} comes out wrong in {dtype}"
    return ""


def _all(results: Any) -> list[Tensor]:
    return [result.float() for result in (results if isinstance(results, tuple) else [results])]
