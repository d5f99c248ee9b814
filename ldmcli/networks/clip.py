"""CLIP's text transformer (Radford et al. 2021), which OpenAI and OpenCLIP train alike; and, where tokens may look
ahead, that of the latent diffusion paper (Rombach et al. 2022, section 4.3.1)."""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmcli.config import TextEncoderConfig
from ldmcli.networks.attention import ready_attention


def quick_gelu(x: Tensor) -> Tensor:
    """x σ(1.702 x): OpenAI's approximation to GELU."""
    return x * torch.sigmoid(1.702 * x)


_gelu_tanh = partial(F.gelu, approximate="tanh")
# By transformers' names.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": quick_gelu,
}


class Embeddings(nn.Module):
    """A vector for each token and each position, added."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_length, config.hidden_size)

    def forward(self, ids: Tensor, vectors: Tensor | None = None) -> Tensor:
        """(n, tokens, hidden_size) of ids (n, tokens), tokens ≤ max_length. The id -1 - k stands for the k-th row of
        `vectors` (count, hidden_size)."""
        tokens = self.token_embedding(ids if vectors is None else ids.clamp(min=0))
        if vectors is not None:
            tokens[ids < 0] = vectors[-1 - ids[ids < 0]].to(tokens)
        return tokens + self.position_embedding.weight[: ids.shape[1]]


class TokenAttention(nn.Module):
    """Attention of each token to all; where causal, to itself and those before it."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.heads, self.causal = config.heads, config.causal
        width, bias = config.hidden_size, config.attention_bias
        inner = width if config.head_dim is None else config.heads * config.head_dim
        # In this order: OpenCLIP's files hold the three stacked so (see `checkpoints.key_map`).
        self.q_proj = nn.Linear(width, inner, bias=bias)
        self.k_proj = nn.Linear(width, inner, bias=bias)
        self.v_proj = nn.Linear(width, inner, bias=bias)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = ready_attention(query, key, value, causal=self.causal)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Each token's vector widened, activated and narrowed."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activate = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activate(self.fc1(x)))


class TextLayer(nn.Module):
    """Attention, then the feed-forward network, each normed first and added to what came in."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = TokenAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextTransformer(nn.Module):
    """Token ids to the states that cross-attention reads, and to the projected end mark. Its keys are transformers',
    without the `text_model.` that these have had in front."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(TextLayer(config) for _ in range(config.layers))})
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        if config.projection_dim is not None:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(
        self, ids: Tensor, vectors: Tensor | None = None, *, clip_skip: int = 1, pooled: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states (n, tokens, hidden_size) of ids (n, tokens), normed where the configuration says so; and, if
        `pooled` and there is a projection, that of the end mark (n, projection_dim). Negative ids stand for `vectors`,
        as in `Embeddings`; none of them is taken for an end mark.

        `clip_skip` 1 takes the layer the configuration names, 2 the one before; what nobody reads is not computed.
        Padding is attended to, as Stable Diffusion was trained.
        """
        chosen = self.config.layers - self.config.skipped_layers - clip_skip + 1
        if chosen < 0:
            raise ValueError(f"clip_skip {clip_skip} of a text encoder of {self.config.layers} layers")
        pools = pooled and self.config.projection_dim is not None
        layers = cast(nn.ModuleList, self.encoder["layers"])
        x = states = self.embeddings(ids, vectors)
        for number in range(self.config.layers if pools else chosen):
            x = layers[number](x)
            if number + 1 == chosen:
                states = x
        if self.config.final_norm:
            states = self.final_layer_norm(states)
        if not pools:
            return states, None
        ends = x[torch.arange(len(ids), device=x.device), self.end_marks(ids)]
        return states, self.text_projection(self.final_layer_norm(ends))

    def end_marks(self, ids: Tensor) -> Tensor:
        """The place (n,) of each row's first end mark. The number 2, which old configurations wrongly give, stands for
        the highest token in the row, as in transformers; open_clip always takes that, which is CLIP's end mark."""
        is_end = ids if self.config.eos_token_id == 2 else (ids == self.config.eos_token_id).int()
        return is_end.argmax(dim=-1)
