"""The KL autoencoder between images and latents (Rombach et al. 2022, section 3.1). Keys are diffusers' names."""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmcli.config import VAEConfig
from ldmcli.networks.attention import PixelAttention
from ldmcli.networks.layers import Downsample, ResnetBlock, Upsample

_EPS = 1e-6


class DiagonalGaussian:
    """The posterior of an image: independent normals, one for each latent value."""

    def __init__(self, moments: Tensor) -> None:
        """moments: (batch, 2 · latent_channels, height, width), means first, then log variances."""
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw, shaped as the mean; the noise comes from the CPU when a generator is given."""
        if generator is None:
            noise = torch.randn_like(self.mean)
        else:
            noise = torch.randn(self.mean.shape, generator=generator, dtype=torch.float32).to(self.mean)
        return self.at(noise)

    def at(self, noise: Tensor) -> Tensor:
        """The latents that standard-normal noise, shaped as the mean, stands for."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL divergence (batch,) from the standard normal, summed over latent values, in nats."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.sum(dim=(1, 2, 3))


class MidBlock(nn.Module):
    """Resnet, attention, resnet."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.resnets = _resnets([channels] * 3, groups)
        self.attentions = nn.ModuleList([PixelAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return _through([self.resnets[0], self.attentions[0], self.resnets[1]], x)


class DownBlock(nn.Module):
    """Resnets, then half the size unless it is the last level."""

    def __init__(self, channels: list[int], groups: int, *, last: bool) -> None:
        super().__init__()
        self.resnets = _resnets(channels, groups)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(channels[-1], pad_end=True)])

    def forward(self, x: Tensor) -> Tensor:
        return _through([*self.resnets, *self.downsamplers], x)


class UpBlock(nn.Module):
    """Resnets, then double the size unless it is the last level."""

    def __init__(self, channels: list[int], groups: int, *, last: bool) -> None:
        super().__init__()
        self.resnets = _resnets(channels, groups)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(channels[-1])])

    def forward(self, x: Tensor) -> Tensor:
        return _through([*self.resnets, *self.upsamplers], x)


class Encoder(nn.Module):
    """Images (batch, 3, height, width) in -1…1 to the moments of their latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        levels, groups = config.block_channels, config.norm_groups
        self.conv_in = nn.Conv2d(config.in_channels, levels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock([levels[max(i - 1, 0)]] + [out] * config.layers_per_block, groups, last=i == len(levels) - 1)
            for i, out in enumerate(levels)
        )
        self.mid_block = MidBlock(levels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, levels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(levels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = _through([self.conv_in, *self.down_blocks, self.mid_block, self.conv_norm_out], x)
        return self.conv_out(F.silu(x, inplace=True))


class Decoder(nn.Module):
    """Latents (batch, latent_channels, height, width) to images in about -1…1."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        levels, groups = config.block_channels[::-1], config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, levels[0], 3, padding=1)
        self.mid_block = MidBlock(levels[0], groups)
        self.up_blocks = nn.ModuleList(
            UpBlock([levels[max(i - 1, 0)]] + [out] * (config.layers_per_block + 1), groups, last=i == len(levels) - 1)
            for i, out in enumerate(levels)
        )
        self.conv_norm_out = nn.GroupNorm(groups, levels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(levels[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = _through([self.conv_in, self.mid_block, *self.up_blocks, self.conv_norm_out], x)
        return self.conv_out(F.silu(x, inplace=True))


class AutoencoderKL(nn.Module):
    """Encoder and decoder with the 1×1 convolutions around the latents.

    Latents here are the autoencoder's own: whoever diffuses them multiplies by `config.scaling_factor`. Without
    `encoder` it can only decode, without `decoder` only encode.
    """

    encoder: Encoder
    quant_conv: nn.Conv2d
    decoder: Decoder
    post_quant_conv: nn.Conv2d

    def __init__(self, config: VAEConfig, *, encoder: bool = True, decoder: bool = True) -> None:
        super().__init__()
        self.config = config
        # In this order weights are drawn when one is trained, and optimizers count them.
        if encoder:
            self.encoder = Encoder(config)
        if decoder:
            self.decoder = Decoder(config)
        if encoder:
            self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        if decoder:
            self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """The posterior of images (batch, 3, height, width) in -1…1."""
        return DiagonalGaussian(self.quant_conv(self.encoder(images)))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (batch, 3, height · factor, width · factor) of latents; not clamped."""
        return self.decoder(self.post_quant_conv(latents))


def _resnets(channels: list[int], groups: int) -> nn.ModuleList:
    """Resnets from each of `channels` to the next."""
    return nn.ModuleList(ResnetBlock(into, out, groups=groups, eps=_EPS) for into, out in itertools.pairwise(channels))


def _through(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """What the layers make of x, one after the other."""
    for layer in layers:
        x = layer(x)
    return x
