"""A device with room for one part of a model at a time: the others wait in host memory.

Weights are copied one way only. What leaves the device is dropped there, and the module takes up its weights in host
memory again, which never went away. They lie side by side in a few large pieces, pinned where that can be had, so that
a part comes in a few long copies that the device makes by itself.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ldmcli.errors import LdmError
from ldmcli.speed.memory import gib

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
        self._parts: dict[
            nn.Module, list[Tensor]
        ] = {}  # with their tensors in host memory, none before they are packed
        self._away: dict[nn.Module, list[Tensor]] = {}  # of the present part and those beside it, on the device

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
        size = sum(tensor.nbytes for tensor in [*part.parameters(), *part.buffers()])
        if self.narrow and self._room is not None and size > self._room:
            raise self._too_large(part, size, f"has {gib(self._room)}")
        self._parts[part] = []

    def forget(self, part: nn.Module) -> None:
        """Know of the part no more."""
        if part in self._away:
            self.clear()
        self._parts.pop(part, None)

    def make_narrow(self) -> None:
        """Send all parts to host memory; from now on only the one at work is on the device."""
        if not self.narrow:
            self.narrow = True
            self._parts = {part: self._pack(part) for part in self._parts}
            self._release()

    def bring(self, part: nn.Module, *beside: nn.Module) -> None:
        """Have the part's weights on the device, and those of what computes `beside` it; where the device is narrow no
        other's. Raises LdmError where they do not fit."""
        if not self.narrow or (part is self.present and all(other in self._away for other in beside)):
            return
        self.clear()
        for each in (part, *beside):
            self._copy(each)
        self.present = part

    def _copy(self, part: nn.Module) -> None:
        home = self._parts.get(part, [])
        if not _holds(part, home):
            home = self._parts[part] = self._pack(part)
        with contextlib.suppress(torch.OutOfMemoryError):
            self._away[part] = _copies(home, self.device)
            _place(part, self._away[part])
            return
        # Out here the error is gone, with its frames and what they had brought.
        self.clear()
        self._release()
        raise self._too_large(part, sum(tensor.nbytes for tensor in home), "has too little free")

    def clear(self) -> None:
        """Send home what is on a narrow device. Number types are to be changed there."""
        self.present = None
        while self._away:
            part, away = self._away.popitem()
            if _holds(part, away):
                _place(part, self._parts[part])
            else:  # it was converted meanwhile
                self._parts[part] = self._pack(part)
            del away
            self._release()

    def wait(self) -> None:
        """Until what was sent has left host memory: before weights there are written to."""
        if self.narrow and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _pack(self, part: nn.Module) -> list[Tensor]:
        """The part's weights, moved into pieces of host memory."""
        home = _room_for(_tensors(part), pinned=self.device.type == "cuda")
        places = iter(home)
        # One after the other, so that what they were in is given up as it goes.
        _replace(part, lambda tensor: next(places).copy_(tensor))
        return home

    def _release(self) -> None:
        """Give what is free back to the device, where others may want it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _too_large(self, part: nn.Module, size: int, found: str) -> LdmError:
        return LdmError(
            f"{type(part).__name__}, a part of the model, needs {gib(size)} at once on {self.device}, which {found}; "
            "use --dtype fp16, a smaller model or --device cpu."
        )


def _room_for(tensors: Iterable[Tensor], *, pinned: bool) -> list[Tensor]:
    """Tensors like these, in the same order in memory but without gaps: in pieces of PIECE bytes, or one of its own for
    what is larger."""
    pieces: list[list[tuple[int, Tensor]]] = []
    end = PIECE
    for tensor in tensors:
        if end + tensor.nbytes > PIECE:
            pieces.append([])
            end = 0
        like = torch.empty_like(tensor, device="meta")
        pieces[-1].append((end, like))
        end = math.ceil((end + like.nbytes) / ALIGNED) * ALIGNED
    found = []
    with torch.inference_mode(False):
        for places in pieces:
            last, like = places[-1]
            piece = _piece(last + like.nbytes, pinned=pinned)
            found += [_within(piece, start, like) for start, like in places]
    return found


def _copies(home: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The same on the device: soon, for whoever queues work there after this."""
    pieces: dict[int, Tensor] = {}
    found = []
    with torch.inference_mode(False):
        for tensor in home:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in pieces:
                piece = torch.empty(0, dtype=torch.uint8).set_(storage)
                pieces[storage.data_ptr()] = torch.empty_like(piece, device=device).copy_(piece, non_blocking=True)
            found.append(_within(pieces[storage.data_ptr()], int(tensor.storage_offset()) * tensor.itemsize, tensor))
    return found


def _within(piece: Tensor, start: int, like: Tensor) -> Tensor:
    """What lies in a piece from byte `start` on, as a tensor of another's type, shape and order."""
    return piece[start : start + like.nbytes].view(like.dtype).as_strided(like.shape, like.stride())


def _piece(size: int, *, pinned: bool) -> Tensor:
    if pinned:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            _log.debug("no pinned memory (%s); going on without", str(error).partition("\n")[0])
    return torch.empty(size, dtype=torch.uint8)


def _replace(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Put another tensor in place of each parameter and buffer, as `Module.to` does: what a layer has derived from its
    weights, it forgets."""
    with torch.inference_mode(False), torch.no_grad():  # what is kept must be usable outside inference mode too
        module._apply(change)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers in the order of `_replace`. Layers are made plain by this."""
    found: list[Tensor] = []
    _replace(module, lambda tensor: found.append(tensor.detach()) or tensor)  # type: ignore[func-returns-value]
    return found


def _place(module: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Let the module's weights be these."""
    places = iter(tensors)
    _replace(module, lambda _: next(places))


def _holds(module: nn.Module, tensors: Sequence[Tensor]) -> bool:
    """Whether the module's weights are these: neither converted nor exchanged since."""

    def seen(tensor: Tensor) -> tuple[object, ...]:
        return tensor.dtype, tensor.shape, tensor.stride(), tensor.device, tensor.data_ptr()

    return [*map(seen, _tensors(module))] == [*map(seen, tensors)]
