"""What is computed row by row of channels: gates, sums, and sums with their layer norm."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmcli.speed.cuda.choice import code, is_map, on_device_of, takes

_GATE = {"ROWS": 8, "COLUMNS": 256, "num_warps": 4}  # inner widths of real models are multiples of 256
_SUM = {"ROWS": 32, "COLUMNS": 64, "num_warps": 4}
_NORMED, _WIDEST = 2048, 8192  # numbers of a block that a program norms, and the most in a row


def geglu(x: Tensor) -> Tensor:
    """value · gelu(gate), (…, inner), for x (…, 2 · inner) that holds values first, then their gates (Shazeer 2020).
    GELU is the exact one, by the error function; the result is rounded once."""
    if x.shape[-1] % 2 or not x.is_contiguous() or not takes(x):
        return plain_geglu(x)
    kernels = code()
    assert kernels is not None
    inner = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], inner)
    rows = out.numel() // inner
    with on_device_of(x):
        kernels.gate[-(-rows // _GATE["ROWS"]), -(-inner // _GATE["COLUMNS"])](x, out, rows, inner, **_GATE)
    return out


def plain_geglu(x: Tensor) -> Tensor:
    """The same by torch."""
    value, gate = x.chunk(2, dim=-1)
    return F.gelu(gate).mul_(value)


def add_bias_residual(h: Tensor, bias: Tensor, residual: Tensor, residual_bias: Tensor | None = None) -> Tensor:
    """h + bias + residual + residual_bias for maps (batch, channels, height, width) and biases (channels,), rounded
    once. May be written in place of h, which must be the caller's own."""
    fits = is_map(h) and is_map(residual) and h.shape == residual.shape and h.dtype == residual.dtype
    biases = [bias] if residual_bias is None else [bias, residual_bias]
    fits = fits and all(b.is_contiguous() and b.shape == h.shape[1:2] for b in biases)
    if not fits or not takes(h, residual, *biases):
        return plain_add_bias_residual(h, bias, residual, residual_bias)
    kernels = code()
    assert kernels is not None
    channels = h.shape[1]
    rows = h.numel() // channels
    with on_device_of(h):
        kernels.add_rows[-(-rows // _SUM["ROWS"]), -(-channels // _SUM["COLUMNS"])](
            h, bias, residual, biases[-1], len(biases), rows, channels, **_SUM
        )
    return h


def plain_add_bias_residual(h: Tensor, bias: Tensor, residual: Tensor, residual_bias: Tensor | None = None) -> Tensor:
    """The same by torch."""
    if residual_bias is not None:
        residual = residual + residual_bias[:, None, None]
    return h + bias[:, None, None] + residual


def add_and_norm(
    h: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """h + bias + residual for tokens (batch, tokens, channels), and its layer norm; both rounded once. The first may be
    written in place of h, which must be the caller's own."""
    vectors = bias, weight, norm_bias
    fits = h.shape == residual.shape and h.dtype == residual.dtype and h.is_contiguous() and residual.is_contiguous()
    fits = fits and h.shape[-1] <= _WIDEST and all(v.is_contiguous() and v.shape == h.shape[-1:] for v in vectors)
    if not fits or not takes(h, residual, *vectors):
        return plain_add_and_norm(h, bias, residual, weight, norm_bias, eps)
    kernels = code()
    assert kernels is not None
    channels, normed = h.shape[-1], torch.empty_like(h)
    columns = 1 << (channels - 1).bit_length()
    each, rows = max(1, _NORMED // columns), h.numel() // channels
    with on_device_of(h):
        kernels.add_and_norm_rows[(-(-rows // each),)](
            *(h, bias, residual, weight, norm_bias, normed, rows, channels, eps),
            ROWS=each,
            COLUMNS=columns,
            num_warps=4,
        )
    return h, normed


def plain_add_and_norm(
    h: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The same by torch."""
    h = h + bias + residual
    return h, F.layer_norm(h, h.shape[-1:], weight, norm_bias, eps)
