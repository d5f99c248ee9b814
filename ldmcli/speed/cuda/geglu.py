"""The gate of a GEGLU layer (Shazeer 2020)."""

from torch import Tensor
from torch.nn import functional as F

from ldmcli.speed.cuda.choice import code, on_device_of, takes

_ROWS, _COLUMNS, _WARPS = 8, 256, 4  # inner widths of real models are multiples of 256


def geglu(x: Tensor) -> Tensor:
    """value · gelu(gate), (…, inner), for x (…, 2 · inner) that holds values first, then their gates. GELU is the exact
    one, by the error function; the result is rounded once."""
    if x.shape[-1] % 2 or not x.is_contiguous() or not takes(x):
        return plain_geglu(x)
    kernels = code()
    assert kernels is not None
    inner = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], inner)
    rows = out.numel() // inner
    with on_device_of(x):
        kernels.gate[-(-rows // _ROWS), -(-inner // _COLUMNS)](
            x, out, rows, inner, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS
        )
    return out


def plain_geglu(x: Tensor) -> Tensor:
    """The same by torch."""
    value, gate = x.chunk(2, dim=-1)
    return F.gelu(gate).mul_(value)
