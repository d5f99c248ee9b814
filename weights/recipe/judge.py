"""Names the emoji and the background of a picture, by the nearest of all clean views; needs no training.

The background is the nearest of the ten colours to the median of the picture's border. For the emoji every glyph is
laid over that very median, so that its shade does not matter, in many sizes at many places; the emoji of the view with
the least squared distance, at 16 × 16 pixels, is the picture's.

A glyph with premultiplied colours P and opacity A over the colour c is P + (1 - A) c. The squared distance of a picture
c + D from it is then linear in products of picture and view, so that one matrix product compares all of them:

    |D - (P - A c)|² = |D|² - 2 D·P + 2 (c D)·A + |P|² - 2 c·(P A) + |c|² |A|²
"""

import itertools

import numpy
import torch
from data import LARGEST, SMALLEST
from emoji import BACKGROUNDS
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

SIDE = 16  # pixels of a view in comparison
SCALES = 6  # sizes of each glyph, from the smallest in the data to the largest
STEP = 1 / 24  # between places, of the frame's side


def border_colour(images: Tensor) -> Tensor:
    """The median of each channel over the frame of two pixels: (N, 3) of images (N, 3, height, width)."""
    rows = torch.cat([images[..., :2, :], images[..., -2:, :]], dim=2).flatten(2)
    columns = torch.cat([images[..., 2:-2, :2], images[..., 2:-2, -2:]], dim=3).flatten(2)
    return torch.cat([rows, columns], dim=2).median(dim=2).values


def foreground(images: Tensor, threshold: float = 0.25) -> Tensor:
    """Which pixels differ from the border's colour by more than `threshold` of the range -1 … 1 in some channel: bool
    (N, height, width)."""
    return (images - border_colour(images)[:, :, None, None]).abs().amax(dim=1) > threshold


class Judge:
    """Names the emoji and the background of images (N, 3, size, size) in [-1, 1]; both as indices.

    Its views take 1.3 MB for each emoji.
    """

    def __init__(self, glyphs: list[Image.Image], size: int, device: str = "cpu") -> None:
        self.device, self.size = torch.device(device), size
        self.colours = (torch.tensor(list(BACKGROUNDS.values()), device=self.device) / 127.5) - 1
        self.views = [self._summary(_views(glyph, size)).to(self.device) for glyph in glyphs]

    @staticmethod
    def _summary(views: Tensor) -> Tensor:
        """(V, 4 SIDE² + 5) of premultiplied views (V, 4, SIDE, SIDE): what meets a picture's vector in the product."""
        colour, opacity = views[:, :3].flatten(2), views[:, 3].flatten(1)
        squares = colour.square().sum(dim=(1, 2))[:, None]
        crossed = (colour * opacity[:, None]).sum(dim=2)
        return torch.cat(
            [-2 * colour.flatten(1), 2 * opacity, squares, -2 * crossed, opacity.square().sum(dim=1, keepdim=True)],
            dim=1,
        )

    @staticmethod
    def _vectors(images: Tensor, border: Tensor) -> Tensor:
        """(N, 4 SIDE² + 5) of images in 0 … 1 and their borders' colours (N, 3)."""
        small = F.adaptive_avg_pool2d(images, SIDE).flatten(2) - border[:, :, None]
        weighted = (small * border[:, :, None]).sum(dim=1)
        one = torch.ones_like(border[:, :1])
        return torch.cat([small.flatten(1), weighted, one, border, border.square().sum(dim=1, keepdim=True)], dim=1)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The emoji and the backgrounds: two vectors (N,) on the CPU."""
        images = images.to(self.device)
        border = border_colour(images)
        vectors = self._vectors((images + 1) / 2, (border + 1) / 2)
        nearest = torch.stack([(vectors @ views.T).amin(dim=1) for views in self.views], dim=1)
        return nearest.argmin(dim=1).cpu(), torch.cdist(border, self.colours).argmin(dim=1).cpu()


def _views(glyph: Image.Image, size: int) -> Tensor:
    """The glyph with premultiplied colours in 0 … 1, in all sizes and places: (V, 4, SIDE, SIDE)."""
    found = []
    for scale in numpy.linspace(SMALLEST, LARGEST, SCALES):
        side = round(size * scale)
        small = glyph.convert("RGBa").resize((side, side), Image.Resampling.LANCZOS)
        picture = torch.from_numpy(numpy.asarray(small).copy()).permute(2, 0, 1) / 255
        room = size - side
        places = [round(place) for place in numpy.linspace(0, room, round(room / (size * STEP)) + 1)]
        canvas = torch.zeros(len(places) ** 2, 4, size, size)
        for view, (top, left) in zip(canvas, itertools.product(places, places), strict=True):
            view[:, top : top + side, left : left + side] = picture
        found.append(F.adaptive_avg_pool2d(canvas, SIDE))
    return torch.cat(found)
