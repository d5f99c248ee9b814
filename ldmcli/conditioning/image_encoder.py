"""CLIP's vision tower, which says of a picture what IP-Adapters read. The only transformers import."""

from typing import Any

import torch
from torch import Tensor, nn

from ldmcli.steering_config import ImageEncoderConfig


class ImageEncoder(nn.Module):
    """transformers' tower of a configuration. Importing it takes seconds, so that is left until one is made."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        self.config = config
        self.tower: Any = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                projection_dim=config.projection_dim,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                image_size=config.image_size,
                patch_size=config.patch_size,
                hidden_act=config.activation,
                layer_norm_eps=config.norm_eps,
            )
        )

    def complete(self) -> "ImageEncoder":
        """With the numbers of its patches, which no file holds, where its weights are now."""
        embeddings = self.tower.vision_model.embeddings
        weight = embeddings.position_embedding.weight
        embeddings.position_ids = torch.arange(len(weight), device=weight.device)[None]
        return self

    def read(self, pixels: Tensor, reads: str) -> Tensor:
        """Of pixels (batch, 3, image_size, image_size) as CLIP was trained with: for "embedding" that (batch,
        projection_dim), for "patches" the last layer's input (batch, patches + 1, hidden_size)."""
        pixels = pixels.to(self.tower.visual_projection.weight.dtype)
        if reads == "embedding":
            return self.tower(pixels).image_embeds
        return self.tower(pixels, output_hidden_states=True).hidden_states[-2]
