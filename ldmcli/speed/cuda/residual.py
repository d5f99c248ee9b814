"""What ends a block: the bias of its last convolution, and its input added back."""

from torch import Tensor

from ldmcli.speed.cuda.choice import code, is_map, on_device_of, takes

_ROWS, _COLUMNS, _WARPS = 32, 64, 4


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
    batch, channels, height, width = h.shape
    rows = batch * height * width
    with on_device_of(h):
        kernels.add_rows[-(-rows // _ROWS), -(-channels // _COLUMNS)](
            *(h, bias, residual, biases[-1], len(biases), rows, channels),
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=_WARPS,
        )
    return h


def plain_add_bias_residual(h: Tensor, bias: Tensor, residual: Tensor, residual_bias: Tensor | None = None) -> Tensor:
    """The same by torch."""
    if residual_bias is not None:
        residual = residual + residual_bias[:, None, None]
    return h + bias[:, None, None] + residual
