"""Small networks for conditions other than prompts: class labels, semantic maps, embeddings of pictures. Keys are the
original code's."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmcli.condition_config import ClassesConfig, ImageEmbeddingConfig, MapConfig


class ClassEmbedder(nn.Module):
    """Class labels to contexts of one token (Rombach et al. 2022, section 4.1)."""

    def __init__(self, config: ClassesConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.classes, config.hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        """(batch, 1, hidden_size) of whole numbers (batch,)."""
        return self.embedding(labels)[:, None]


class MapEncoder(nn.Module):
    """Semantic maps to channels that join the latents (Rombach et al. 2022, section 4.3.2).

    The original halves one-hot maps and then mixes their channels; both are linear, so here each pixel's class is mixed
    first, which needs a sixtieth of the memory.
    """

    def __init__(self, config: MapConfig) -> None:
        super().__init__()
        self.halvings = config.halvings
        self.channel_mapper = nn.Conv2d(config.classes, config.channels, 1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """(batch, channels, height, width) of class numbers, whole (batch, height · 2ⁿ, width · 2ⁿ); those that are
        none of the classes are zeros in every channel."""
        weight = self.channel_mapper.weight.flatten(1)  # (channels, classes)
        known = (maps >= 0) & (maps < weight.shape[1])
        table = torch.cat([weight.T, weight.new_zeros(1, len(weight))])
        x = F.embedding(torch.where(known, maps, weight.shape[1]), table).permute(0, 3, 1, 2)
        for _ in range(self.halvings):
            x = F.interpolate(x, scale_factor=0.5, mode="bilinear")
        return x


class EmbeddingNoiser(nn.Module):
    """Noise on embeddings of pictures, in units of the deviation that those have (Ramesh et al. 2022, unCLIP)."""

    def __init__(self, config: ImageEmbeddingConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.mean = nn.Parameter(torch.zeros(1, width)) if config.statistics else None
        self.std = nn.Parameter(torch.ones(1, width)) if config.statistics else None

    def forward(self, embeddings: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Embeddings (batch, hidden_size) with so much noise that the share `level` of their variance is left."""
        mean, std = (0.0, 1.0) if self.mean is None or self.std is None else (self.mean, self.std)
        return (level.sqrt() * ((embeddings - mean) / std) + (1 - level).sqrt() * noise) * std + mean
