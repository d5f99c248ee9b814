"""A U-Net or VAE that computes with this program's own GPU kernels. Same numbers, but for rounding, of which there is
less: what is fused is rounded once.

Group norms with SiLU, sums with their layer norm and gates are kernels of their own. The bias of a convolution goes
into what follows it, since cuDNN adds it in a pass of its own. Queries, keys and values of self-attention are one
product. What a kernel does not take (on a CPU, not channels last), torch computes by the same formula.

Layers whose weights became part of another's are hidden: `hidden_parameters` gives them by the names they had.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmcli.networks.attention import Attention, KeysValues
from ldmcli.networks.layers import ResnetBlock
from ldmcli.networks.transformer import GEGLU, SpatialTransformer, TransformerBlock
from ldmcli.networks.unet import Encoder
from ldmcli.speed.cuda.kernels import add_and_norm, add_bias_residual, geglu, group_norm_silu
from ldmcli.speed.modules import recast, replaced


def fuse(module: nn.Module) -> nn.Module:
    """`module` with layers that compute with the kernels, where its tensors are on a GPU; for inference alone."""
    kinds: dict[type[nn.Module], type[nn.Module]] = {
        nn.GroupNorm: FusedGroupNorm,
        ResnetBlock: FusedResnetBlock,
        GEGLU: FusedGEGLU,
        SpatialTransformer: FusedSpatialTransformer,
    }

    def make(part: nn.Module) -> nn.Module | None:
        if type(part) is TransformerBlock:
            block = recast(FusedTransformerBlock, part)
            block.attn1 = _joined(part.attn1)
            return block
        if isinstance(part, Encoder):
            _join_time(part)
        return recast(kinds[type(part)], part) if type(part) in kinds else None

    return replaced(module, make)


def in_planes(unet: Encoder) -> nn.Module:
    """`unet` as torch's own norms want it on a GPU, where they take no other layout: maps lie plane by plane."""
    unet.to(memory_format=torch.contiguous_format)
    first = unet.conv_in
    return replaced(unet, lambda part: recast(PlanesConv2d, part) if part is first else None)


class PlanesConv2d(nn.Conv2d):
    """A convolution after which maps lie plane by plane, however its input does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous())


class FusedGroupNorm(nn.GroupNorm):
    """A group norm by the kernel, without an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, activate=False)


class FusedResnetBlock(ResnetBlock):
    """A resnet block of two convolutions, two norms and a sum. What is added to a channel between the convolutions, the
    first one's bias too, goes into the second norm; the last one's bias goes into the sum."""

    def forward(self, x: Tensor, activated_time: Tensor | None = None) -> Tensor:
        bias = _bias(self.conv1)[None]
        shift = bias if self.time_emb_proj is None else self.time_emb_proj(activated_time)  # which has the bias in it
        h = _convolved(self.conv1, _activated(self.norm1, x))
        h = _convolved(self.conv2, _activated(self.norm2, h, shift))
        if self.conv_shortcut is None:
            return add_bias_residual(h, _bias(self.conv2), x)
        return add_bias_residual(h, _bias(self.conv2), _convolved(self.conv_shortcut, x), _bias(self.conv_shortcut))


class FusedGEGLU(GEGLU):
    """A gated layer whose gate is one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x))


_JOINED = ("to_q", "to_k", "to_v")  # in the order of JoinedAttention's rows


class JoinedAttention(Attention):
    """Attention of a sequence to itself, whose queries, keys and values are one product."""

    to_qkv: nn.Linear

    def to_itself(self, x: Tensor) -> Tensor:
        """What `attended` gives, for the keys and values of x."""
        query, key, value = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.attend(query, key, value).transpose(1, 2).flatten(2)


def _joined(attention: Attention) -> JoinedAttention:
    """`attention` with its first three layers in one. Their weights are copied; they themselves are not kept."""
    layers = [getattr(attention, name) for name in _JOINED]
    joined = recast(JoinedAttention, attention)
    del joined.to_q, joined.to_k, joined.to_v
    biases = [layer.bias for layer in layers if layer.bias is not None]
    joined.to_qkv = _product([layer.weight for layer in layers], biases)
    return joined


def _product(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> nn.Linear:
    """One layer that gives what several give of one input, one after the other."""
    with torch.inference_mode(False), torch.no_grad():  # what is kept must be usable outside inference mode too
        product = nn.Linear(weights[0].shape[1], sum(map(len, weights)), bias=bool(biases), device="meta")
        product.weight = nn.Parameter(torch.cat([weight.detach() for weight in weights]), requires_grad=False)
        if biases:
            product.bias = nn.Parameter(torch.cat([bias.detach() for bias in biases]), requires_grad=False)
    return product


class Rows(nn.Module):
    """Some of the last axis, in place of the layer that gave them, which had this `bias`."""

    bias: Tensor

    def __init__(self, start: int, count: int, bias: Tensor) -> None:
        super().__init__()
        self.start, self.count = start, count
        with torch.inference_mode(False), torch.no_grad():
            self.register_buffer("bias", bias.detach().clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.narrow(-1, self.start, self.count)


def _join_time(unet: Encoder) -> None:
    """Compute the time projections of all resnets, their first biases included, by one product."""
    resnets = [part for part in unet.modules() if isinstance(part, FusedResnetBlock)]
    layers = [cast(nn.Linear, resnet.time_emb_proj) for resnet in resnets]
    biases = [_bias(layer) + _bias(resnet.conv1) for layer, resnet in zip(layers, resnets, strict=True)]
    unet.time_activation = nn.Sequential(unet.time_activation, _product([layer.weight for layer in layers], biases))
    start = 0
    for resnet, layer in zip(resnets, layers, strict=True):
        resnet.time_emb_proj = Rows(start, layer.out_features, _bias(layer))
        start += layer.out_features


def hidden_layers(network: nn.Module) -> tuple[list[str], set[str]]:
    """The names of a network's hidden layers, and of those that hold their weights."""
    hidden: list[str] = []
    made: set[str] = set()
    for name, part in network.named_modules():
        if isinstance(part, JoinedAttention):
            hidden += [f"{name}.{layer}" for layer in _JOINED]
            made.add(f"{name}.to_qkv")
        elif isinstance(part, Rows):
            hidden.append(name)
            made.add("time_activation.1")
    return hidden, made


def hidden_parameters(network: nn.Module, holder: nn.Module, name: str) -> dict[str, Tensor] | None:
    """The parameters of a hidden layer, which was part of `holder`, as views; None where it is not hidden."""
    if isinstance(holder, JoinedAttention) and name in _JOINED:
        whole, count = holder.to_qkv, holder.to_qkv.out_features // len(_JOINED)
        start = count * _JOINED.index(name)
        return {key: tensor.detach().narrow(0, start, count) for key, tensor in whole.named_parameters()}
    rows = getattr(holder, name, None)
    if isinstance(rows, Rows):
        weight = _time_product(network).weight.detach()
        return {"weight": weight.narrow(0, rows.start, rows.count), "bias": rows.bias}
    return None


def rejoin(network: nn.Module, holder: nn.Module, name: str) -> None:
    """After a change to the layer of this name in `holder`: have the biases joined anew that it is part of."""
    if isinstance(holder, FusedResnetBlock) and name in ("conv1", "time_emb_proj"):
        rows = holder.time_emb_proj
        if isinstance(rows, Rows):
            joined = _bias(_time_product(network)).detach().narrow(0, rows.start, rows.count)
            joined.copy_(rows.bias + _bias(holder.conv1))


def _time_product(network: nn.Module) -> nn.Linear:
    """The layer into which `_join_time` put the time projections of a U-Net."""
    return cast(nn.Linear, cast(nn.Sequential, network.time_activation)[1])


Sum = tuple[Tensor, Tensor, Tensor | None]  # tokens (batch, tokens, channels), a bias, and tokens if there are any


class FusedTransformerBlock(TransformerBlock):
    """A transformer block whose sums are one kernel with the layer norms that follow. Its input is a `Sum` that is
    still to be added up, and so is its output."""

    attn1: JoinedAttention

    def forward(self, x: Sum, context: KeysValues) -> Sum:  # type: ignore[override]
        h, normed = _normed(x, self.norm1)
        h, normed = _normed(_attended(self.attn1, self.attn1.to_itself(normed), h), self.norm2)
        h, normed = _normed(_attended(self.attn2, self.attn2.attended(normed, context), h), self.norm3)
        last = cast(nn.Linear, self.ff.net[2])
        return F.linear(self.ff.net[0](normed), last.weight), _bias(last), h


class FusedSpatialTransformer(SpatialTransformer):
    """A spatial transformer whose first and last layer are products, whatever they are stored as, and leave their bias
    to the sum that follows."""

    def forward(self, x: Tensor, context: list[KeysValues]) -> Tensor:
        h = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (batch, height·width, channels)
        tokens: Sum = F.linear(h, self.proj_in.weight.flatten(1)), _bias(self.proj_in), None
        for block, keys_values in zip(self.transformer_blocks, context, strict=True):
            tokens = block(tokens, keys_values)
        h, bias, residual = tokens
        h = h + bias if residual is None else add_bias_residual(h, bias, residual)
        h = F.linear(h, self.proj_out.weight.flatten(1)).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return add_bias_residual(h, _bias(self.proj_out), x)


def _activated(norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None) -> Tensor:
    """SiLU of the norm of x + shift."""
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, shift=shift)


def _normed(x: Sum, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """The sum, and its norm."""
    return add_and_norm(*x, norm.weight, norm.bias, norm.eps)


def _attended(attention: Attention, h: Tensor, x: Tensor) -> Sum:
    """x and what attention's last layer makes of h."""
    last = cast(nn.Linear, attention.to_out[0])
    return F.linear(h, last.weight), _bias(last), x


def _convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution without its bias, in memory of its own."""
    assert isinstance(conv.padding, tuple)
    return F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def _bias(layer: nn.Module) -> Tensor:
    assert isinstance(layer.bias, Tensor)
    return layer.bias
