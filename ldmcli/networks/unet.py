"""The cross-attention U-Net that predicts the noise in a latent (Rombach et al. 2022). Keys are diffusers' names."""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmcli.config import UNetConfig
from ldmcli.networks.attention import KeysValues
from ldmcli.networks.layers import Downsample, ResnetBlock, Upsample
from ldmcli.networks.transformer import SpatialTransformer

BlockContext = list[list[KeysValues]]  # per attention of a block, per transformer layer
UNetContext = list[BlockContext]  # per block: down blocks, the middle, up blocks


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


class Block(nn.Module):
    """One level, on the way down, in the middle or on the way up: resnets, each but maybe the first with attention."""

    def __init__(
        self, config: UNetConfig, level: int, channels: list[tuple[int, int]], attentions: int, layers: int
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(
                into,
                out,
                groups=config.norm_groups,
                eps=config.norm_eps,
                time_channels=4 * config.block_channels[0],
            )
            for into, out in channels
        )
        self.attentions = nn.ModuleList(
            SpatialTransformer(
                channels[-1][1],
                config.heads[level],
                layers,
                config.context_dim,
                config.norm_groups,
                linear_projection=config.linear_projection,
            )
            for _ in range(attentions if layers else 0)
        )

    def project_context(self, context: Tensor) -> BlockContext:
        """Cross-attention keys and values of each attention of the block."""
        return [cast(SpatialTransformer, attention).project_context(context) for attention in self.attentions]


class DownBlock(Block):
    """Resnets with attention, then half the size; every output is kept for the way up."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        out = config.block_channels[level]
        into = config.block_channels[max(level - 1, 0)]
        count = config.layers_per_block
        channels = [(into if i == 0 else out, out) for i in range(count)]
        super().__init__(config, level, channels, count, config.attention[level])
        last = level == len(config.block_channels) - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out)])

    def forward(self, x: Tensor, time: Tensor, context: BlockContext, skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[i](x, context[i])
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
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
        self.upsamplers = nn.ModuleList([] if level == 0 else [Upsample(out)])

    def forward(self, x: Tensor, time: Tensor, context: BlockContext, skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips.pop()], dim=1), time)
            if self.attentions:
                x = self.attentions[i](x, context[i])
        for upsample in self.upsamplers:
            # Sizes that do not halve evenly on the way down come back to exactly what they were.
            x = upsample(x, tuple(skips[-1].shape[2:]))
        return x


class UNet(nn.Module):
    """Noise prediction from latents, time and text.

    The two inputs that do not depend on the latents are computed apart, so that a run does them once: `embed_time` for
    all its steps, `project_context` for its prompts.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        first, levels = config.block_channels[0], range(len(config.block_channels))
        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_embedding = TimeEmbedding(first, 4 * first, config.guidance_dim)
        added = config.pooled_dim + config.added_numbers * config.added_number_dim
        self.add_embedding = TimeEmbedding(added, 4 * first) if added else None
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in levels)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, first, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)

    def embed_time(self, timesteps: Tensor, guidance_scale: float = 1.0) -> Tensor:
        """Embeddings (n, 4 · block_channels[0]) of time steps (n,). A model distilled from guided ones is told the
        `guidance_scale` too (Luo et al. 2023, "Latent Consistency Models")."""
        config, dtype = self.config, self.conv_in.weight.dtype
        waves = timestep_waves(timesteps, config.block_channels[0], config.flip_sin_to_cos, config.freq_shift)
        guidance = None
        if config.guidance_dim:
            # In thousandths and less 1, as such models are trained; sines first and spaced as Vaswani et al. do.
            scale = torch.full((1,), 1000.0 * (guidance_scale - 1.0), device=timesteps.device)
            guidance = timestep_waves(scale, config.guidance_dim, False, 1.0).to(dtype)
        return self.time_embedding(waves.to(dtype), guidance)

    def embed_added(self, pooled: Tensor, numbers: Tensor) -> Tensor:
        """What SDXL adds to every time embedding, (batch, 4 · block_channels[0]): of pooled prompts (batch, pooled_dim)
        and picture sizes (batch, added_numbers), Podell et al. 2023, section 2.2."""
        assert self.add_embedding is not None
        waves = timestep_waves(
            numbers.flatten(), self.config.added_number_dim, self.config.flip_sin_to_cos, self.config.freq_shift
        )
        added = torch.cat([pooled, waves.unflatten(0, numbers.shape).flatten(1).to(pooled.dtype)], dim=1)
        return self.add_embedding(added.to(self.conv_in.weight.dtype))

    def project_context(self, context: Tensor) -> UNetContext:
        """Cross-attention keys and values for a text context (batch, tokens, context_dim)."""
        blocks = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [block.project_context(context) for block in blocks]

    def forward(self, latents: Tensor, time_embedding: Tensor, context: UNetContext) -> Tensor:
        """Prediction (batch, out_channels, height, width) for latents (batch, in_channels, height, width).

        `time_embedding` is (batch, …) or (1, …) from `embed_time`; `context` comes from `project_context`.
        """
        time = F.silu(time_embedding)  # every resnet starts with this activation: once is enough
        contexts = iter(context)
        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, time, next(contexts), skips)
        x = self.mid_block(x, time, next(contexts))
        for block in self.up_blocks:
            x = block(x, time, next(contexts), skips)
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))


def timestep_waves(timesteps: Tensor, channels: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoids (n, channels) of time steps (n,), in float32 (Vaswani et al. 2017; Ho et al. 2020)."""
    half = channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(exponent / (half - freq_shift))[None, :]
    waves = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(waves, dim=-1), (0, channels % 2))
