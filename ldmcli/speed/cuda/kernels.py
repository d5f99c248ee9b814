"""This program's own GPU kernels, as functions of tensors; what they do not take, torch computes by the same formula.

Triton, in which they are written (device_code.py), is imported when the first tensor goes to one.
"""

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmcli.errors import printable

DEVICES = {"cuda"}  # the tests add "cpu", for Triton's interpreter, or take "cuda" away
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Sizes of blocks are fixed, not tuned at run time: no process pays for trying. Of the group norm, pixels that a program
# works on at a time, and channels: whole groups, as many as fit.
ROWS, CHANNELS, WARPS = 16, 64, 2
PROGRAMS, PARTS = 1024, 64  # how many share a map, and how many parts of an image's pixels at most; a power of two
_LARGE = 1 << 14  # pixels of a map from which on there may be 4 times as many parts, and twice as many programs
_GATE = {"ROWS": 8, "COLUMNS": 256, "num_warps": 4}  # inner widths of real models are multiples of 256
_SUM = {"ROWS": 32, "COLUMNS": 64, "num_warps": 4}
_NORMED, _WIDEST = 2048, 8192  # numbers of a block that a program norms, and the most in a row
_log = logging.getLogger(__name__)


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    shift: Tensor | None = None,
    activate: bool = True,
) -> Tensor:
    """SiLU (with `activate`) of the group norm of x + shift, for maps x (batch, channels, height, width).

    `shift` is (batch or 1, channels); `weight` and `bias` are (channels,). Means and variances are in float32, in two
    passes over blocks joined by Chan's method, and the result is rounded once.
    """
    fits = _is_map(x) and x.shape[1] % groups == 0 and weight.is_contiguous() and bias.is_contiguous()
    if shift is not None:
        fits = fits and shift.shape[0] in (1, x.shape[0]) and shift.stride(1) == 1
    if not fits or not _takes(x, weight, bias, shift):
        x = x if shift is None else x + shift[:, :, None, None]
        x = F.group_norm(x, groups, weight, bias, eps)
        return F.silu(x, inplace=True) if activate else x
    shifts, stride = (weight, -1) if shift is None else (shift, shift.stride(0) if shift.shape[0] > 1 else 0)
    batch, channels, height, width = x.shape
    pixels, each = height * width, channels // groups
    together = max(1, min(groups, CHANNELS // each))
    blocks = -(-groups // together)
    part = part_pixels(pixels, batch * blocks)
    grid = -(-pixels // part), blocks, batch
    sizes = {
        "ROWS": ROWS, "COLUMNS": _power_of_two(together * each), "WIDTH": each, "TOGETHER": together,
        "MEMBERS": _power_of_two(together), "num_warps": WARPS,
    }  # fmt: skip
    numbers = pixels, channels, groups, part
    out = torch.empty_like(x, memory_format=torch.channels_last)
    means, squares = torch.empty((2, batch, grid[0], groups), dtype=torch.float32, device=x.device)
    _launch("part_moments", grid, x, shifts, means, squares, stride, *numbers, **sizes)
    moments = weight, bias, shifts, means, squares, stride
    _launch("norm_parts", grid, x, out, *moments, int(activate), *numbers, eps, PARTS=most_parts(pixels), **sizes)
    return out


def geglu(x: Tensor) -> Tensor:
    """value · gelu(gate), (…, inner), for x (…, 2 · inner) that holds values first, then their gates (Shazeer 2020).
    GELU is the exact one, by the error function; the result is rounded once."""
    if x.shape[-1] % 2 or not x.is_contiguous() or not _takes(x):
        value, gate = x.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)
    inner = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], inner)
    rows = out.numel() // inner
    _launch("gate", (-(-rows // _GATE["ROWS"]), -(-inner // _GATE["COLUMNS"])), x, out, rows, inner, **_GATE)
    return out


def add_bias_residual(h: Tensor, bias: Tensor, residual: Tensor, residual_bias: Tensor | None = None) -> Tensor:
    """h + bias + residual + residual_bias, rounded once, for maps (batch, channels, height, width) or tokens (batch,
    tokens, channels), and biases (channels,). May be written in place of h, which must be the caller's own."""
    fits = _is_rows(h) and _is_rows(residual) and h.shape == residual.shape and h.dtype == residual.dtype
    biases = [bias] if residual_bias is None else [bias, residual_bias]
    fits = fits and all(b.is_contiguous() for b in biases)
    if not fits or not _takes(h, residual, *biases):
        for other in biases:
            h = h + (other[:, None, None] if h.ndim == 4 else other)
        return h + residual
    channels = len(bias)
    rows = h.numel() // channels
    grid = -(-rows // _SUM["ROWS"]), -(-channels // _SUM["COLUMNS"])
    _launch("add_rows", grid, h, bias, residual, biases[-1], len(biases), rows, channels, **_SUM)
    return h


def add_and_norm(
    h: Tensor, bias: Tensor, residual: Tensor | None, weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """h + bias, + residual if there is one, for tokens (batch, tokens, channels), and the layer norm of that; both
    rounded once. The first may be written in place of h, which must be the caller's own."""
    vectors, other = (bias, weight, norm_bias), h if residual is None else residual
    fits = h.shape == other.shape and h.dtype == other.dtype and h.is_contiguous() and other.is_contiguous()
    fits = fits and h.shape[-1] <= _WIDEST and all(v.is_contiguous() and v.shape == h.shape[-1:] for v in vectors)
    if not fits or not _takes(h, other, *vectors):
        h = h + bias if residual is None else h + bias + residual
        return h, F.layer_norm(h, h.shape[-1:], weight, norm_bias, eps)
    channels, normed = h.shape[-1], torch.empty_like(h)
    columns = _power_of_two(channels)
    each, rows = max(1, _NORMED // columns), h.numel() // channels
    others = bias, other, weight, norm_bias, normed, int(residual is not None)
    sizes = {"ROWS": each, "COLUMNS": columns, "num_warps": 4}
    _launch("add_and_norm_rows", (-(-rows // each),), h, *others, rows, channels, eps, **sizes)
    return h, normed


# What each is tried on, drawn by a function of shapes.
TRIALS: dict[str, tuple[Callable[..., Any], Callable[[Callable[..., Tensor]], tuple[Any, ...]]]] = {
    "group norm": (group_norm_silu, lambda n: (n(2, 32, 45, 7), 2, n(32), n(32), 1e-5)),
    "gate": (geglu, lambda n: (n(2, 9, 512),)),
    "sum": (add_bias_residual, lambda n: (n(2, 32, 9, 8), n(32), n(2, 32, 9, 8), n(32))),
    "layer norm": (add_and_norm, lambda n: (n(2, 9, 320), n(320), n(2, 9, 320), n(320), n(320), 1e-5)),
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
    if _code() is None:
        return "Triton is not installed"
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator).to(device, dtype)
        return drawn.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else drawn

    tolerance = 2 * max(torch.finfo(dtype).eps, 1e-5)
    for name, (kernel, inputs) in TRIALS.items():
        values = inputs(normal)
        # In float64, which no kernel takes, torch computes. A kernel may write over its values.
        right, found = (
            kernel(*(v.to(kind) if isinstance(v, Tensor) else v for v in values)) for kind in (torch.float64, dtype)
        )
        pairs = zip(right, found, strict=True) if isinstance(found, tuple) else [(right, found)]
        if not all(torch.allclose(b.double(), a, rtol=tolerance, atol=tolerance) for a, b in pairs):
            return f"the {name} comes out wrong in {dtype}"
    return ""


def most_parts(pixels: int) -> int:
    """How many parts an image of so many pixels has at most."""
    return PARTS * (4 if pixels >= _LARGE else 1)


def few_pixels(pixels: int) -> int:
    """The fewest pixels for which the same kernels are compiled as for so many."""
    return _LARGE if pixels >= _LARGE else 1


def part_pixels(pixels: int, others: int) -> int:
    """How many pixels of an image a program works on, where `others` share out the same pixels by channels and images:
    blocks of them, few where there are other programs enough."""
    parts = min(max(PROGRAMS * (2 if pixels >= _LARGE else 1) // others, 1), most_parts(pixels))
    return -(-pixels // (parts * ROWS)) * ROWS


def _power_of_two(number: int) -> int:
    """The lowest that is no less."""
    return 1 << (number - 1).bit_length()


def _is_map(x: Tensor) -> bool:
    """Whether x is a feature map (batch, channels, height, width) that lies channels last in memory."""
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _is_rows(x: Tensor) -> bool:
    """Whether x is a feature map channels last, or tokens: in memory, rows of channels."""
    return x.is_contiguous() if x.ndim == 3 else _is_map(x)


def _takes(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take x together with the other tensors, which may be of other number types."""
    tensors = [x, *(other for other in others if other is not None)]
    if x.device.type not in DEVICES or not x.numel() or any(t.device != x.device for t in tensors):
        return False
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not differentiated and all(t.dtype in DTYPES for t in tensors) and _code() is not None


def _launch(name: str, grid: tuple[int, ...], x: Tensor, *more: Any, **sizes: int) -> None:
    """Start a kernel whose first argument is x, on x's device: Triton launches on the current one."""
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        getattr(_code(), name)[grid](x, *more, **sizes)


@functools.cache
def _code() -> ModuleType | None:
    """The kernels themselves; None where there is no Triton."""
    try:
        return importlib.import_module("ldmcli.speed.cuda.device_code")
    except ImportError:
        return None
