"""CLIP's text transformer, from transformers (the only place that imports it)."""

from typing import Any

import torch
from torch import Tensor, nn

from ldmcli.config import TextEncoderConfig
from ldmcli.text.tokenizer import ClipTokenizer


def build_clip(config: TextEncoderConfig) -> nn.Module:
    """transformers' CLIP text model of these dimensions, with its projection where the configuration has one; its
    weights are as the current default device makes them."""
    from transformers import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

    build = CLIPTextModelWithProjection if config.projection_dim else CLIPTextModel
    return build(
        CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.max_length,
            hidden_act=config.activation,
            layer_norm_eps=config.norm_eps,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            projection_dim=config.projection_dim or config.hidden_size,
        )
    )


def restore_position_ids(model: nn.Module, device: torch.device) -> None:
    """Give a model that was built on the meta device its position numbers: no checkpoint stores them."""
    for module in model.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor):
            module.position_ids = torch.arange(ids.shape[-1], device=device).expand(1, -1)


class ClipTextEncoder:
    """Token ids to the context that cross-attention reads."""

    def __init__(self, model: Any, tokenizer: ClipTokenizer, config: TextEncoderConfig) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._config = config

    @torch.inference_mode()
    def encode(self, ids: Tensor, *, clip_skip: int = 1) -> tuple[Tensor, Tensor | None]:
        """Hidden states (n, max_length, hidden_size) of ids (n, max_length), and the projected end mark
        (n, projection_dim) where the model has that. `clip_skip` 1 takes the layer the family uses, 2 the one before.
        Padding is attended to, as Stable Diffusion was trained."""
        ids = ids.to(next(self.model.parameters()).device)
        skipped = self._config.skipped_layers + clip_skip - 1
        out = self.model(input_ids=ids, output_hidden_states=bool(skipped) or not self._config.final_norm)
        pooled = out.text_embeds if self._config.projection_dim else None
        if not skipped and self._config.final_norm:
            return out.last_hidden_state, pooled
        states = out.hidden_states[-1 - skipped]
        if self._config.final_norm:
            text_model = self.model.text_model if self._config.projection_dim else self.model
            states = text_model.final_layer_norm(states)
        return states, pooled
