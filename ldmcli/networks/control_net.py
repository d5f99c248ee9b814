"""The control network: a copy of a U-Net's way down that reads a picture and gives what is added inside the U-Net
(Zhang et al. 2023, ControlNet). Keys are diffusers' names."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmcli.networks.inputs import Conditioning
from ldmcli.networks.layers import sinusoids
from ldmcli.networks.unet import Encoder, TimeEmbedding, UNetContext
from ldmcli.sampling.schedule import Step, at
from ldmcli.steering_config import ControlConfig

Hold = Callable[[list[Tensor]], list[Tensor]]
_UNION_HEADS = 8  # of the Union networks' transformer; shapes do not tell


class HintEncoder(nn.Module):
    """Convolutions that bring a picture (batch, 3, height, width) in 0…1 to the size and width of latents."""

    def __init__(self, planes: int, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(planes, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for into, out in itertools.pairwise(channels):
            self.blocks.append(nn.Conv2d(into, into, 3, padding=1))
            self.blocks.append(nn.Conv2d(into, out, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(channels[-1], width, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        x = F.silu(self.conv_in(picture))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class SmallAttention(nn.Module):
    """Attention of a few tokens to each other; its weights lie as nn.MultiheadAttention has them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, width)."""
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = projected.unflatten(-1, (3, _UNION_HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class SmallMLP(nn.Module):
    """Two layers with quick GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))


class SmallTransformer(nn.Module):
    """Attention and a feed-forward layer, each behind a layer norm and added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = SmallAttention(width)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = SmallMLP(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ControlNet(Encoder):
    """Residuals for a U-Net from latents, time, text and a picture.

    With `config.types`, one network for several types of pictures (Union), which is given the type's number.
    """

    def __init__(self, config: ControlConfig) -> None:
        super().__init__(config.encoder)
        self.control = config
        first = config.encoder.block_channels[0]
        widths = config.encoder.skip_channels
        self.controlnet_cond_embedding = HintEncoder(config.hint_planes, config.hint_channels, first)
        *skips, middle = config.outputs
        self.controlnet_down_blocks = nn.ModuleList(
            nn.Conv2d(into, out, 1) for into, out in zip(widths, skips, strict=True)
        )
        self.controlnet_mid_block = nn.Conv2d(widths[-1], middle, 1)
        if config.types:
            self.task_embedding = nn.Parameter(torch.empty(config.types, first))
            self.transformer_layes = nn.ModuleList(SmallTransformer(first) for _ in range(config.union_layers))
            self.spatial_ch_projs = nn.Linear(first, first)
            self.control_add_embedding = TimeEmbedding(config.types * config.type_dim, 4 * first)

    def prepare(
        self,
        conditioning: Conditioning,
        steps: Sequence[Step],
        features: Sequence[Tensor],
        *,
        kind: int = 0,
        halves: int = 1,
        hold: Callable[..., object] = lambda prepared: prepared,
    ) -> Callable[[Tensor, Step], list[Tensor]]:
        """A function of latents (batch, channels, height, width) and one of `steps`, to the residuals for every skip
        and the middle, in the weights' number type. `features` are what `read` gave for the batch; `kind` is the number
        of the pictures' type, and `halves` 2 where the batch holds negative prompts before as many others."""
        embeddings, context = self.prepared(conditioning, steps)
        if self.control.types:
            embeddings = embeddings + self._embed_type(kind, embeddings)
        (embeddings, context, features) = hold((embeddings, context, list(features)))  # type: ignore[misc]
        dtype = self.conv_in.weight.dtype

        def residuals(latents: Tensor, step: Step) -> list[Tensor]:
            latents = latents.to(dtype, memory_format=torch.channels_last)
            return self(latents, at(embeddings, step), context, features, halves)

        return residuals

    def read(self, pictures: Tensor, kind: int = 0) -> list[Tensor]:
        """What the network reads of pictures (batch, planes, height, width) in 0…1, once a run: features of the
        latents' size; of a Union network also a token each, (batch, width)."""
        dtype = self.conv_in.weight.dtype
        features = self.controlnet_cond_embedding(pictures.to(dtype, memory_format=torch.channels_last))
        return [features, features.mean((2, 3)) + self.task_embedding[kind]] if self.control.types else [features]

    def forward(
        self,
        latents: Tensor,
        time_embedding: Tensor,
        context: UNetContext,
        features: Sequence[Tensor],
        halves: int = 1,
    ) -> list[Tensor]:
        """See `prepare`."""
        x = self.conv_in(latents)
        added = features[0]
        if self.control.types:
            added = added + self._shift(x, features[1], halves)[:, :, None, None]
        skips, middle = self.encode(x + added, self.time_activation(time_embedding), context)
        found = [conv(skip) for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        found.append(self.controlnet_mid_block(middle))
        return [each.mean((2, 3), keepdim=True) for each in found] if self.control.pooled else found

    def _embed_type(self, kind: int, like: Tensor) -> Tensor:
        chosen = torch.zeros(self.control.types, device=like.device)
        chosen[kind] = 1
        config = self.config
        waves = sinusoids(chosen, self.control.type_dim, config.flip_sin_to_cos, config.freq_shift)
        return self.control_add_embedding(waves.flatten().to(like))

    def _shift(self, x: Tensor, token: Tensor, halves: int) -> Tensor:
        """What a Union network adds to its features, (batch, width): its transformer relates picture and latents. As
        the network was trained, a token attends to those of its own kind in the batch, which is here of one picture:
        with its negative prompt and with its prompt."""
        tokens = torch.stack([token, x.mean((2, 3))], dim=1)  # (batch, 2, width)
        of_pictures = tokens.unflatten(0, (halves, -1)).permute(1, 2, 0, 3)  # (pictures, 2, halves, width)
        found = of_pictures.flatten(0, 1)
        for layer in self.transformer_layes:
            found = layer(found)
        first = found.unflatten(0, of_pictures.shape[:2])[:, 0]  # (pictures, halves, width)
        return self.spatial_ch_projs(first.transpose(0, 1).flatten(0, 1))
