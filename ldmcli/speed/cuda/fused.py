"""A U-Net or VAE that computes with this program's own GPU kernels. Same numbers, but for rounding, of which there is
less: what is fused is rounded once.

Group norms with SiLU, sums with their layer norm and gates are kernels of their own. The bias of a convolution goes
into what follows it, since cuDNN adds it in a pass of its own. What a kernel does not take (on a CPU, not channels
last), torch computes by the same formula.
"""

import functools
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmcli.background import in_background
from ldmcli.networks.attention import Attention, KeysValues
from ldmcli.networks.layers import ResnetBlock
from ldmcli.networks.transformer import GEGLU, CrossTransformerBlock, SpatialTransformer, TransformerBlock
from ldmcli.networks.unet import Encoder
from ldmcli.speed.cuda.kernels import add_and_norm, add_bias_residual, few_pixels, geglu, group_norm_silu
from ldmcli.speed.modules import recast, replaced

_WIDEST_LARGE = 1024  # channels of the widest large maps that real models norm


def fuse(module: nn.Module) -> nn.Module:
    """`module` with layers that compute with the kernels, where its tensors are on a GPU; for inference alone."""
    kinds: dict[type[nn.Module], type[nn.Module]] = {
        nn.GroupNorm: FusedGroupNorm,
        ResnetBlock: FusedResnetBlock,
        GEGLU: FusedGEGLU,
        TransformerBlock: FusedTransformerBlock,
        CrossTransformerBlock: FusedCrossTransformerBlock,
        SpatialTransformer: FusedSpatialTransformer,
    }

    def make(part: nn.Module) -> nn.Module | None:
        return recast(kinds[type(part)], part) if type(part) in kinds else None

    return replaced(module, make)


def compile_ahead(module: nn.Module, device: torch.device, dtype: torch.dtype, pixels: Sequence[int]) -> None:
    """Have Triton compile, all at once, the kernels that `module` will launch once it is fused and has weights of
    `dtype` on `device`, for maps of so many `pixels`: it takes a third of a second each, and in the first step they
    would come one by one. The module may be on meta."""

    def map_of(channels: int, count: int) -> Tensor:
        return torch.zeros((1, channels, 1, count), device=device, dtype=dtype).to(memory_format=torch.channels_last)

    def norm(channels: int, groups: int, count: int) -> None:
        weight = torch.zeros(channels, device=device, dtype=dtype)
        group_norm_silu(map_of(channels, count), groups, weight, weight, 1e-5)

    def sums(channels: int) -> None:
        x, bias = (torch.zeros(shape, device=device, dtype=dtype) for shape in ((1, 1, channels), (channels,)))
        add_and_norm(x, bias, x.clone(), bias, bias, 1e-5)

    launches: dict[object, Callable[[], object]] = {}
    for part in module.modules():
        if isinstance(part, nn.GroupNorm):
            for count in {few_pixels(count) for count in (1, *pixels)}:
                # One that is compiled for a width of groups does for all channels; and wide maps have few.
                key = part.num_channels // part.num_groups, count
                if count == 1 or part.num_channels <= _WIDEST_LARGE:
                    launches[key] = functools.partial(norm, part.num_channels, part.num_groups, count)
        elif isinstance(part, nn.LayerNorm):
            launches[part.normalized_shape] = functools.partial(sums, part.normalized_shape[0])
        elif isinstance(part, GEGLU):
            launches[GEGLU] = lambda: geglu(torch.zeros((1, 512), device=device, dtype=dtype))
        elif isinstance(part, ResnetBlock):
            launches[ResnetBlock] = lambda: add_bias_residual(map_of(64, 1), map_of(64, 1).flatten(), map_of(64, 1))
    for future in [in_background(launch, "compile a kernel") for launch in launches.values()]:
        future.result()


def in_planes(unet: Encoder) -> nn.Module:
    """`unet` as torch's own norms want it on a GPU, where they take no other layout: maps lie plane by plane."""
    unet.to(memory_format=torch.contiguous_format)
    first = unet.conv_in
    return replaced(unet, lambda part: recast(PlanesConv2d, part) if part is first else None)


class PlanesConv2d(nn.Conv2d):
    """A convolution after which maps lie plane by plane, however its input does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous())


class FusedGroupNorm(nn.GroupNorm):
    """A group norm by the kernel, without an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, activate=False)


class FusedResnetBlock(ResnetBlock):
    """A resnet block of two convolutions, two norms and a sum. What is added to a channel between the convolutions, the
    first one's bias too, goes into the second norm; the last one's bias goes into the sum."""

    def forward(self, x: Tensor, activated_time: Tensor | None = None) -> Tensor:
        shift = _bias(self.conv1)[None]
        if self.time_emb_proj is not None:
            shift = shift + self.time_emb_proj(activated_time)
        h = _convolved(self.conv1, _activated(self.norm1, x))
        h = _convolved(self.conv2, _activated(self.norm2, h, shift))
        if self.conv_shortcut is None:
            return add_bias_residual(h, _bias(self.conv2), x)
        return add_bias_residual(h, _bias(self.conv2), _convolved(self.conv_shortcut, x), _bias(self.conv_shortcut))


class FusedGEGLU(GEGLU):
    """A gated layer whose gate is one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x))


Sum = tuple[Tensor, Tensor, Tensor | None]  # tokens (batch, tokens, channels), a bias, and tokens if there are any


class FusedTransformerBlock(TransformerBlock):
    """A transformer block whose sums are one kernel with the layer norms that follow. Its input is a `Sum` that is
    still to be added up, and so is its output."""

    def forward(self, x: Sum, context: KeysValues) -> Sum:  # type: ignore[override]
        h, normed = _normed(x, self.norm1)
        first, second = self.read(normed, context)
        h, normed = _normed(_attended(self.attn1, normed, first, h), self.norm2)
        h, normed = _normed(_attended(self.attn2, normed, second, h), self.norm3)
        last = cast(nn.Linear, self.ff.net[2])
        return F.linear(self.ff.net[0](normed), last.weight), _bias(last), h


class FusedCrossTransformerBlock(FusedTransformerBlock, CrossTransformerBlock):
    """The same where both attentions are to the context."""


class FusedSpatialTransformer(SpatialTransformer):
    """A spatial transformer whose first and last layer are products, whatever they are stored as, and leave their bias
    to the sum that follows."""

    def forward(self, x: Tensor, context: list[KeysValues]) -> Tensor:
        h = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (batch, height·width, channels)
        tokens: Sum = F.linear(h, self.proj_in.weight.flatten(1)), _bias(self.proj_in), None
        for block, keys_values in zip(self.transformer_blocks, context, strict=True):
            tokens = block(tokens, keys_values)
        h, bias, residual = tokens
        h = h + bias if residual is None else add_bias_residual(h, bias, residual)
        h = F.linear(h, self.proj_out.weight.flatten(1)).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return add_bias_residual(h, _bias(self.proj_out), x)


def _activated(norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None) -> Tensor:
    """SiLU of the norm of x + shift."""
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, shift=shift)


def _normed(x: Sum, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """The sum, and its norm."""
    return add_and_norm(*x, norm.weight, norm.bias, norm.eps)


def _attended(attention: Attention, normed: Tensor, context: KeysValues, x: Tensor) -> Sum:
    """x and what attention gives."""
    last = cast(nn.Linear, attention.to_out[0])
    return F.linear(attention.attended(normed, context), last.weight), _bias(last), x


def _convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution without its bias, in memory of its own."""
    assert isinstance(conv.padding, tuple)
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def _bias(layer: nn.Module) -> Tensor:
    assert isinstance(layer.bias, Tensor)
    return layer.bias
