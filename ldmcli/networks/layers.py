"""The convolutional pieces that U-Net and VAE share. All take and return (batch, channels, height, width)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResnetBlock(nn.Module):
    """Two convolutions with group norm and SiLU, around which the input is added back (He et al. 2015).

    With `time_channels` the block reads the time step: a projection of its embedding is added between the two.
    """

    def __init__(
        self, channels: int, out_channels: int, *, groups: int, eps: float, time_channels: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time_emb_proj: nn.Module | None = None
        if time_channels is not None:
            self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor, activated_time: Tensor | None = None) -> Tensor:
        """`activated_time` is SiLU(time embedding), (batch or 1, time_channels)."""
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(activated_time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class ScaleShiftResnet(ResnetBlock):
    """A resnet block that may double the size by nearest neighbour, or halve it by means, before its first
    convolution, where `resampling` is "up" or "down"; and that, where `scale_shift`, is scaled and shifted by what it
    makes of the time step behind its second norm (Dhariwal and Nichol 2021, section 3)."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        *,
        groups: int,
        eps: float,
        time_channels: int,
        scale_shift: bool = False,
        resampling: str = "",
    ) -> None:
        super().__init__(channels, out_channels, groups=groups, eps=eps, time_channels=time_channels)
        self.scale_shift, self.resampling = scale_shift, resampling
        if scale_shift:
            self.time_emb_proj = nn.Linear(time_channels, 2 * out_channels)

    def forward(self, x: Tensor, activated_time: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """As a ResnetBlock; one that doubles may grow to exactly `size`."""
        assert self.time_emb_proj is not None
        h = self._resampled(F.silu(self.norm1(x), inplace=True), size)
        h = self.conv1(h)
        time = self.time_emb_proj(activated_time)[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        h = self.conv2(F.silu(h, inplace=True))
        x = self._resampled(x, size)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))

    def _resampled(self, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        if self.resampling == "down":
            return F.avg_pool2d(x, 2, ceil_mode=True)
        if self.resampling == "up":
            return F.interpolate(x, size=size or (2 * x.shape[2], 2 * x.shape[3]), mode="nearest")
        return x


class Downsample(nn.Module):
    """Halve height and width with a strided convolution; `pad_end` pads only right and bottom, as SD's VAE does."""

    def __init__(self, channels: int, *, pad_end: bool = False) -> None:
        super().__init__()
        self.pad_end = pad_end
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if pad_end else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad_end else x)


class Upsample(nn.Module):
    """Double height and width by nearest neighbour, or grow to exactly `size`, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None or size == (2 * x.shape[2], 2 * x.shape[3]):
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def sinusoids(numbers: Tensor, channels: int, flip_sin_to_cos: bool = True, freq_shift: float = 0.0) -> Tensor:
    """Sinusoids (n, channels) of time steps or sizes (n,), in float32 (Vaswani et al. 2017; Ho et al. 2020)."""
    half = channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=numbers.device)
    angles = numbers.float()[:, None] * torch.exp(exponent / (half - freq_shift))[None, :]
    waves = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(waves, dim=-1), (0, channels % 2))
