"""What a VAE gives, as the bytes of a picture."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np


def to_pixels(image: Tensor) -> "np.ndarray":
    """One image (1, 3, height, width) in about -1…1 as (height, width, 3) uint8, rounded to nearest."""
    return rounded(image).cpu().numpy()


def rounded(image: Tensor) -> Tensor:
    """As to_pixels, but still on the image's device."""
    pixels = (image[0] / 2 + 0.5).clamp(0, 1).mul(255).round()
    return pixels.to(torch.uint8).permute(1, 2, 0).contiguous()
