"""CLIP's text transformer, from transformers (the only place that imports it)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldmcli.config import TextEncoderConfig
from ldmcli.text.tokenizer import ClipTokenizer, TokenizedPrompt


def build_clip(config: TextEncoderConfig) -> nn.Module:
    """transformers' CLIPTextModel of these dimensions; its weights are as the current default device makes them."""
    from transformers import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel

    return CLIPTextModel(
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
        )
    )


def restore_position_ids(model: nn.Module, device: torch.device) -> None:
    """Give a model that was built on the meta device its position numbers: no checkpoint stores them."""
    for module in model.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor):
            module.position_ids = torch.arange(ids.shape[-1], device=device).expand(1, -1)


class ClipTextEncoder:
    """Prompts to the context that cross-attention reads."""

    def __init__(self, model: nn.Module, tokenizer: ClipTokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def encode(self, prompts: Sequence[TokenizedPrompt]) -> Tensor:
        """Last hidden states after the final norm, (len(prompts), max_length, hidden_size). Padding is attended to, as
        Stable Diffusion 1 was trained."""
        device = next(self.model.parameters()).device
        ids = torch.tensor([prompt.ids for prompt in prompts], dtype=torch.long, device=device)
        return self.model(input_ids=ids).last_hidden_state
