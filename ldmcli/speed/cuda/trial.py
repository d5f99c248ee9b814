"""Whether the kernels give what torch gives, tried on small random tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldmcli.speed.cuda.choice import DEVICES, DTYPES, code
from ldmcli.speed.cuda.group_norm import group_norm_silu, plain_group_norm_silu
from ldmcli.speed.cuda.rows import (
    add_and_norm,
    add_bias_residual,
    geglu,
    plain_add_and_norm,
    plain_add_bias_residual,
    plain_geglu,
)


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

    x, weight, bias, shift, residual = normal(2, 32, 45, 7), normal(32), normal(32), normal(2, 32), normal(2, 32, 45, 7)
    tokens, other = normal(2, 9, 32), normal(2, 9, 32)
    trials: dict[str, tuple[Any, Any, tuple[Any, ...], dict[str, Any]]] = {
        "group norm": (group_norm_silu, plain_group_norm_silu, (x, 2, weight, bias, 1e-5), {"shift": shift}),
        "gate": (geglu, plain_geglu, (normal(2, 9, 512),), {}),
        "sum": (add_bias_residual, plain_add_bias_residual, (x, weight, residual, bias), {}),
        "layer norm": (add_and_norm, plain_add_and_norm, (tokens, bias, other, weight, bias, 1e-5), {}),
    }
    for name, (kernel, twin, values, settings) in trials.items():
        if not _agree(kernel, twin, values, settings, dtype):
            return f"the {name} comes out wrong in {dtype}"
    return ""


def _agree(
    kernel: Callable[..., Any],
    twin: Callable[..., Any],
    values: tuple[Any, ...],
    settings: dict[str, Any],
    dtype: torch.dtype,
) -> bool:
    """Whether the kernel gives what its twin gives in float32, but for rounding once to `dtype`."""
    right = _all(twin(*map(_wide, values), **{name: _wide(value) for name, value in settings.items()}))
    tolerance = 2 * max(torch.finfo(dtype).eps, 1e-5)
    found = _all(kernel(*values, **settings))  # may be written over the values
    return all(torch.allclose(*pair, rtol=tolerance, atol=tolerance) for pair in zip(found, right, strict=True))


def _all(results: Any) -> list[Tensor]:
    return [result.float() for result in (results if isinstance(results, tuple) else [results])]


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value
