"""OpenCLIP's text tower, from open_clip (the only place that imports it), for files that have its keys."""

from typing import Any

import torch
from torch import Tensor, nn

from ldmcli.config import TextEncoderConfig
from ldmcli.text.tokenizer import ClipTokenizer


def build_openclip(config: TextEncoderConfig) -> nn.Module:
    """open_clip's TextTransformer of these dimensions; its weights are as the current default device makes them."""
    from open_clip.transformer import TextTransformer

    return TextTransformer(
        context_length=config.max_length,
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        heads=config.heads,
        layers=config.layers,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        output_dim=config.projection_dim,
    )


def restore_mask(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Give a tower that was built on the meta device its causal mask: no checkpoint stores it."""
    size = model.attn_mask.shape[0]
    model.attn_mask = torch.full((size, size), float("-inf"), device=device, dtype=dtype).triu_(1)


class OpenClipTextEncoder:
    """Token ids to the context that cross-attention reads."""

    def __init__(self, model: Any, tokenizer: ClipTokenizer, config: TextEncoderConfig) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._config = config

    @torch.inference_mode()
    def encode(self, ids: Tensor, *, clip_skip: int = 1) -> tuple[Tensor, Tensor | None]:
        """Hidden states (n, max_length, hidden_size) of ids (n, max_length), and the projected end mark
        (n, projection_dim) where the tower has that. `clip_skip` 1 takes the layer the family uses, 2 the one before.
        """
        model = self.model
        ids = ids.to(model.positional_embedding.device)
        chosen = len(model.transformer.resblocks) - self._config.skipped_layers - clip_skip + 1
        x = states = model.token_embedding(ids) + model.positional_embedding
        for number, block in enumerate(model.transformer.resblocks, start=1):
            x = block(x, attn_mask=model.attn_mask)
            if number == chosen:
                states = x
        if self._config.final_norm:
            states = model.ln_final(states)
        if self._config.projection_dim is None:
            return states, None
        # The end mark has the highest id of all tokens.
        ends = model.ln_final(x)[torch.arange(len(ids), device=x.device), ids.argmax(dim=-1)]
        return states, ends @ model.text_projection
