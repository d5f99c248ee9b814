"""Group norm and SiLU of feature maps that lie channels last, as a ResnetBlock begins each of its halves."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmcli.speed.cuda.choice import code, is_map, on_device_of, takes

# Fixed, not tuned at run time: no process pays for trying. Pixels that a program works on at a time, and channels:
# whole groups, as many as fit.
ROWS, CHANNELS, WARPS = 32, 256, 8
PROGRAMS, PARTS = 1024, 64  # how many share a map, and how many parts of an image's pixels at most; a power of two


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
    fits = is_map(x) and x.shape[1] % groups == 0 and weight.is_contiguous() and bias.is_contiguous()
    if shift is not None:
        fits = fits and shift.shape[0] in (1, x.shape[0]) and shift.stride(1) == 1
    if not fits or not takes(x, weight, bias, shift):
        return plain_group_norm_silu(x, groups, weight, bias, eps, shift=shift, activate=activate)
    shifts, stride = (weight, -1) if shift is None else (shift, shift.stride(0) if shift.shape[0] > 1 else 0)
    kernels = code()
    assert kernels is not None
    batch, channels, height, width = x.shape
    pixels, each = height * width, channels // groups
    together = groups_together(groups, each)
    blocks = -(-groups // together)
    part = part_pixels(pixels, batch * blocks)
    grid = -(-pixels // part), blocks, batch
    sizes = {"ROWS": ROWS, "GROUPS": together, "COLUMNS": _power_of_two(together * each), "num_warps": WARPS}
    numbers = pixels, channels, each, together * each, groups, part
    out = torch.empty_like(x, memory_format=torch.channels_last)
    means, squares = torch.empty((2, batch, grid[0], groups), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        kernels.part_moments[grid](x, shifts, means, squares, stride, *numbers, **sizes)
        kernels.norm_parts[grid](
            *(x, out, weight, bias, shifts, means, squares, stride, int(activate), *numbers, eps), PARTS=PARTS, **sizes
        )
    return out


def plain_group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    shift: Tensor | None = None,
    activate: bool = True,
) -> Tensor:
    """The same by torch."""
    if shift is not None:
        x = x + shift[:, :, None, None]
    x = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(x, inplace=True) if activate else x


def groups_together(groups: int, width: int) -> int:
    """How many groups of so many channels a program works on, a power of two."""
    together = 1
    while 2 * together <= groups and 2 * together * width <= CHANNELS:
        together *= 2
    return together


def part_pixels(pixels: int, others: int) -> int:
    """How many pixels of an image a program works on, where `others` share out the same pixels by channels and images:
    blocks of them, few where there are other programs enough."""
    parts = min(max(PROGRAMS // others, 1), PARTS)
    return -(-pixels // (parts * ROWS)) * ROWS


def _power_of_two(number: int) -> int:
    """The lowest that is no less."""
    return 1 << (number - 1).bit_length()
