"""TAESD, a tiny autoencoder distilled from Stable Diffusion's: its decoder. Keys are those of diffusers'
AutoencoderTiny.

Source: https://github.com/madebyollin/taesd. One shape serves Stable Diffusion 1, 2 and XL; only the weights differ.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmcli.config import TinyVAEConfig


class TinyBlock(nn.Module):
    """Three convolutions with ReLU between, around which the input is added back, and ReLU once more."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TinyDecoder(nn.Module):
    """Latents (batch, latent_channels, height, width) as they are diffused to images in about -1…1."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        channels = config.channels
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, channels, 3, padding=1), nn.ReLU()]
        for count in config.blocks[:-1]:
            layers += [TinyBlock(channels) for _ in range(count)]
            layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
        layers += [TinyBlock(channels) for _ in range(config.blocks[-1])]
        layers += [nn.Conv2d(channels, config.out_channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        # The clamp keeps latents no photograph has from blowing up; the weights give 0…1.
        return self.layers(torch.tanh(x / 3) * 3) * 2 - 1


class TinyVAE(nn.Module):
    """The decoding half of TAESD, to be used in place of an Autoencoder."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = TinyDecoder(config)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (batch, 3, height · factor, width · factor) of latents; not clamped."""
        return self.decoder(latents)
