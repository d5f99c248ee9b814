"""A CLIP text transformer with its tokenizer, as prompts are encoded with."""

import torch
from torch import Tensor

from ldmcli.conditioning.tokenizer import ClipTokenizer
from ldmcli.networks.clip import TextTransformer


class ClipTextEncoder:
    """A TextEncoder (see `text.conditioning`); it computes the pooled projection only where `pooled`."""

    def __init__(self, model: TextTransformer, tokenizer: ClipTokenizer, *, pooled: bool = True) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._pooled = pooled

    @torch.inference_mode()
    def encode(self, ids: Tensor, *, clip_skip: int = 1) -> tuple[Tensor, Tensor | None]:
        """As TextEncoder.encode; the results are on the model's device."""
        device = self.model.final_layer_norm.weight.device
        return self.model(ids.to(device), clip_skip=clip_skip, pooled=self._pooled)
