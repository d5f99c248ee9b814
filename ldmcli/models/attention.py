"""Multi-head attention, and the interchangeable functions that compute it.

Every function takes queries, keys and values of shape (batch, heads, tokens, head_dim) and returns the same shape as
the queries. They differ in speed and memory only; each Attention module holds the one in use as `attend`, set from
outside.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
KeysValues = tuple[Tensor, Tensor]

CHUNK = 512  # queries of one head whose scores chunked_attention holds at a time
SCORES = 1 << 22  # scores of all heads of an image up to which it computes them together


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's fused attention: it picks flash, cuDNN, memory-efficient or plain kernels itself."""
    return F.scaled_dot_product_attention(query, key, value)


def math_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The definition, softmax(q kᵀ / √d) v, holding the whole score matrix: the reference for the others."""
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ value


def chunked_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Plain products around a softmax, for part of the queries at a time: for bfloat16 on a CPU that multiplies it,
    where torch's fused kernel is slow; in float32 that is the faster.

    All heads of an image go together where their scores are few, as with a prompt's 77 keys; else the heads go one by
    one, CHUNK queries at a time. So at most the larger of SCORES and CHUNK · keys scores are held, and their softmax.
    """
    batch, heads, tokens, head_dim = query.shape
    out = query.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
    turned = (key * head_dim**-0.5).transpose(2, 3)
    together = heads * tokens * key.shape[2] <= SCORES
    for image in range(batch):
        if together:
            out[image] = torch.bmm(torch.bmm(query[image], turned[image]).softmax(-1), value[image])
            continue
        for head in range(heads):
            for a in range(0, tokens, CHUNK):
                weights = torch.mm(query[image, head, a : a + CHUNK], turned[image, head]).softmax(-1)
                out[image, head, a : a + CHUNK] = torch.mm(weights, value[image, head])
    return out


def check_xformers(device: torch.device, dtype: torch.dtype) -> None:
    """Raise whatever keeps xformers from working here: not installed, no kernel for this card, type or head size."""
    for head_dim in (40, 512):  # the U-Net's smallest and the VAE's
        probe = torch.zeros(1, 1, 64, head_dim, device=device, dtype=dtype)
        xformers_attention(probe, probe, probe)


def xformers_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """xformers' memory-efficient attention; CUDA only. Imported on first use: the import alone takes seconds."""
    from xformers.ops import memory_efficient_attention

    # xformers wants (batch, tokens, heads, head_dim); a transposed view is enough.
    out = memory_efficient_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2)


ATTENTIONS: dict[str, Attend] = {
    "sdpa": sdpa_attention,
    "chunked": chunked_attention,
    "xformers": xformers_attention,
    "math": math_attention,
}


class Attention(nn.Module):
    """Attention over a sequence, to itself or to a context.

    Keys and values are computed apart from the output (`project`), because those of a prompt stay the same through all
    sampling steps.
    """

    def __init__(self, channels: int, heads: int, *, context_channels: int | None = None, bias: bool = False) -> None:
        super().__init__()
        context_channels = channels if context_channels is None else context_channels
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_channels, channels, bias=bias)
        self.to_v = nn.Linear(context_channels, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        self.attend: Attend = sdpa_attention

    def project(self, context: Tensor) -> KeysValues:
        """Keys and values, each (batch, heads, tokens, head_dim), of a context (batch, tokens, context_channels)."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        """Attend from x (batch, tokens, channels) to what `project` gave; returns x's shape."""
        key, value = keys_values
        out = self.attend(self._split(self.to_q(x)), key, value)
        return self.to_out[0](out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def set_attention(module: nn.Module, attend: Attend) -> None:
    """Make every Attention inside `module` compute with `attend`."""
    for part in module.modules():
        if isinstance(part, Attention):
            part.attend = attend
