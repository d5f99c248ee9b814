"""Multi-head attention, and the interchangeable functions that compute it.

Every function takes queries, keys and values of shape (batch, heads, tokens, head_dim) and returns the same shape as
the queries. They differ in speed and memory only; each Attention module holds the one in use as `attend`, set from
outside. torch's CUDA kernels are called as operators: its way to choose among them, `torch.nn.attention.sdpa_kernel`,
sets flags of the whole process, which other threads meet too, and costs more than a small call.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
KeysValues = tuple[Tensor, ...]  # a key and its value; then more such pairs, whose results are added

CHUNK = 512  # queries of one head whose scores chunked_attention holds at a time
SCORES = 1 << 22  # scores of all heads of an image up to which it computes them together


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's fused attention: it picks flash, cuDNN, memory-efficient or plain kernels itself."""
    return F.scaled_dot_product_attention(query, key, value)


def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's flash kernels (Dao 2023); CUDA only. RuntimeError for what `takes` says they do not take."""
    return torch.ops.aten._scaled_dot_product_flash_attention.default(query, key, value)[0]


def cudnn_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """cuDNN's kernels, which torch prefers on Hopper; CUDA only. RuntimeError as for flash. The first call with a shape
    plans it, which takes long."""
    return torch.ops.aten._scaled_dot_product_cudnn_attention.default(query, key, value, None, False)[0]


def efficient_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's memory-efficient kernels, in float32 too and for heads of any size; CUDA only. RuntimeError as for
    flash."""
    return torch.ops.aten._scaled_dot_product_efficient_attention.default(query, key, value, None, False)[0]


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
    "flash": flash_attention,
    "cudnn": cudnn_attention,
    "efficient": efficient_attention,
    "xformers": xformers_attention,
    "chunked": chunked_attention,
    "math": math_attention,
}
ANYWHERE = ("sdpa", "chunked", "math")  # run on any device, for any shape and number type
TORCH_KERNELS = ("flash", "cudnn", "efficient")  # among which sdpa_attention picks on a GPU

_OLDEST, _NEWEST = (8, 0), (12, 1)  # compute capabilities that torch's fused kernels are built for
_CUDNN_RIGHT = 91501  # cuDNN 9.15.1: before, sequences of lengths that 128 does not divide came out wrong
_CUDNN_WIDE = 92201  # from here on Hopper's and Blackwell's kernels take heads of up to 256, not 128


def takes(
    name: str,
    head_dim: int,
    keys: int,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    cudnn: int | None = None,
) -> bool:
    """Whether ATTENTIONS[name] computes heads of `head_dim` numbers of `dtype` over so many keys, on a card of a
    compute capability, or on a CPU (None). `cudnn` is the version, by default of the one at work (9.24.0: 92400).

    Where it says no, the kernel refuses or is known to be wrong; a yes may still be refused by a torch built otherwise.
    Sources: torch's aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (check_head_dim_size_flash,
    check_head_dim_size_mem_efficient, minimum_gemm_alignment, check_cudnn_tensor_shapes, check_prefer_cudnn_attention);
    xformers/ops/fmha/{flash,cutlass}.py, whose kernels are torch's flash and memory-efficient ones.
    """
    if name in ANYWHERE or capability is None:
        return name in ANYWHERE
    if name == "efficient":
        return capability <= _NEWEST and _fits_cutlass(head_dim, dtype, capability)
    sixteen = dtype in (torch.float16, torch.bfloat16)
    by_flash = capability >= _OLDEST and sixteen and head_dim % 8 == 0 and head_dim <= 256
    if name == "xformers":
        return by_flash or (capability <= (9, 0) and _fits_cutlass(head_dim, dtype, capability))
    if capability > _NEWEST or not by_flash:
        return False
    if name == "flash":
        return True
    version = cudnn or torch.backends.cudnn.version() or 0
    wide = version >= _CUDNN_WIDE and (capability == (9, 0) or capability[0] == 10)
    return version >= _CUDNN_RIGHT and keys != 1 and (head_dim <= 128 or wide)


def _fits_cutlass(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether the memory-efficient kernels take the type, and heads of this size are aligned for its tensor cores."""
    if dtype == torch.float32:
        return head_dim % (4 if capability >= (8, 0) else 1) == 0
    if dtype == torch.float16:
        return head_dim % (8 if capability >= (7, 0) else 1) == 0
    return dtype == torch.bfloat16 and capability >= (8, 0) and head_dim % 8 == 0


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
        """Attend from x (batch, tokens, channels) to what `project` gave; returns x's shape. What other pairs of keys
        and values give is added to that (Ye et al. 2023, IP-Adapter)."""
        query = self._split(self.to_q(x))
        key, value, *more = keys_values
        out = self.attend(query, key, value)
        for other_key, other_value in zip(more[::2], more[1::2], strict=True):
            out = out + self.attend(query, other_key, other_value)
        return self.to_out[0](out.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def set_attention(module: nn.Module, attend: Attend) -> None:
    """Make every Attention inside `module` compute with `attend`."""
    for part in module.modules():
        if isinstance(part, Attention):
            part.attend = attend
