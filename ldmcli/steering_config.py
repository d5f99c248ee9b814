"""Frozen descriptions of what steers a model by pictures: control networks and image prompts."""

import dataclasses

from ldmcli.config import CrossAttention, UNetConfig


@dataclasses.dataclass(frozen=True)
class IPAdapterConfig:
    """An IP-Adapter for the cross-attentions `places`. `reads` "embedding": a picture's, of which a layer makes
    `tokens`; "patches": what an image encoder has of each of a picture's patches, `resampled` to so many tokens, or as
    many as there are. `image_dim` is the width of either, `dim` and `layers` are of the resampler."""

    reads: str
    image_dim: int
    context_dim: int
    places: tuple[CrossAttention, ...]
    tokens: int = 4
    resampled: bool = False
    dim: int = 0
    layers: int = 0
    heads: int = 0
    inner: int = 0


@dataclasses.dataclass(frozen=True)
class ImageEncoderConfig:
    """A CLIP vision tower for square pictures of `image_size` pixels, with its projection."""

    hidden_size: int
    intermediate_size: int
    projection_dim: int
    layers: int
    heads: int
    image_size: int = 224
    patch_size: int = 14
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5

    def width(self, reads: str) -> int:
        """How wide what an IP-Adapter reads of it is."""
        return self.projection_dim if reads == "embedding" else self.hidden_size


@dataclasses.dataclass(frozen=True)
class ControlConfig:
    """A control network for a U-Net whose skips and middle have `outputs` channels; its own `encoder` may be narrower.
    It shrinks a picture's sides by 2 ** (len(hint_channels) - 1). `types` of pictures are told apart by a Union
    network, 0 by others. `pooled` residuals are means over all pixels."""

    encoder: UNetConfig
    outputs: tuple[int, ...]
    hint_planes: int = 3
    hint_channels: tuple[int, ...] = (16, 32, 96, 256)
    types: int = 0
    type_dim: int = 0
    union_layers: int = 0
    pooled: bool = False

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.hint_channels) - 1)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A T2I-Adapter: `channels` of its maps, from the finest on, of pictures of so many `planes`, each `unshuffle`
    pixels of a side in one; the levels in `halving` halve the size first."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    planes: int = 3
    unshuffle: int = 8
    resnets: int = 2
    halving: tuple[int, ...] = (1, 2, 3)
    light: bool = False
