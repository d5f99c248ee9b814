"""Whether the kernels give what torch gives, tried on small random tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldmcli.speed.cuda.choice import DEVICES, DTYPES, code
from ldmcli.speed.cuda.geglu import geglu, plain_geglu
from ldmcli.speed.cuda.group_norm import group_norm_silu, plain_group_norm_silu
from ldmcli.speed.cuda.residual import add_bias_residual, plain_add_bias_residual


def fault(device: torch.device, dtype: torch.dtype) -> str:
    """What keeps the kernels from being used on `device` in `dtype`; empty if nothing. Compiles each of them, in the
    form that real models use, and raises whatever compiler or driver do."""
    if device.type not in DEVICES or dtype not in DTYPES:
        return f"they are not for {dtype} on {device.type}"
    if code() is None:
        return "Triton is not installed"
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator).to(device, dtype)
        return drawn.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else drawn

    norm, plain_norm = group_norm_silu, plain_group_norm_silu
    small, large = normal(2, 32, 9, 8), normal(1, 32, 45, 47)  # one program norms a group of the one, many the other
    weight, bias, shift, residual = normal(32), normal(32), normal(2, 32), normal(2, 32, 9, 8)
    trials: dict[str, tuple[Any, Any, tuple[Any, ...], dict[str, Any]]] = {
        "norm of a small map": (norm, plain_norm, (small, 2, weight, bias, 1e-5), {"shift": shift}),
        "norm of a large map": (norm, plain_norm, (large, 2, weight, bias, 1e-5), {"activate": False}),
        "gate": (geglu, plain_geglu, (normal(2, 9, 512),), {}),
        "sum": (add_bias_residual, plain_add_bias_residual, (small, weight, residual, bias), {}),  # last: changes small
    }
    for name, (kernel, twin, values, settings) in trials.items():
        if not _agree(kernel, twin, values, settings, dtype):
            return f"the {name} comes out wrong in {dtype}"
    return ""


def _agree(
    kernel: Callable[..., Tensor],
    twin: Callable[..., Tensor],
    values: tuple[Any, ...],
    settings: dict[str, Any],
    dtype: torch.dtype,
) -> bool:
    """Whether the kernel gives what its twin gives in float32, but for rounding once to `dtype`."""
    right = twin(*map(_wide, values), **{name: _wide(value) for name, value in settings.items()})
    tolerance = 2 * max(torch.finfo(dtype).eps, 1e-5)
    return torch.allclose(kernel(*values, **settings).float(), right, rtol=tolerance, atol=tolerance)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value
