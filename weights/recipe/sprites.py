"""Views of emoji composed on a device, thousands at once; data.py and upscaler_pairs.py make them one by one.

Sizes, places and shades are drawn as data.py draws them, and values differ from its own by no more than rounding.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy
import torch
from data import LARGEST, SHADE, SMALLEST, TINT
from emoji import BACKGROUNDS, held_out_background
from PIL import Image
from torch import Tensor


@dataclasses.dataclass
class Views:
    """Emoji and backgrounds as indices (N,), colours 0 … 255 (N, 3), and in pixels of the model's pictures the side of
    the emoji's square (N,) and its top left corner (N, 2)."""

    objects: Tensor
    backgrounds: Tensor
    colours: Tensor
    sides: Tensor
    corners: Tensor

    def __getitem__(self, chosen: Tensor | slice) -> "Views":
        return Views(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))

    def __len__(self) -> int:
        return len(self.objects)

    @property
    def held_out(self) -> Tensor:
        """Which are of pairs that are held out of training, bool (N,)."""
        held = [held_out_background(index) for index in range(int(self.objects.max()) + 1)]
        return torch.tensor(held, device=self.objects.device)[self.objects] == self.backgrounds


def random_views(emoji: int, count: int, size: int, generator: torch.Generator) -> Views:
    """`count` views of each emoji on each background, in an order without one, on the generator's device."""
    device = generator.device
    total = emoji * len(BACKGROUNDS) * count
    pairs = torch.randperm(total, generator=generator, device=device) // count
    objects, backgrounds = pairs // len(BACKGROUNDS), pairs % len(BACKGROUNDS)

    def spread(*shape: int) -> Tensor:
        return torch.rand(total, *shape, generator=generator, device=device)

    shades = (2 * spread(1) - 1) * SHADE + (2 * spread(3) - 1) * TINT
    plain = torch.tensor(list(BACKGROUNDS.values()), device=device)[backgrounds]
    sides = (size * (SMALLEST + (LARGEST - SMALLEST) * spread())).round().long()
    corners = ((size - sides)[:, None] * spread(2)).round().long()
    return Views(objects, backgrounds, (plain + shades).round().clamp(0, 255), sides, corners)


class Sprites:
    """All glyphs in all sizes of the data, times `scale`, on a device: 32 MB of 88 emoji at 64 pixels, 16 times that at
    scale 4."""

    def __init__(self, glyphs: list[Image.Image], size: int, device: torch.device, scale: int = 1) -> None:
        self.size, self.scale = size, scale
        self.smallest, largest = round(SMALLEST * size), round(LARGEST * size)
        self.count, self.edge = largest - self.smallest + 1, largest * scale
        atlas = numpy.zeros((len(glyphs), self.count, self.edge, self.edge, 4), numpy.uint8)

        def fill(number: int) -> None:
            glyph, place = divmod(number, self.count)
            side = (self.smallest + place) * scale
            small = glyphs[glyph].convert("RGBa").resize((side, side), Image.Resampling.LANCZOS)
            values = numpy.asarray(small)
            atlas[glyph, place, :side, :side] = numpy.minimum(values, values[..., 3:])  # as opaque as can be seen

        with ThreadPoolExecutor() as pool:
            list(pool.map(fill, range(len(glyphs) * self.count)))
        # A pixel's four bytes as one number, which is gathered at once
        self._atlas = torch.from_numpy(atlas).view(torch.int32).flatten().to(device)

    def compose(self, views: Views) -> Tensor:
        """uint8 pictures (N, 3, size · scale, size · scale)."""
        pixels = torch.arange(self.size * self.scale, device=self._atlas.device)
        rows, columns = (pixels[None] - self.scale * corner[:, None] for corner in views.corners.unbind(1))
        first = views.objects * self.count + views.sides - self.smallest
        places = (first[:, None] * self.edge + rows.clamp(0, self.edge - 1))[:, :, None] * self.edge
        found = self._atlas[places + columns.clamp(0, self.edge - 1)[:, None]]
        *colour, opacity = found[..., None].view(torch.uint8).permute(3, 0, 1, 2)
        inside = ((rows >= 0) & (rows < self.edge))[:, :, None] & ((columns >= 0) & (columns < self.edge))[:, None]
        ground = torch.where(inside, 255 - opacity, 255)[:, None] * (views.colours / 255)[:, :, None, None]
        return (torch.stack(colour, 1) * inside[:, None] + ground).round().clamp(0, 255).byte()
