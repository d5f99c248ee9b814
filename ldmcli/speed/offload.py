"""A device with room for one part of a model at a time: the others wait in host memory.

Weights are copied one way only. What leaves the device is dropped there, and the module takes up its weights in host
memory again, which never went away. They lie side by side in a few large pieces, pinned where that can be had, so that
a part comes in a few long copies that the device makes by itself.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldmcli.errors import LdmError

HOST = torch.device("cpu")
PIECE = 64 << 20  # bytes; a power of two, to which torch rounds pinned memory up
ALIGNED = 512  # bytes, as the device's own allocator gives them: products may be computed otherwise with less
_log = logging.getLogger(__name__)


class Stage:
    """Where the parts of a model compute: all of them live on `device`, or, once it is `narrow`, the last one brought.

    Whoever is about to compute with a part brings it first. `room` is how many bytes the device has in all; by default,
    what it says. Not for two threads at once.
    """

    def __init__(self, device: torch.device = HOST, *, narrow: bool = False, room: int | None = None) -> None:
        self.device = device
        self.narrow = narrow
        self.present: nn.Module | None = None
        if narrow and room is None and device.type == "cuda":
            room = torch.cuda.mem_get_info(device)[1]
        self._room = room
        self._parts: dict[nn.Module, _Packed | None] = {}

    @property
    def may_narrow(self) -> bool:
        """Whether `make_narrow` would free memory: the device has its own, and all parts are there."""
        return self.device.type != HOST.type and not self.narrow

    @property
    def home(self) -> torch.device:
        """Where weights are to be read to."""
        return HOST if self.narrow else self.device

    def add(self, part: nn.Module) -> None:
        """Know of a part that is at `home`. Raises LdmError for one that is larger than a narrow device."""
        if self.narrow and self._room is not None:
            size = sum(tensor.nbytes for tensor in [*part.parameters(), *part.buffers()])
            if size > self._room:
                raise self._too_large(part, size, f"has {_gib(self._room)}")
        self._parts[part] = None

    def make_narrow(self) -> None:
        """Send all parts to host memory; from now on only the one at work is on the device."""
        if not self.narrow:
            self.narrow = True
            self._parts = {part: self._pack(part) for part in self._parts}
            self._release()

    def bring(self, part: nn.Module) -> None:
        """Have the part's weights on the device, and where that is narrow no other's. Raises LdmError where they do not
        fit."""
        if part is self.present or not self.narrow:
            return
        self.clear()
        packed = self._parts.get(part)
        if packed is None or not packed.holds(part, packed.pieces):
            packed = self._parts[part] = self._pack(part)
        with contextlib.suppress(torch.OutOfMemoryError):
            packed.place(part, packed.copies(self.device))
            self.present = part
        if self.present is None:  # out here the error is gone, with its frames and what they had brought
            self._release()
            raise self._too_large(part, sum(piece.nbytes for piece in packed.pieces), "has too little free")

    def clear(self) -> None:
        """Send home the part on a narrow device. Number types are to be changed there."""
        part, self.present = self.present, None
        if part is None:
            return
        packed = self._parts[part]
        assert packed is not None
        if packed.holds(part, packed.away):
            packed.place(part, packed.pieces)
        else:  # it was converted meanwhile
            self._parts[part] = self._pack(part)
        packed.away = []
        self._release()

    def _pack(self, part: nn.Module) -> "_Packed":
        return _Packed(part, pinned=self.device.type == "cuda")

    def _release(self) -> None:
        """Give what is free back to the device, where others may want it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _too_large(self, part: nn.Module, size: int, found: str) -> LdmError:
        return LdmError(
            f"{type(part).__name__}, a part of the model, needs {_gib(size)} at once on {self.device}, which {found}; "
            "use --dtype fp16, a smaller model or --device cpu."
        )


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor is: in which piece, from which byte of it, and how it is read there."""

    piece: int
    start: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def end(self) -> int:
        """The byte after it."""
        return self.start + math.prod(self.shape) * self.dtype.itemsize

    def within(self, pieces: Sequence[Tensor]) -> Tensor:
        """The tensor, as a view of its piece."""
        return pieces[self.piece][self.start : self.end].view(self.dtype).as_strided(self.shape, self.stride)


class _Packed:
    """A module's weights, moved into `pieces` of host memory; `away` are their copies on the device, if any."""

    def __init__(self, module: nn.Module, *, pinned: bool) -> None:
        self._places = _places(_tensors(module))
        self.away: list[Tensor] = []
        ends = [0] * (1 + max((place.piece for place in self._places), default=-1))
        for place in self._places:
            ends[place.piece] = max(ends[place.piece], place.end)
        with torch.inference_mode(False):
            self.pieces = [_piece(end, pinned=pinned) for end in ends]
        places = iter(self._places)
        # One after the other, so that what they were in is given up as it goes.
        _replace(module, lambda tensor: next(places).within(self.pieces).copy_(tensor))

    def copies(self, device: torch.device) -> list[Tensor]:
        """The pieces, on the device: soon, for whoever queues work there after this."""
        with torch.inference_mode(False):
            self.away = [torch.empty_like(p, device=device).copy_(p, non_blocking=True) for p in self.pieces]
        return self.away

    def place(self, module: nn.Module, pieces: Sequence[Tensor]) -> None:
        """Let the module's weights be those in `pieces`."""
        places = iter(self._places)
        _replace(module, lambda _: next(places).within(pieces))

    def holds(self, module: nn.Module, pieces: Sequence[Tensor]) -> bool:
        """Whether the module's weights are those in `pieces`: neither converted nor exchanged since."""
        return [*map(_seen, _tensors(module))] == [_seen(place.within(pieces)) for place in self._places]


def _replace(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Put another tensor in place of each parameter and buffer, as `Module.to` does: what a layer has derived from its
    weights, it forgets."""
    with torch.inference_mode(False), torch.no_grad():  # what is kept must be usable outside inference mode too
        module._apply(change)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers in the order of `_replace`. Layers are made plain by this."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor.detach())
        return tensor

    _replace(module, note)
    return found


def _places(tensors: Sequence[Tensor]) -> list[_Place]:
    """Room for each, in pieces of PIECE bytes, or one of its own for what is larger."""
    found: list[_Place] = []
    piece, end = 0, 0
    for tensor in tensors:
        if end and end + tensor.nbytes > PIECE:
            piece, end = piece + 1, 0
        dense = torch.empty_like(tensor, device="meta").stride()  # the same order in memory, without gaps
        found.append(_Place(piece, end, tensor.dtype, tensor.shape, dense))
        end = math.ceil((end + tensor.nbytes) / ALIGNED) * ALIGNED
    return found


def _piece(size: int, *, pinned: bool) -> Tensor:
    if pinned:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            _log.debug("no pinned memory (%s); going on without", str(error).partition("\n")[0])
    return torch.empty(size, dtype=torch.uint8)


def _seen(tensor: Tensor) -> tuple[object, ...]:
    """What two tensors agree in that are the same memory, read the same way."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device, tensor.data_ptr()


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
