"""The spatial transformer: every pixel attends to all pixels and to the text (Rombach et al. 2022, section 3.3)."""

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from ldmcli.networks.attention import Attention, KeysValues


class GEGLU(nn.Module):
    """A linear layer whose one half gates the other through GELU (Shazeer 2020)."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Index 1 is a dropout in the original; it holds no weights and does nothing at inference.
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward layer, each behind a layer norm and added to its input."""

    def __init__(self, channels: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_channels=context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def project(self, context: Tensor) -> KeysValues:
        """Keys and values of context (batch, tokens, context_dim), for `forward`."""
        return self.attn2.project(context)

    def forward(self, x: Tensor, context: KeysValues) -> Tensor:
        """x: (batch, tokens, channels); context: the keys and values that `project` gave."""
        normed = self.norm1(x)
        first, second = self.read(normed, context)
        x = x + self.attn1(normed, first)
        x = x + self.attn2(self.norm2(x), second)
        return x + self.ff(self.norm3(x))

    def read(self, normed: Tensor, context: KeysValues) -> tuple[KeysValues, KeysValues]:
        """What the first and the second attention attend to, of the normed input and what `project` gave."""
        return self.attn1.project(normed), context


class CrossTransformerBlock(TransformerBlock):
    """A transformer block whose first attention is to the context too. Its keys and values come first in what `project`
    gives."""

    def __init__(self, channels: int, heads: int, context_dim: int) -> None:
        super().__init__(channels, heads, context_dim)
        self.attn1 = Attention(channels, heads, context_channels=context_dim)

    def project(self, context: Tensor) -> KeysValues:
        return (*self.attn1.project(context), *super().project(context))

    def read(self, normed: Tensor, context: KeysValues) -> tuple[KeysValues, KeysValues]:
        return context[:2], context[2:]


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (batch, channels, height, width), added to it."""

    def __init__(
        self,
        channels: int,
        heads: int,
        layers: int,
        context_dim: int,
        groups: int,
        *,
        linear_projection: bool,
        only_cross: bool = False,
    ) -> None:
        super().__init__()
        block = CrossTransformerBlock if only_cross else TransformerBlock
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(block(channels, heads, context_dim) for _ in range(layers))
        self.proj_out = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)

    def project_context(self, context: Tensor) -> list[KeysValues]:
        """Cross-attention keys and values of each layer for context (batch, tokens, context_dim)."""
        return [cast(TransformerBlock, block).project(context) for block in self.transformer_blocks]

    def forward(self, x: Tensor, context: list[KeysValues]) -> Tensor:
        linear = self.linear_projection  # a product of tokens, else a convolution of the map
        h = self.norm(x) if linear else self.proj_in(self.norm(x))
        h = h.permute(0, 2, 3, 1).flatten(1, 2)  # (batch, height·width, channels)
        h = self.proj_in(h) if linear else h
        for block, keys_values in zip(self.transformer_blocks, context, strict=True):
            h = block(h, keys_values)
        h = self.proj_out(h) if linear else h
        h = h.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return (h if linear else self.proj_out(h)) + x
