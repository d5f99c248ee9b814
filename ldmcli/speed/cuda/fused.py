"""A U-Net or VAE that computes with this program's own GPU kernels. Same numbers, but for rounding, of which there is
less: what is fused is rounded once.

Norms, SiLU and gates are one kernel each. The bias of a convolution goes into what follows it, since cuDNN adds it in a
pass of its own. Products of one input with several matrices are one product with all of them, which lie in one tensor.

Layers keep their names, parameters and `forward`; whoever converts, copies, saves or loads them meets plain weights.
What a kernel does not take (on a CPU, not channels last, to be differentiated) is computed by the plain `forward`.
"""

import functools
import itertools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmcli.errors import printable
from ldmcli.networks.attention import Attention, KeysValues
from ldmcli.networks.layers import ResnetBlock
from ldmcli.networks.transformer import GEGLU, SpatialTransformer, TransformerBlock
from ldmcli.networks.vae import PixelAttention
from ldmcli.speed.cuda.choice import is_map, takes
from ldmcli.speed.cuda.geglu import geglu
from ldmcli.speed.cuda.group_norm import group_norm_silu
from ldmcli.speed.cuda.residual import add_bias_residual
from ldmcli.speed.cuda.trial import fault

_log = logging.getLogger(__name__)


def fuse(module: nn.Module) -> None:
    """Make the layers inside `module` compute with the kernels from now on, where its tensors are on a GPU."""
    kinds: dict[type[nn.Module], type[nn.Module]] = {
        nn.GroupNorm: FusedGroupNorm,
        ResnetBlock: FusedResnetBlock,
        GEGLU: FusedGEGLU,
        TransformerBlock: FusedTransformerBlock,
        SpatialTransformer: FusedSpatialTransformer,
        PixelAttention: FusedPixelAttention,
    }
    for part in module.modules():
        part.__class__ = kinds.get(type(part), type(part))
        if isinstance(part, FusedTransformerBlock):
            _join_projections(part.attn1)  # at once: memory is then at its peak before anything runs
        elif isinstance(part, FusedPixelAttention):
            _join_projections(part)


@functools.cache
def kernels_work(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels give torch's numbers on `device` in `dtype`, tried on small tensors; if not, one logged
    sentence says why. What it compiles, Triton keeps on disk for all later runs."""
    try:
        reason = fault(device, dtype)
    except Exception as error:  # whatever a compiler or driver may raise: torch's kernels are there in any case
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if reason:
        _log.warning("this program's own GPU kernels cannot be used (%s); torch's are", printable(reason))
    return not reason


class FusedGroupNorm(nn.GroupNorm):
    """A group norm by the kernel, without an activation."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_map(x) or self.weight is None or not takes(x, self.weight):
            return super().forward(x)
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, activate=False)


class FusedResnetBlock(ResnetBlock):
    """A resnet block of two convolutions, two norms and a sum. What is added to a channel between the convolutions, the
    first one's bias too, goes into the second norm; the last one's bias goes into the sum."""

    def forward(self, x: Tensor, activated_time: Tensor | None = None) -> Tensor:
        if not is_map(x) or not takes(x, self.conv1.weight):
            return super().forward(x, activated_time)
        shift = _bias(self.conv1)[None]
        if self.time_emb_proj is not None:
            shift = self.time_emb_proj(activated_time) + shift
        h = _convolved(self.conv1, _activated(self.norm1, x))
        h = _convolved(self.conv2, _activated(self.norm2, h, shift))
        if self.conv_shortcut is None:
            return add_bias_residual(h, _bias(self.conv2), x)
        return add_bias_residual(h, _bias(self.conv2), _convolved(self.conv_shortcut, x), _bias(self.conv_shortcut))


class FusedGEGLU(GEGLU):
    """A gated layer whose gate is one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x)) if takes(x, self.proj.weight) else super().forward(x)


class FusedTransformerBlock(TransformerBlock):
    """A transformer block whose self-attention has one product for queries, keys and values."""

    def forward(self, x: Tensor, context: KeysValues) -> Tensor:
        if not takes(x, self.attn1.to_q.weight):
            return super().forward(x, context)
        x = x + _to_itself(self.attn1, self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class FusedSpatialTransformer(SpatialTransformer):
    """A spatial transformer whose first and last layer are products, whatever they are stored as: those can add their
    bias on the way, or leave it to the sum."""

    def forward(self, x: Tensor, context: list[KeysValues]) -> Tensor:
        if not is_map(x) or not takes(x, self.proj_in.weight):
            return super().forward(x, context)
        h = _tokens(self.norm(x))
        h = F.linear(h, self.proj_in.weight.flatten(1), self.proj_in.bias)
        for block, keys_values in zip(self.transformer_blocks, context, strict=True):
            h = block(h, keys_values)
        h = F.linear(h, self.proj_out.weight.flatten(1))
        return add_bias_residual(_map(h, x), _bias(self.proj_out), x)


class FusedPixelAttention(PixelAttention):
    """A VAE's attention with one product for queries, keys and values."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if not is_map(x) or not takes(x, self.to_q.weight):
            return super().forward(x)
        return x + _map(_to_itself(self, _tokens(self.group_norm(x))), x)


def _activated(norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None) -> Tensor:
    """SiLU of the norm of x + shift."""
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, shift=shift)


def _convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution without its bias, in memory of its own."""
    assert isinstance(conv.padding, tuple)
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _tokens(x: Tensor) -> Tensor:
    """A map (batch, channels, height, width), channels last, as (batch, height·width, channels)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _map(tokens: Tensor, like: Tensor) -> Tensor:
    """`_tokens` back to a map of this height and width."""
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def _to_itself(attention: Attention, x: Tensor) -> Tensor:
    """What `attention` gives for x (batch, tokens, channels) that attends to itself."""
    projected = F.linear(x, *_join_projections(attention))  # (batch, tokens, 3 · channels)
    query, key, value = projected.unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
    out = attention.attend(query, key, value)
    return attention.to_out[0](out.transpose(1, 2).flatten(2))


def _join_projections(attention: Attention) -> tuple[Tensor, Tensor | None]:
    """The weights, and if there are any the biases, of queries, keys and values, each in one tensor."""
    layers = (attention.to_q, attention.to_k, attention.to_v)
    weight = joined(layers, "weight")
    return weight, None if attention.to_q.bias is None else joined(layers, "bias")


def joined(layers: Sequence[nn.Module], name: str) -> Tensor:
    """The parameters `name` of layers one below the other, in one tensor that they are views of.

    Whether they are is looked up each time, from where they lie: they may have been converted, moved, copied or loaded
    since. If they are not, they become so: one set of them in memory, before and after.
    """
    parts = [layer.get_parameter(name) for layer in layers]
    first = parts[0]
    together = all(
        one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and one.storage_offset() + one.numel() == other.storage_offset()
        and one.dtype == other.dtype
        for one, other in itertools.pairwise(parts)
    )
    if not together or not all(part.is_contiguous() for part in parts):
        with torch.inference_mode(False), torch.no_grad():  # what is kept must be usable outside inference mode too
            whole = torch.cat([part.detach() for part in parts])
            for layer, view in zip(layers, whole.split([len(part) for part in parts]), strict=True):
                layer.register_parameter(name, nn.Parameter(view, layer.get_parameter(name).requires_grad))
        return whole
    return first.detach().as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
