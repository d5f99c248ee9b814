"""IP-Adapter: a picture becomes tokens that a U-Net attends to beside its prompt's, by keys and values of their own
(Ye et al. 2023). Keys are the authors' names."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmcli.config import UNetConfig
from ldmcli.networks.attention import KeysValues
from ldmcli.networks.unet import UNetContext
from ldmcli.steering_config import IPAdapterConfig

_HEAD = 64  # numbers in a head of a resampler


class EmbeddingTokens(nn.Module):
    """Tokens of a picture's embedding (batch, image_dim)."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.tokens = config.tokens
        self.proj = nn.Linear(config.image_dim, config.tokens * config.context_dim)
        self.norm = nn.LayerNorm(config.context_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).unflatten(-1, (self.tokens, -1)))


class PatchTokens(nn.Module):
    """A token of each of a picture's patches (batch, patches, image_dim)."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        width, out = config.image_dim, config.context_dim
        self.proj = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, out), nn.LayerNorm(out))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class PerceiverAttention(nn.Module):
    """Latents attend to patches and to themselves (Alayrac et al. 2022, Flamingo)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * _HEAD, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * _HEAD, bias=False)
        self.to_out = nn.Linear(heads * _HEAD, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm2(latents)
        keys_values = self.to_kv(torch.cat([self.norm1(x), latents], dim=1))
        query, key, value = (
            part.unflatten(-1, (-1, _HEAD)).transpose(1, 2)
            for part in (self.to_q(latents), *keys_values.chunk(2, dim=-1))
        )
        return self.to_out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def _feed_forward(dim: int, inner: int) -> nn.Sequential:
    wide, narrow = nn.Linear(dim, inner, bias=False), nn.Linear(inner, dim, bias=False)
    return nn.Sequential(nn.LayerNorm(dim), wide, nn.GELU(), narrow)


class ResampledTokens(nn.Module):
    """Fewer tokens than there are patches (batch, patches, image_dim): latents that attend to those."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        dim = config.dim
        self.latents = nn.Parameter(torch.zeros(1, config.tokens, dim))
        self.proj_in = nn.Linear(config.image_dim, dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(dim, config.heads), _feed_forward(dim, config.inner)])
            for _ in range(config.layers)
        )
        self.proj_out = nn.Linear(dim, config.context_dim)
        self.norm_out = nn.LayerNorm(config.context_dim)

    def forward(self, x: Tensor) -> Tensor:
        x, latents = self.proj_in(x), self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            attention, feed_forward = cast(nn.ModuleList, layer)
            latents = latents + attention(x, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))


class OwnKeysValues(nn.Module):
    """Keys and values of one cross-attention."""

    def __init__(self, context_dim: int, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_k_ip = nn.Linear(context_dim, channels, bias=False)
        self.to_v_ip = nn.Linear(context_dim, channels, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        key, value = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.to_k_ip, self.to_v_ip)
        )
        return key, value


class IPAdapter(nn.Module):
    """Makes tokens of what an image encoder gives, and of those keys and values for each cross-attention."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.config = config
        made = EmbeddingTokens if config.reads == "embedding" else ResampledTokens if config.resampled else PatchTokens
        self.image_proj = made(config)
        # Numbered among all attentions, in which every cross-attention follows a self-attention.
        self.ip_adapter = nn.ModuleDict(
            {
                str(2 * i + 1): OwnKeysValues(config.context_dim, place.channels, place.heads)
                for i, place in enumerate(config.places)
            }
        )

    def tokens(self, features: Tensor) -> Tensor:
        """Tokens (batch, tokens, context_dim) of what the image encoder gave."""
        return self.image_proj(features)

    def keys_values(self, tokens: Tensor, weights: Mapping[str, Tensor], unet: UNetConfig) -> UNetContext:
        """For every cross-attention of `unet` key, value and weight; nothing for transformers that `weights` does not
        name."""
        found: dict[str, list[KeysValues]] = {}
        for place, own in zip(self.config.places, self.ip_adapter.values(), strict=True):
            weight = weights.get(place.transformer)
            found.setdefault(place.transformer, []).append(() if weight is None else (*own(tokens), weight))
        return as_context(found, unet)


def as_context(found: Mapping[str, Sequence[KeysValues]], unet: UNetConfig) -> UNetContext:
    """What there is for each transformer, in the order of a U-Net's blocks."""
    levels, count = range(len(unet.block_channels)), unet.layers_per_block
    blocks = [(f"down_blocks.{i}", count) for i in levels] + [("mid_block", 1)]
    blocks += [(f"up_blocks.{i}", count + 1) for i in levels]
    named = [[f"{block}.attentions.{i}" for i in range(each)] for block, each in blocks]
    return [[list(found[name]) for name in names if name in found] for names in named]
