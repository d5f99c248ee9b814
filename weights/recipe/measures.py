"""How near reconstructions come to their images."""

import torch
from torch import Tensor
from torch.nn import functional as F


def peak_signal_to_noise(images: Tensor, others: Tensor) -> float:
    """Decibels, over images (N, 3, height, width) in [-1, 1]: one mean squared error over all of them."""
    return float(10 * torch.log10(4 / (images - others).square().mean()))


def structural_similarity(images: Tensor, others: Tensor) -> float:
    """Mean SSIM (Wang et al. 2004) of images (N, 3, height, width) in [-1, 1]: each channel by itself, a Gaussian
    window of 11 pixels and deviation 1.5, without padding."""
    place = torch.arange(11, device=images.device) - 5.0
    line = torch.exp(-place.square() / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum().square()

    def blurred(values: Tensor) -> Tensor:
        return F.conv2d(values.flatten(0, 1)[:, None], window[None, None])

    x, y = blurred(images), blurred(others)
    xx, yy, xy = blurred(images.square()) - x * x, blurred(others.square()) - y * y, blurred(images * others) - x * y
    small, smaller = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    alike = (2 * x * y + small) * (2 * xy + smaller) / ((x * x + y * y + small) * (xx + yy + smaller))
    return float(alike.mean())
