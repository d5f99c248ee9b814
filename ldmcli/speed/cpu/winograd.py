"""3×3 convolutions in a quarter of the multiplications (Winograd 1980; Lavin and Gray 2016, arXiv:1509.09308), for
float32 on a CPU. Same numbers, but for rounding: twice the plain convolution's error, about 1e-6 of the result.

A result's 4×4 pixels depend on 6×6 of the map. Both are seen as products of polynomials, taken at six points: there a
convolution is 36 products of matrices, tiles × channels by channels × channels, and what leads there and back are
sums over neighbours. The points are 0, ±√½, ±√2 and infinity, which round less than the usual 0, ±1, ±2 and infinity.

A map is worked on in strips of tiles that stay in the CPU's cache. Weights are taken to the points on every call, so
nothing is held beside them: with as many tiles as `suits` asks for, that costs little.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

TILES = 96  # of a map and more: with fewer the weights' way to the points costs too much
CHANNELS = 96  # on either side and more: with fewer the sums cost what the products save
WORK = 16 << 20  # bytes of a strip's products, what goes in and what comes out
WEIGHTS = 32 << 20  # bytes of weights at the points; larger ones are worked on in parts

_A, _B = math.sqrt(0.5), math.sqrt(2.0)
_POINTS = (0.0, _A, -_A, _B, -_B)


def suits(x: Tensor, out_channels: int, *, doubled: bool = False) -> bool:
    """Whether `convolve` is worth while for x (batch, channels, height, width)."""
    batch, channels, height, width = x.shape
    scale = 2 if doubled else 1
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and min(channels, out_channels) >= CHANNELS
        and batch * scale * scale * height * width >= 16 * TILES
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, *, doubled: bool = False) -> Tensor:
    """The convolution of x (batch, channels, height, width), zeros around it, with weight (out, channels, 3, 3); with
    `doubled` that of x at twice its height and width by nearest neighbour. All float32, x and the result channels-last.
    """
    scale = 2 if doubled else 1
    shape = (len(x), len(weight), scale * x.shape[2], scale * x.shape[3])
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    each = math.ceil(len(weight) / math.ceil(len(weight) / (WEIGHTS // (4 * 36 * weight.shape[1]))))
    for start in range(0, len(weight), each):
        part = slice(start, start + each)
        some = None if bias is None else bias[part]
        _convolve(x.permute(0, 2, 3, 1), weight[part], some, out[:, part].permute(0, 2, 3, 1), doubled=doubled)
    return out


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, doubled: bool) -> None:
    """Write the convolution of x (batch, height, width, channels) into out, likewise."""
    batch, rows, columns = len(x), math.ceil(out.shape[1] / 4), math.ceil(out.shape[2] / 4)
    most = max(1, WORK // (4 * 36 * (weight.shape[0] + weight.shape[1]) * columns))  # rows of tiles in a strip
    images = max(1, min(most // rows, batch))
    each = math.ceil(rows / math.ceil(rows / most))
    strip = _Strip(weight, bias, (images, each, columns))
    for first, top in itertools.product(range(0, batch, images), range(0, rows, each)):
        strip.read(x[first : first + images], top, doubled=doubled)
        strip.compute(out[first : first + images, 4 * top : 4 * (top + each)])


class _Strip:
    """Work space for some rows of tiles of some images, used again for every strip."""

    def __init__(self, weight: Tensor, bias: Tensor | None, tiles: tuple[int, int, int]) -> None:
        """tiles: images, rows and columns of them."""
        out_channels, channels = weight.shape[:2]
        images, rows, columns = tiles
        self.weight, self.bias = _at_points(weight), bias
        self.pixels = weight.new_zeros(images, 4 * rows + 2, 4 * columns + 2, channels)
        self.halfway = weight.new_empty(6, images, rows, 4 * columns + 2, channels)
        self.map = weight.new_empty(6, 6, *tiles, channels)
        self.product = weight.new_empty(6, 6, *tiles, out_channels)
        self.back_halfway = weight.new_empty(6, images, rows, columns, 4, out_channels)
        self.back = weight.new_empty(images, rows, 4, 4 * columns, out_channels)
        powers = _A ** torch.arange(4.0)
        self.scales = torch.outer(powers.repeat(rows), powers.repeat(columns))[..., None]

    def read(self, source: Tensor, top: int, *, doubled: bool) -> None:
        """Take the strip from row `top` of tiles on from maps (images, height, width, channels)."""
        count, height, width = source.shape[:3]
        pixels, scale = self.pixels[:count], 2 if doubled else 1
        begin = 4 * top - 1
        first, last = max(begin, 0), min(begin + pixels.shape[1], scale * height)
        pixels[:, : first - begin].zero_()
        pixels[:, last - begin :].zero_()
        inside = pixels[:, first - begin : last - begin, 1 : 1 + scale * width]
        if not doubled:
            inside.copy_(source[:, first:last])
            return
        pairs = inside.unflatten(2, (width, 2))
        for odd in (0, 1):
            start = (first ^ odd) & 1  # of the rows that show the lower or upper pixel of a pair
            wanted = source[:, (first + start) // 2 : (last + 1 - odd) // 2]
            pairs[:, start::2].copy_(wanted[:, :, :, None])

    def compute(self, out: Tensor) -> None:
        """Write the convolution of what was read into out (images, height, width, channels), whose last rows and
        columns may lack."""
        rows, columns = self.map.shape[3:5]
        _to_points([self.pixels[:, i : i + 4 * rows - 3 : 4] for i in range(6)], list(self.halfway))
        _to_points([self.halfway[:, :, :, j : j + 4 * columns - 3 : 4] for j in range(6)], list(self.map))
        at_points, product = self.map.flatten(2, 4).flatten(0, 1), self.product.flatten(2, 4).flatten(0, 1)
        torch.bmm(at_points, self.weight.mT, out=product)
        _from_points(list(self.product), list(self.back_halfway.unbind(-2)))
        _from_points(list(self.back_halfway.flatten(3, 4)), list(self.back.unbind(2)))
        images, height, width = out.shape[:3]
        back, scales = self.back.flatten(1, 2)[:images, :height, :width], self.scales[:height, :width]
        if self.bias is None:
            torch.mul(back, scales, out=out)
        else:
            torch.addcmul(self.bias, back, scales, out=out)


def _to_points(pixels: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write what six neighbours come to at the six points into `values`: for each point the coefficients of the product
    of (x - point) over all others."""
    d0, d1, d2, d3, d4, d5 = pixels
    first, last = values[0], values[5]  # hold even and odd powers meanwhile
    torch.sub(d4, d2, alpha=_B**2, out=first)
    torch.sub(d3, d1, alpha=_B**2, out=last)
    torch.add(first, last, alpha=_A, out=values[1])
    torch.sub(first, last, alpha=_A, out=values[2])
    torch.sub(d4, d2, alpha=_A**2, out=first)
    torch.sub(d3, d1, alpha=_A**2, out=last)
    torch.add(first, last, alpha=_B, out=values[3])
    torch.sub(first, last, alpha=_B, out=values[4])
    torch.sub(first, torch.sub(d2, d0, alpha=_A**2), alpha=_B**2, out=first)
    torch.sub(torch.sub(d5, d3, alpha=_A**2), last, alpha=_B**2, out=last)


def _from_points(values: Sequence[Tensor], pixels: Sequence[Tensor]) -> None:
    """Write the four pixels that six products come to, over 1, √½, ½ and √⅛; the products are lost."""
    m0, m1, m2, m3, m4, m5 = values
    near, far = m1 + m2, m3 + m4
    m1.sub_(m2)
    m3.sub_(m4)
    torch.add(m0.add_(near), far, out=pixels[0])
    torch.add(m1, m3, alpha=2, out=pixels[1])
    torch.add(near, far, alpha=4, out=pixels[2])
    torch.add(m5.add_(m1), m3, alpha=8, out=pixels[3])


@functools.cache
def _way_to_points() -> Tensor:
    """What takes the nine weights of a kernel, row by row, to the 36 points, column by column (36, 9)."""
    rows = []
    for point in _POINTS:
        norm = math.prod(point - other for other in _POINTS if other != point)
        rows.append([point**power / norm for power in range(3)])
    one = torch.tensor([*rows, [0.0, 0.0, _A**-3]], dtype=torch.float64)
    return torch.einsum("jx,iy->jiyx", one, one).reshape(36, 9).float()


def _at_points(weight: Tensor) -> Tensor:
    """weight (out, channels, 3, 3) at the points (36, out, channels)."""
    flat = weight.permute(2, 3, 0, 1).reshape(9, -1)
    return (_way_to_points() @ flat).view(36, *weight.shape[:2])
