"""A U-Net or VAE laid out for oneDNN, torch's library of CPU kernels. Same numbers, but for rounding.

Left to itself, torch rearranges a layer's weights into blocks that suit the CPU on every call. Here a layer that is
called again with an input of the same shape, or sure to be, does so once, and keeps the rearranged weights in place of
the plain ones: nothing is held twice. Large 3×3 convolutions in float32 go to winograd.py instead: oneDNN has no such
kernel for these CPUs. Doubling a map's sides in front of a convolution is folded into the convolution's weights.

Layers keep their parameters' names, and `Module.to` finds plain weights: later calls lay them out anew. Whoever changes
weights in place calls `make_plain` first, and rearranged ones are not for saving. Where an operator is missing or
refuses (another version of torch, another number type, a CPU without it) weights stay plain.
"""

import functools
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ldmcli.networks.layers import Upsample
from ldmcli.speed.cpu import winograd
from ldmcli.speed.cpu.heap import MUCH, give_back_free_memory
from ldmcli.speed.modules import recast, replaced


def lay_out(module: nn.Module, *, fold: bool, fewer_products: bool = True, at_once: bool = False) -> nn.Module:
    """`module` with convolutions and products that compute with oneDNN's own layouts, large convolutions by
    `fewer_products`, and with `fold` upsamplers with folded weights. Weights are rearranged layer by layer as they are
    used: when they are used the second time, or `at_once` for a module that is sure to be called again."""
    if not torch.backends.mkldnn.is_available() or not _operators():
        return module
    kinds: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: PackedLinear, Upsample: FastUpsample}
    kinds[nn.Conv2d] = FastConv2d if fewer_products else PackedConv2d

    def make(part: nn.Module) -> nn.Module | None:
        if type(part) not in kinds:
            return None
        new = recast(kinds[type(part)], part)
        if isinstance(new, FastUpsample):
            new._folds = fold
        elif isinstance(new, _Packed):
            new._at_once = at_once
        return new

    return replaced(module, make)


@functools.cache
def _operators() -> dict[str, Callable[..., Tensor]]:
    """oneDNN's operators that torch has no public names for; none where any is missing."""
    names = ("_reorder_convolution_weight", "_convolution_pointwise", "_reorder_linear_weight", "_linear_pointwise")
    try:
        return {name: getattr(torch.ops.mkldnn, name).default for name in names}
    except (AttributeError, RuntimeError):
        return {}


class _Packed(nn.Module):
    """A layer computed by oneDNN, whose `weight` is in its layout once it has been called twice in a row with inputs of
    one shape, or called at all if it is to be laid out at once. The numbers are the same bit for bit before and after.

    The layout suits one shape and number of threads; with others the operators would rearrange it anew on every call,
    by code up to a hundred times slower than that for plain weights.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]]  # number types in which it pays
    weight: Tensor
    _packed_for: tuple[int, ...] | None = None
    _last: tuple[int, ...] | None = None
    _at_once = False
    _refused = False  # by the operator
    _stays_plain = False  # refused by the one that lays out

    def forward(self, x: Tensor) -> Tensor:
        if self._ready(x):
            try:
                return self._computed(x)
            except RuntimeError:  # this CPU has no kernel for the number type, or memory is out: then below too
                self._unpack()
                self._refused = True
        return super().forward(x)

    def _computed(self, x: Tensor) -> Tensor:
        """The result for x by oneDNN's operator, which takes the weight plain or laid out."""
        raise NotImplementedError

    def _rearranged(self, weight: Tensor, x: Tensor) -> Tensor:
        """The plain weight in the layout that suits x."""
        raise NotImplementedError

    def _ready(self, x: Tensor) -> bool:
        """Whether x may go to oneDNN's operator, with the weight laid out for it or plain; else the weight is plain."""
        weight = self.weight
        if x.dtype != weight.dtype or x.requires_grad or weight.requires_grad or x.dtype not in self.dtypes:
            self._unpack()
            return False
        call = (*x.shape, torch.get_num_threads())
        if call == self._packed_for:
            return True
        self._unpack()
        if self._refused or not x.numel() or x.device.type != "cpu":
            return False
        expected = call == self._last or (self._at_once and self._last is None)
        if expected and not self._stays_plain:
            self._pack(x, call)
        self._last = call
        return not self._refused

    def _pack(self, x: Tensor, call: tuple[int, ...]) -> None:
        with torch.inference_mode(False), torch.no_grad():  # what is kept must be usable outside inference mode too
            try:
                rearranged = self._rearranged(self.weight.detach(), x)
            except RuntimeError:
                self._stays_plain = True
                return
            left = self.weight.nbytes
            self.weight = nn.Parameter(rearranged, requires_grad=False)
        self._packed_for = call
        _give_back(left)

    def _unpack(self) -> None:
        """Make the weight plain again."""
        if self._packed_for is None:
            return
        self._packed_for = None
        with torch.inference_mode(False), torch.no_grad():
            weight = self.weight.detach().to_dense()
            order = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
            self.weight = nn.Parameter(weight.contiguous(memory_format=order), requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._unpack()
        self._refused = self._stays_plain = False
        return super()._apply(fn, recurse)


_left = 0  # bytes of plain weights


def _give_back(size: int) -> None:
    """Give memory back to the system that so many bytes of plain weights have left, now and then. The place of one is a
    little too small for the next layer's rearranged weight: without this, a process would grow by as much again as the
    weights take. Each time, all that is free goes, and what is asked for next has to be cleared anew: hence seldom."""
    global _left
    _left += size
    if _left >= MUCH:
        _left = 0
        give_back_free_memory(0)


def make_plain(holder: nn.Module, layer: nn.Module) -> None:
    """Have a layer, which is part of `holder`, hold its plain weights and nothing made of them, until its next call."""
    if isinstance(holder, FastUpsample):
        holder._folded = None
    if isinstance(layer, _Packed):
        layer._unpack()


class PackedConv2d(_Packed, nn.Conv2d):
    """A convolution with its weight laid out once."""

    dtypes = (torch.float32, torch.bfloat16)

    def _rearranged(self, weight: Tensor, x: Tensor) -> Tensor:
        reorder = _operators()["_reorder_convolution_weight"]
        return reorder(weight, self.padding, self.stride, self.dilation, self.groups, list(x.shape))

    def _computed(self, x: Tensor) -> Tensor:
        convolve = _operators()["_convolution_pointwise"]
        return convolve(
            x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )


class FastConv2d(PackedConv2d):
    """The same, and where winograd.py serves by fewer products, from the plain weight."""

    def forward(self, x: Tensor) -> Tensor:
        fast = self.by_fewer_products(x)
        return super().forward(x) if fast is None else fast

    def by_fewer_products(self, x: Tensor, *, doubled: bool = False) -> Tensor | None:
        """The convolution of x, or of x at twice its size, by winograd.py; None where that does not serve."""
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups)
        if (
            geometry != ((3, 3), (1, 1), (1, 1), (1, 1), 1)
            or x.requires_grad
            or self.weight.requires_grad
            or self.weight.dtype != torch.float32
            or not winograd.suits(x, self.out_channels, doubled=doubled)
        ):
            return None
        self._unpack()
        bias = None if self.bias is None else self.bias.detach()
        return winograd.convolve(x, self.weight.detach(), bias, doubled=doubled)


class PackedLinear(_Packed, nn.Linear):
    """A product with a matrix laid out once. In float32 torch's products go to another library, MKL, as fast with plain
    matrices."""

    dtypes = (torch.bfloat16,)

    def _rearranged(self, weight: Tensor, x: Tensor) -> Tensor:
        return _operators()["_reorder_linear_weight"](weight, x.numel() // x.shape[-1])

    def _computed(self, x: Tensor) -> Tensor:
        return _operators()["_linear_pointwise"](x, self.weight, self.bias, "none", [], "")


class FastUpsample(Upsample):
    """Doubling by nearest neighbour and the 3×3 convolution behind it in one: by winograd.py where that serves, else,
    if it folds, as four 2×2 convolutions of the small map. Of the nine pixels that a result depends on, neighbours are
    equal, so that their weights can be summed beforehand: 4/9 of the multiplications."""

    _folds = False
    _folded: list[PackedConv2d] | None = None

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        batch, _, height, width = x.shape
        if size not in (None, (2 * height, 2 * width)):
            return super().forward(x, size)
        if isinstance(self.conv, FastConv2d) and (fast := self.conv.by_fewer_products(x, doubled=True)) is not None:
            return fast
        if not self._folds or x.requires_grad or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x, size)
        if self._folded is None:
            with torch.inference_mode(False), torch.no_grad():
                self._folded = _fold(self.conv)
            _give_back(self.conv.weight.nbytes)
        shape = (batch, self.conv.out_channels, 2 * height, 2 * width)
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for i, conv in enumerate(self._folded):
            row, column = divmod(i, 2)
            out[:, :, row::2, column::2] = conv(x)[:, :, row : row + height, column : column + width]
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._folded = None
        return super()._apply(fn, recurse)


def _fold(conv: nn.Conv2d) -> list[PackedConv2d]:
    """2×2 convolutions for the pixels of a doubled map in even rows and columns, even rows and odd columns, and so on:
    each with a row and a column too many, on the far side of the even ones and on the near side of the odd ones."""
    if isinstance(conv, _Packed):
        conv._unpack()
    weight = conv.weight.detach()
    first, middle, last = weight.to(torch.promote_types(weight.dtype, torch.float32)).unbind(2)
    folded = []
    for rows in ((first, middle + last), (first + middle, last)):
        left, centre, right = torch.stack(rows, 2).unbind(3)
        for columns in ((left, centre + right), (left + centre, right)):
            part = PackedConv2d(conv.in_channels, conv.out_channels, 2, padding=1, device="meta")
            summed = torch.stack(columns, 3).to(weight.dtype).contiguous(memory_format=torch.channels_last)
            part.weight = nn.Parameter(summed, requires_grad=False)
            part.register_parameter("bias", conv.get_parameter("bias"))  # the same, not a copy
            folded.append(part)
    return folded
