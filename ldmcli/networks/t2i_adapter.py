"""T2I-Adapter: maps made of a picture once, which are added on a U-Net's way down (Mou et al. 2023). Keys are
diffusers' names."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmcli.steering_config import AdapterConfig


class AdapterResnet(nn.Module):
    """Two convolutions added to their input; the second is 1×1 in full adapters."""

    def __init__(self, channels: int, last: int) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, last, padding=last // 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block2(F.relu(self.block1(x)))


class AdapterBlock(nn.Module):
    """One level, at half the size where `halves`: a light one computes at a quarter of its width."""

    def __init__(self, channels: int, out: int, resnets: int, *, halves: bool, light: bool) -> None:
        super().__init__()
        width = out // 4 if light else out
        self.halves = halves
        self.in_conv = nn.Conv2d(channels, width, 1) if light or channels != out else None
        self.resnets = nn.Sequential(*(AdapterResnet(width, 3 if light else 1) for _ in range(resnets)))
        self.out_conv = nn.Conv2d(width, out, 1) if light else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2, ceil_mode=True) if self.halves else x
        x = self.resnets(x if self.in_conv is None else self.in_conv(x))
        return x if self.out_conv is None else self.out_conv(x)


class AdapterBody(nn.Module):
    """The levels, behind a first convolution in full adapters."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        planes = config.planes * config.unshuffle**2
        light = config.light
        first = planes if light else config.channels[0]
        self.conv_in = None if light else nn.Conv2d(planes, first, 3, padding=1)
        self.body = nn.ModuleList()
        for level, (into, out) in enumerate(zip((first, *config.channels), config.channels, strict=False)):
            halves = level in config.halving
            self.body.append(AdapterBlock(into, out, config.resnets, halves=halves, light=light))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = x if self.conv_in is None else self.conv_in(x)
        found = []
        for block in self.body:
            x = block(x)
            found.append(x)
        return found


class T2IAdapter(nn.Module):
    """Maps for `Residuals.inner`, from the finest on."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter = AdapterBody(config)

    def read(self, pictures: Tensor) -> Sequence[Tensor]:
        """The maps of pictures (batch, planes, height, width) in 0…1, whose edges are continued to full blocks."""
        block = self.config.unshuffle
        beyond = -pictures.shape[3] % block, -pictures.shape[2] % block
        pictures = F.pad(pictures, (0, beyond[0], 0, beyond[1]), mode="replicate") if any(beyond) else pictures
        dtype = next(self.parameters()).dtype
        x = F.pixel_unshuffle(pictures.to(dtype), block)
        return self.adapter(x.contiguous(memory_format=torch.channels_last))
