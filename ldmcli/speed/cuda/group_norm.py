"""Group norm and SiLU of feature maps that lie channels last, as a ResnetBlock begins each of its halves."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmcli.speed.cuda.choice import code, is_map, on_device_of, takes

# Fixed, not tuned at run time: no process pays for trying. What a program works on at a time, by how many warps (of 32
# threads); one size for all layers, because each is compiled apart.
_GROUP_BLOCK = {"ROWS": 256, "COLUMNS": 16, "num_warps": 16}  # a group's 4 to 80 channels in pieces
_PARTS_BLOCK = {"ROWS": 128, "COLUMNS": 32, "num_warps": 8}
_MAP_BLOCK = {"ROWS": 64, "COLUMNS": 64, "num_warps": 8}  # the widths of real models are multiples of 64
WHOLE = 1 << 15  # numbers of a group up to which one program norms it; larger ones are shared by many
_PROGRAMS, _PARTS = 1024, 256  # how many measure a shared map together, and how many parts of an image at most


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

    `shift` is (batch or 1, channels); `weight` and `bias` are (channels,). Means and variances are in float32, by
    Welford's method and Chan's for its parts, and the result is rounded once.
    """
    fits = is_map(x) and x.shape[1] % groups == 0 and weight.is_contiguous() and bias.is_contiguous()
    if shift is not None:
        fits = fits and shift.shape[0] in (1, x.shape[0]) and shift.stride(1) == 1
    if not fits or not takes(x, weight, bias, shift):
        return plain_group_norm_silu(x, groups, weight, bias, eps, shift=shift, activate=activate)
    shifts = (weight, -1) if shift is None else (shift, shift.stride(0) if shift.shape[0] > 1 else 0)
    norm = _norm_whole if x[0].numel() <= WHOLE * groups else _norm_shared
    with on_device_of(x):
        return norm(x, groups, (weight, bias), eps, shifts, activate)


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


def part_pixels(pixels: int, others: int) -> int:
    """How many pixels of an image a program measures, where `others` share out the same pixels by channels and images:
    blocks of them, few where there are other programs enough."""
    parts, rows = min(max(_PROGRAMS // others, 1), _PARTS), _MAP_BLOCK["ROWS"]
    return -(-pixels // (parts * rows)) * rows


def _norm_whole(
    x: Tensor, groups: int, affine: tuple[Tensor, Tensor], eps: float, shift: tuple[Tensor, int], activate: bool
) -> Tensor:
    """By one program for each group."""
    kernels = code()
    assert kernels is not None
    (weight, bias), (batch, channels, height, width) = affine, x.shape
    out = torch.empty_like(x, memory_format=torch.channels_last)
    kernels.norm_group[groups, batch](
        *(x, out, weight, bias, *shift, int(activate), height * width, channels, eps),
        **_GROUP_BLOCK,
    )
    return out


def _norm_shared(
    x: Tensor, groups: int, affine: tuple[Tensor, Tensor], eps: float, shift: tuple[Tensor, int], activate: bool
) -> Tensor:
    """By many programs for each image: they measure parts of it, then sum up, then norm."""
    kernels = code()
    assert kernels is not None
    (weight, bias), (batch, channels, height, width) = affine, x.shape
    pixels, blocks = height * width, -(-channels // _MAP_BLOCK["COLUMNS"])
    part = part_pixels(pixels, batch * blocks)
    parts = -(-pixels // part)
    means, squares = torch.empty((2, batch, parts, channels), dtype=torch.float32, device=x.device)
    kernels.channel_moments[parts, blocks, batch](x, means, squares, pixels, channels, part, **_MAP_BLOCK)
    centres, scales = torch.empty((2, batch, channels), dtype=torch.float32, device=x.device)
    kernels.group_moments[groups, batch](
        *(means, squares, weight, *shift, centres, scales, pixels, channels, parts, part, eps),
        **_PARTS_BLOCK,
    )
    out = torch.empty_like(x, memory_format=torch.channels_last)
    kernels.norm_map[-(-pixels // _MAP_BLOCK["ROWS"]), blocks, batch](
        *(x, out, centres, scales, bias, int(activate), pixels, channels), **_MAP_BLOCK
    )
    return out
