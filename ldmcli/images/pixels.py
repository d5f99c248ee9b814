"""What a VAE gives, as the bytes of a picture."""

import torch
from torch import Tensor


def rounded(image: Tensor) -> Tensor:
    """One image (1, 3, height, width) in about -1…1 as (height, width, 3) uint8, rounded to nearest; on its device."""
    pixels = (image[0] / 2 + 0.5).clamp(0, 1).mul(255).round()
    return pixels.to(torch.uint8).permute(1, 2, 0).contiguous()
