"""The autoencoders between images and latents (Rombach et al. 2022, section 3.1): with a KL penalty on the latents, or
with a codebook of them (van den Oord et al. 2017; Esser et al. 2021). Keys are diffusers' names."""

import itertools
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmcli.config import VAEConfig
from ldmcli.networks.attention import PixelAttention
from ldmcli.networks.layers import Downsample, ResnetBlock, Upsample

_EPS = 1e-6
_DISTANCES = 1 << 24  # from latents to codes, computed at a time


class Posterior(Protocol):
    """What an encoder makes of an image."""

    mean: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """The latents that standard-normal noise, shaped as the mean, stands for."""
        ...


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


class Block(nn.Module):
    """Resnets, each followed by attention where there are `attentions`."""

    def __init__(self, channels: list[int], groups: int, attentions: int) -> None:
        """The resnets lead from each of `channels` to the next; `attentions` of them, the first ones, are followed by
        one."""
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(into, out, groups=groups, eps=_EPS) for into, out in itertools.pairwise(channels)
        )
        self.attentions = nn.ModuleList(PixelAttention(channels[1], groups) for _ in range(attentions))

    @property
    def layers(self) -> list[nn.Module]:
        """What is computed, in this order."""
        pairs = itertools.zip_longest(self.resnets, self.attentions)
        return [layer for pair in pairs for layer in pair if layer is not None]

    def forward(self, x: Tensor) -> Tensor:
        return _through(self.layers, x)


class DownBlock(Block):
    """A block, then half the size unless it is the last level."""

    def __init__(self, channels: list[int], groups: int, *, attends: bool, last: bool) -> None:
        super().__init__(channels, groups, attends * (len(channels) - 1))
        self.downsamplers = nn.ModuleList([] if last else [Downsample(channels[-1], pad_end=True)])

    @property
    def layers(self) -> list[nn.Module]:
        return [*super().layers, *self.downsamplers]


class UpBlock(Block):
    """A block, then double the size unless it is the last level."""

    def __init__(self, channels: list[int], groups: int, *, attends: bool, last: bool) -> None:
        super().__init__(channels, groups, attends * (len(channels) - 1))
        self.upsamplers = nn.ModuleList([] if last else [Upsample(channels[-1])])

    @property
    def layers(self) -> list[nn.Module]:
        return [*super().layers, *self.upsamplers]


class Encoder(nn.Module):
    """Images (batch, 3, height, width) in -1…1 to what their latents are made of: moments, or for VQ the latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        levels, groups = config.block_channels, config.norm_groups
        attends = config.attention or (False,) * len(levels)
        self.conv_in = nn.Conv2d(config.in_channels, levels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(
                [levels[max(i - 1, 0)]] + [out] * config.layers_per_block,
                groups,
                attends=attends[i],
                last=i == len(levels) - 1,
            )
            for i, out in enumerate(levels)
        )
        self.mid_block = Block([levels[-1]] * 3, groups, int(config.middle_attention))
        self.conv_norm_out = nn.GroupNorm(groups, levels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(levels[-1], _moments(config) * _inner(config), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = _through([self.conv_in, *self.down_blocks, self.mid_block, self.conv_norm_out], x)
        return self.conv_out(F.silu(x, inplace=True))


class Decoder(nn.Module):
    """Latents (batch, inner channels, height, width) to images in about -1…1."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        levels, groups = config.block_channels[::-1], config.norm_groups
        attends = config.attention[::-1] or (False,) * len(levels)
        self.conv_in = nn.Conv2d(_inner(config), levels[0], 3, padding=1)
        self.mid_block = Block([levels[0]] * 3, groups, int(config.middle_attention))
        self.up_blocks = nn.ModuleList(
            UpBlock(
                [levels[max(i - 1, 0)]] + [out] * (config.layers_per_block + 1),
                groups,
                attends=attends[i],
                last=i == len(levels) - 1,
            )
            for i, out in enumerate(levels)
        )
        self.conv_norm_out = nn.GroupNorm(groups, levels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(levels[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = _through([self.conv_in, self.mid_block, *self.up_blocks, self.conv_norm_out], x)
        return self.conv_out(F.silu(x, inplace=True))


class Autoencoder(nn.Module):
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
        moments, inner, channels = _moments(config), _inner(config), config.latent_channels
        # In this order weights are drawn when one is trained, and optimizers count them.
        if encoder:
            self.encoder = Encoder(config)
        if decoder:
            self.decoder = Decoder(config)
        if encoder:
            self.quant_conv = nn.Conv2d(moments * inner, moments * channels, 1)
        if decoder:
            self.post_quant_conv = nn.Conv2d(channels, inner, 1)

    def encode(self, images: Tensor) -> Posterior:
        """The posterior of images (batch, 3, height, width) in -1…1."""
        return self.posterior(self.quant_conv(self.encoder(images)))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (batch, 3, height · factor, width · factor) of latents; not clamped."""
        return self.decoder(self.post_quant_conv(self.quantized(latents)))

    def posterior(self, encoded: Tensor) -> Posterior:
        """What the encoder's output says."""
        raise NotImplementedError

    def quantized(self, latents: Tensor) -> Tensor:
        """The latents as the decoder reads them."""
        return latents


class AutoencoderKL(Autoencoder):
    """An autoencoder whose latents are drawn from normal distributions."""

    def posterior(self, encoded: Tensor) -> DiagonalGaussian:
        """Means first, then log variances, (batch, 2 · latent_channels, height, width)."""
        return DiagonalGaussian(encoded)


class AutoencoderVQ(Autoencoder):
    """An autoencoder with a codebook. What is diffused are the encoder's latents as they are; the decoder reads of each
    the nearest code (Rombach et al. 2022, section 3.1: the quantization layer belongs to the decoder)."""

    def __init__(self, config: VAEConfig, *, encoder: bool = True, decoder: bool = True) -> None:
        super().__init__(config, encoder=encoder, decoder=decoder)
        self.quantize = Codebook(config.codes, config.latent_channels)

    def posterior(self, encoded: Tensor) -> Posterior:
        """The latents themselves."""
        return _Point(encoded)

    def quantized(self, latents: Tensor) -> Tensor:
        """Of each latent (batch, channels, height, width) the nearest code."""
        return self.quantize(self.quantize.nearest(latents)).to(latents.dtype)


class Codebook(nn.Module):
    """Codes by their numbers."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)

    def forward(self, numbers: Tensor) -> Tensor:
        """The codes (batch, channels, height, width) of numbers (batch, height, width)."""
        return self.embedding(numbers).permute(0, 3, 1, 2)

    def nearest(self, latents: Tensor) -> Tensor:
        """The number (batch, height, width) of the code that is nearest to each latent (batch, channels, height,
        width), in float32."""
        codes = self.embedding.weight.float()
        flat = latents.float().permute(0, 2, 3, 1).flatten(0, 2)
        half = codes.square().sum(1) / 2  # of |z - e|² what differs between codes is |e|² - 2 z·e
        parts = flat.split(max(1, _DISTANCES // len(codes)))
        found = torch.cat([torch.addmm(half, part, codes.T, alpha=-1).argmin(1) for part in parts])
        return found.unflatten(0, (len(latents), *latents.shape[2:]))


class _Point:
    """A posterior without spread."""

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def at(self, noise: Tensor) -> Tensor:
        return self.mean


def autoencoder_of(config: VAEConfig, *, encoder: bool = True, decoder: bool = True) -> Autoencoder:
    """The autoencoder that a configuration describes, or one half of it."""
    kind = AutoencoderVQ if config.codes else AutoencoderKL
    return kind(config, encoder=encoder, decoder=decoder)


def _moments(config: VAEConfig) -> int:
    """How many numbers the encoder gives for each latent."""
    return 1 if config.codes else 2


def _inner(config: VAEConfig) -> int:
    return config.inner_channels or config.latent_channels


def _through(layers: Iterable[nn.Module], x: Tensor) -> Tensor:
    """What the layers make of x, one after the other."""
    for layer in layers:
        x = layer(x)
    return x
