"""Multi-head attention, and the interchangeable functions that compute it.

Every function takes queries, keys and values of shape (batch, heads, tokens, head_dim) and returns the same shape as
the queries. They differ in speed and memory only; each Attention module holds the one in use as `attend`, set from
outside. torch's CUDA kernels are called as operators: its way to choose among them, `torch.nn.attention.sdpa_kernel`,
sets flags of the whole process, which other threads meet too, and costs more than a small call.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmcli.errors import printable

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# A key and its value; then, of each that is added to what those give, key, value and how much it counts for each query.
KeysValues = tuple[Tensor, ...]

CHUNK = 512  # queries of one head whose scores chunked_attention holds at a time
SCORES = 1 << 22  # scores of all heads of an image up to which it computes them together
_FLASH_SIZE = 256  # numbers of a head, at most, that flash kernels take
_CUDNN_RIGHT = 91501  # cuDNN 9.15.1: before, sequences of lengths that 128 does not divide came out wrong
_log = logging.getLogger(__name__)


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's fused attention: it picks flash, cuDNN, memory-efficient or plain kernels itself."""
    return F.scaled_dot_product_attention(query, key, value)


def ready_attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Tensor:
    """torch's fused attention without cuDNN's kernels, its pick on Hopper and later. Those are an eighth faster than
    flash, but each size of heads takes a twentieth of a second to load, and on a new machine half a second to compile.
    `causal`: to a token itself and those before it."""
    flash = query.shape[-1] % 8 == 0 and query.shape[-1] <= _FLASH_SIZE and query.dtype != torch.float32
    flash = flash and query.is_cuda and torch.backends.cuda.is_flash_attention_available()
    if flash and torch.cuda.get_device_capability(query.device) >= (9, 0):
        return torch.ops.aten._scaled_dot_product_flash_attention.default(query, key, value, 0.0, causal)[0]
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def or_sdpa(attend: Attend) -> Attend:
    """`attend`, and sdpa_attention for the sizes of heads and number types that it refuses: each is tried once, which
    is before a CUDA graph records it, where a refusal would spoil the recording."""
    refused: set[tuple[int, torch.dtype]] = set()

    @functools.wraps(attend)
    def choose(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kind = (query.shape[-1], query.dtype)
        if kind not in refused:
            try:
                return attend(query, key, value)
            except (torch.OutOfMemoryError, torch.AcceleratorError):
                raise
            except (NotImplementedError, RuntimeError, ValueError) as error:
                refused.add(kind)
                _log.info(
                    "%s refused heads of %d numbers (%s); torch picks the kernel there",
                    attend.__name__,
                    kind[0],
                    printable(str(error).strip().partition("\n")[0]),
                )
        return sdpa_attention(query, key, value)

    return choose


@or_sdpa
def flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's flash kernels (Dao 2023); CUDA only, in 16 bits, heads of up to 256 numbers."""
    return torch.ops.aten._scaled_dot_product_flash_attention.default(query, key, value)[0]


@or_sdpa
def cudnn_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """cuDNN's kernels, which torch prefers on Hopper; CUDA only, in 16 bits, heads of up to 128 numbers or 256. The
    first call with a shape plans it, which takes long."""
    if query.dtype == torch.float32:
        raise RuntimeError("it takes 16 bits alone")  # it takes float32 as well, and gives something else
    if key.shape[2] == 1 or (query.is_cuda and (torch.backends.cudnn.version() or 0) < _CUDNN_RIGHT):
        raise RuntimeError("before 9.15.1 it is wrong where 128 does not divide a length, and it takes no single key")
    return torch.ops.aten._scaled_dot_product_cudnn_attention.default(query, key, value, None, False)[0]


@or_sdpa
def efficient_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's memory-efficient kernels, in float32 too and for heads of any size; CUDA only."""
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
NEED_CUDA = ("flash", "cudnn", "efficient", "xformers")  # the others run on any device, for any shape and number type
REMOVED = {
    "measured": "attention measured is no more: torch's own pick, --attention sdpa, was what its empty table came to."
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
        """Attend from x (batch, tokens, channels) to what `project` gave; returns x's shape. What other keys
        and values give is added to that, multiplied by what broadcasts to (batch, 1, tokens, 1) (Ye et al. 2023,
        IP-Adapter)."""
        return self.to_out[0](self.attended(x, keys_values))

    def attended(self, x: Tensor, keys_values: KeysValues) -> Tensor:
        """The same before the last layer."""
        query = self._split(self.to_q(x))
        key, value, *more = keys_values
        out = self.attend(query, key, value)
        for other_key, other_value, weight in zip(more[::3], more[1::3], more[2::3], strict=True):
            out = out + weight * self.attend(query, other_key, other_value)
        return out.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PixelAttention(Attention):
    """Attention over all pixels of a feature map (batch, channels, height, width), behind a group norm and added to
    it."""

    def __init__(self, channels: int, groups: int, heads: int = 1, *, eps: float = 1e-6) -> None:
        super().__init__(channels, heads, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        height, width = x.shape[2:]
        h = self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)
        h = super().forward(h, self.project(h))
        return x + h.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def set_attention(module: nn.Module, attend: Attend) -> None:
    """Make every Attention inside `module` compute with `attend`."""
    for part in module.modules():
        if isinstance(part, Attention):
            part.attend = attend
