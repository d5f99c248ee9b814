"""The terms of the autoencoder's loss (Rombach et al. 2022, section 3.1 and appendix G; Esser et al. 2021)."""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train_clip import ImageEncoder


@dataclasses.dataclass(frozen=True)
class Weights:
    """How much each term counts; 0 leaves it out. L1 + MSE always count once."""

    gradient: float  # L1 of horizontal and vertical differences
    perceptual: float
    kl: float
    adversarial: float


def pixel_loss(images: Tensor, decoded: Tensor, gradient: float) -> Tensor:
    """L1 + MSE + `gradient` · L1 between horizontal and vertical differences, which keeps edges sharp."""
    difference = decoded - images
    loss = difference.abs().mean() + difference.square().mean()
    if gradient:
        across = difference[..., 1:] - difference[..., :-1]
        down = difference[..., 1:, :] - difference[..., :-1, :]
        loss = loss + gradient * (across.abs().mean() + down.abs().mean())
    return loss


def perceptual_loss(encoder: ImageEncoder, images: Tensor, decoded: Tensor) -> Tensor:
    """Squared distance of the encoder's features, each pixel's features of a level being a unit vector, averaged over
    pixels and levels: LPIPS (Zhang et al. 2018) without its learnt weights."""
    with torch.no_grad():
        wanted = encoder.features(images)
    found = encoder.features(decoded)
    terms = [
        (F.normalize(f, dim=1) - F.normalize(w, dim=1)).square().sum(dim=1).mean()
        for f, w in zip(found, wanted, strict=True)
    ]
    return torch.stack(terms).mean()


class PatchDiscriminator(nn.Module):
    """Says of every patch of 22 pixels whether it is real: (batch, 3, height, width) to (batch, 1, height / 4,
    width / 4), positive for real (Isola et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.GroupNorm(8, 64),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.GroupNorm(8, 64),
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 1, 3, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def loss(self, images: Tensor, decoded: Tensor) -> Tensor:
        """The hinge loss that the discriminator learns by; the decoder learns by -self(decoded).mean()."""
        real, drawn = self(images), self(decoded.detach())
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + drawn).mean())


def balanced(gradient: Tensor, adversarial: Tensor, weight: float) -> Tensor:
    """The sum of both gradients at the decoded images, the adversarial one first scaled to `weight` times the length of
    the other: VQGAN's adaptive weight, taken at the image instead of at the last layer."""
    return gradient + weight * gradient.norm() / adversarial.norm().clamp(min=1e-12) * adversarial
