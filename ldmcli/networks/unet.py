"""The U-Net that predicts the noise in a latent (Rombach et al. 2022). Keys are diffusers' names."""

import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmcli.config import UNetConfig
from ldmcli.networks.attention import KeysValues, PixelAttention
from ldmcli.networks.inputs import Conditioning
from ldmcli.networks.layers import Downsample, ResnetBlock, ScaleShiftResnet, Upsample, sinusoids
from ldmcli.networks.transformer import SpatialTransformer
from ldmcli.sampling.denoiser import Model
from ldmcli.sampling.noise import to_device
from ldmcli.sampling.schedule import Step, at

BlockContext = list[list[KeysValues]]  # per attention of a block, per transformer layer
UNetContext = list[BlockContext]  # per block: down blocks, the middle, up blocks
Prepared = tuple[Tensor, UNetContext]  # time embeddings (steps, 1 or batch, width); keys and values of the prompts


class Residuals(NamedTuple):
    """What is added inside a U-Net: to every skip, from the finest on, and to the middle (Zhang et al. 2023,
    ControlNet); `inner`: to what leaves each level on the way down, and after those the middle (Mou et al. 2023,
    T2I-Adapter)."""

    skips: Sequence[Tensor] = ()
    middle: Tensor | None = None
    inner: Sequence[Tensor] = ()


_NONE = Residuals()


def combined(
    one: UNetContext, other: UNetContext, combine: Callable[[KeysValues, KeysValues], KeysValues]
) -> UNetContext:
    """What `combine` makes of what both have for each cross-attention."""
    return [
        [[combine(*each) for each in zip(*layers, strict=True)] for layers in zip(*block, strict=True)]
        for block in zip(one, other, strict=True)
    ]


class TimeEmbedding(nn.Module):
    """Two linear layers over sinusoids of the time step, to which those of a guidance scale may be added first."""

    def __init__(self, channels: int, time_channels: int, guidance_channels: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, time_channels)
        self.linear_2 = nn.Linear(time_channels, time_channels)
        self.cond_proj = nn.Linear(guidance_channels, channels, bias=False) if guidance_channels else None

    def forward(self, x: Tensor, guidance: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and guidance is not None:
            x = x + self.cond_proj(guidance)
        return self.linear_2(F.silu(self.linear_1(x)))


class SelfAttention(PixelAttention):
    """Attention of a map to itself in a U-Net without a context."""

    def project_context(self, context: Tensor | None) -> list[KeysValues]:
        """Nothing: no context is read."""
        return []

    def forward(self, x: Tensor, context: list[KeysValues]) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Block(nn.Module):
    """One level, on the way down, in the middle or on the way up: resnets, each but maybe the first with attention."""

    def __init__(
        self, config: UNetConfig, level: int, channels: list[tuple[int, int]], attentions: int, layers: int
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_resnet(config, into, out) for into, out in channels)
        width = channels[-1][1]
        self.attentions = nn.ModuleList(
            _attention(config, level, width, layers, middle=isinstance(self, MidBlock))
            for _ in range(attentions if layers else 0)
        )

    def project_context(self, context: Tensor | None) -> BlockContext:
        """Cross-attention keys and values of each attention of the block."""
        return [cast(SelfAttention, attention).project_context(context) for attention in self.attentions]


def _resnet(config: UNetConfig, into: int, out: int, resampling: str = "") -> ResnetBlock:
    time = 4 * config.block_channels[0]
    if not (config.scale_shift or resampling):
        return ResnetBlock(into, out, groups=config.norm_groups, eps=config.norm_eps, time_channels=time)
    return ScaleShiftResnet(
        into,
        out,
        groups=config.norm_groups,
        eps=config.norm_eps,
        time_channels=time,
        scale_shift=config.scale_shift,
        resampling=resampling,
    )


def _attention(config: UNetConfig, level: int, width: int, layers: int, *, middle: bool) -> nn.Module:
    heads, groups = config.heads[level], config.norm_groups
    if not config.context_dim:
        return SelfAttention(width, groups, heads, eps=config.norm_eps)
    only_cross = bool(config.only_cross_attention) and config.only_cross_attention[level] and not middle
    return SpatialTransformer(
        width,
        heads,
        layers,
        config.context_dim,
        groups,
        linear_projection=config.linear_projection,
        only_cross=only_cross,
    )


class DownBlock(Block):
    """Resnets with attention, then half the size; every output is kept for the way up."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        out = config.block_channels[level]
        into = config.block_channels[max(level - 1, 0)]
        count = config.layers_per_block
        channels = [(into if i == 0 else out, out) for i in range(count)]
        super().__init__(config, level, channels, count, config.attention[level])
        last = level == len(config.block_channels) - 1
        halving = _resnet(config, out, out, "down") if config.resnet_resampling else Downsample(out)
        self.downsamplers = nn.ModuleList([] if last else [halving])

    def forward(
        self, x: Tensor, time: Tensor, context: BlockContext, skips: list[Tensor], inner: Tensor | None = None
    ) -> Tensor:
        """`inner` is added before the size is halved, or after that where the level does not attend: diffusers' way."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[i](x, context[i])
            skips.append(x)
        if inner is not None and self.attentions:
            x = skips[-1] = x + inner
        for downsample in self.downsamplers:
            x = downsample(x, time) if isinstance(downsample, ResnetBlock) else downsample(x)
            skips.append(x)
        if inner is not None and not self.attentions:
            x = skips[-1] = x + inner
        return x


class MidBlock(Block):
    """Resnet, attention, resnet at the coarsest size."""

    def __init__(self, config: UNetConfig) -> None:
        channels = config.block_channels[-1]
        super().__init__(config, len(config.heads) - 1, [(channels, channels)] * 2, 1, config.middle_attention)

    def forward(self, x: Tensor, time: Tensor, context: BlockContext) -> Tensor:
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context[0])
        return self.resnets[1](x, time)


class UpBlock(Block):
    """Resnets that take the kept outputs of the way down, with attention, then double the size."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        levels = config.block_channels
        out = levels[level]
        below = levels[min(level + 1, len(levels) - 1)]
        above = levels[max(level - 1, 0)]
        count = config.layers_per_block + 1
        channels = [((below if i == 0 else out) + (above if i == count - 1 else out), out) for i in range(count)]
        super().__init__(config, level, channels, count, config.attention[level])
        doubling = _resnet(config, out, out, "up") if config.resnet_resampling else Upsample(out)
        self.upsamplers = nn.ModuleList([] if level == 0 else [doubling])

    def forward(self, x: Tensor, time: Tensor, context: BlockContext, skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            if self.attentions:
                x = self.attentions[i](x, context[i])
        for upsample in self.upsamplers:
            # Sizes that do not halve evenly on the way down come back to exactly what they were.
            size = tuple(skips[-1].shape[2:])
            x = upsample(x, time, size) if isinstance(upsample, ResnetBlock) else upsample(x, size)
        return x


class Encoder(nn.Module):
    """The way down and the middle, which a U-Net and a control network have alike.

    What does not depend on the latents is computed apart, once a run: the time embeddings of all steps, and keys and
    values of the prompts.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first, levels = config.block_channels[0], range(len(config.block_channels))
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = TimeEmbedding(first, 4 * first, config.guidance_dim)
        added = config.pooled_dim + config.added_numbers * config.added_number_dim
        self.add_embedding = TimeEmbedding(added, 4 * first) if added else None
        self.class_embedding = nn.Embedding(config.classes, 4 * first) if config.classes else None
        self.time_activation: nn.Module = nn.SiLU()  # every resnet starts with this: once is enough
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in levels)
        self.mid_block = MidBlock(config)

    def prepared(
        self,
        conditioning: Conditioning,
        steps: Sequence[Step],
        guidance_scale: float = 1.0,
        beside: Sequence[UNetContext] = (),
    ) -> Prepared:
        """What a run computes once: time embeddings of all steps, and keys and values of the prompts, behind which are
        those of `beside`."""
        context = self.project_context(conditioning.context)
        for other in beside:
            context = combined(context, other, operator.add)
        timesteps = torch.tensor([step.timestep for step in steps], dtype=torch.float32)
        embeddings = self.embed_time(to_device(timesteps, self.conv_in.weight.device), guidance_scale)
        embeddings = embeddings[:, None]  # (steps, 1, width)
        embed = self.add_embedding or self.class_embedding
        if embed is not None and conditioning.vector is not None:
            embeddings = embeddings + embed(conditioning.vector)  # (steps, batch, width)
        return embeddings, context

    def embed_time(self, timesteps: Tensor, guidance_scale: float = 1.0) -> Tensor:
        """Embeddings (n, 4 · block_channels[0]) of time steps (n,). A model distilled from guided ones reads the
        `guidance_scale` too (Luo et al. 2023, "Latent Consistency Models")."""
        config, dtype = self.config, self.conv_in.weight.dtype
        waves = sinusoids(timesteps, config.block_channels[0], config.flip_sin_to_cos, config.freq_shift)
        guidance = None
        if config.guidance_dim:
            # In thousandths and less 1, as such models are trained; sines first and spaced as Vaswani et al. do.
            scale = torch.full((1,), 1000.0 * (guidance_scale - 1.0), device=timesteps.device)
            guidance = sinusoids(scale, config.guidance_dim, False, 1.0).to(dtype)
        return self.time_embedding(waves.to(dtype), guidance)

    def project_context(self, context: Tensor | None) -> UNetContext:
        """Cross-attention keys and values for a context (batch, tokens, context_dim), where there is any."""
        return [block.project_context(context) for block in self._blocks()]

    def encode(
        self, x: Tensor, time: Tensor, context: UNetContext, inner: Sequence[Tensor] = ()
    ) -> tuple[list[Tensor], Tensor]:
        """The outputs to keep for the way up, from the finest on, and that of the middle; x is what `conv_in` gave,
        `time` the activated embedding. `inner`: see `Residuals`."""
        levels, contexts = len(self.down_blocks), iter(context)
        skips = [x]
        for i, block in enumerate(self.down_blocks):
            x = block(x, time, next(contexts), skips, inner[i] if i < len(inner) else None)
        x = self.mid_block(x, time, next(contexts))
        return skips, x + inner[levels] if len(inner) > levels else x

    def _blocks(self) -> list[Block]:
        return cast(list[Block], [*self.down_blocks, self.mid_block])


class UNet(Encoder):
    """Noise prediction from latents, time and what it is conditioned on."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        first, levels = config.block_channels[0], range(len(config.block_channels))
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, first, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)

    def prepare(
        self,
        conditioning: Conditioning,
        steps: Sequence[Step],
        *,
        guidance_scale: float = 1.0,
        call: Callable[..., Tensor] | None = None,
        hold: Callable[[Prepared], Prepared] = lambda prepared: prepared,
        beside: Sequence[UNetContext] = (),
    ) -> Model:
        """The model of a run: a function of latents (batch, in_channels, height, width) and one of its `steps`, to
        float32. `steps` are all that the run has; `conditioning` is of the batch, in the weights' number type.

        `guidance_scale` is read by models distilled from guided ones alone. `call` computes in place of this module
        (what a compiler made of it); `hold` keeps what was prepared where a recorded graph reads it. `beside` are keys
        and values of pictures, for every cross-attention those that it attends to beside the prompts (`IPAdapter`).
        """
        weight = self.conv_in.weight
        embeddings, context = hold(self.prepared(conditioning, steps, guidance_scale, beside))
        compute = call or self

        def predict(latents: Tensor, step: Step, residuals: Residuals | None = None) -> Tensor:
            latents = latents.to(weight.dtype, memory_format=torch.channels_last)
            more = {} if residuals is None else {"residuals": residuals}
            return compute(latents, at(embeddings, step), context, **more).float()

        return predict

    def forward(
        self, latents: Tensor, time_embedding: Tensor, context: UNetContext, residuals: Residuals = _NONE
    ) -> Tensor:
        """Prediction (batch, out_channels, height, width) for latents (batch, in_channels, height, width).

        `time_embedding` is (batch, …) or (1, …) from `embed_time`; `context` comes from `project_context`.
        """
        time = self.time_activation(time_embedding)
        skips, x = self.encode(self.conv_in(latents), time, context, residuals.inner)
        if residuals.middle is not None:
            skips = [skip + more for skip, more in zip(skips, residuals.skips, strict=True)]
            x = x + residuals.middle
        for block, own in zip(self.up_blocks, context[len(self.down_blocks) + 1 :], strict=True):
            x = block(x, time, own, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))

    def _blocks(self) -> list[Block]:
        return [*super()._blocks(), *cast(list[Block], self.up_blocks)]
