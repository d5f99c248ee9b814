"""Between host and device without waiting: neither for what the device still has to do, nor it for the host."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


class Delivery:
    """Tensors on their way from a device to host memory; the device goes on with what it is asked for after them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Copies that are not waited for go to pinned memory.
        self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._arrived: torch.cuda.Event | None = None
        if tensors and tensors[0].is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[Tensor]:
        """The tensors, once they are there. Raises what the device failed with on the way."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors


class Sideline:
    """A second queue of a GPU, for small work that need not wait behind what the first one holds.

    The first queue reads what this one made inside `reading` alone, and either may give its memory up at any time: it
    is used again only after what has read it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._read: torch.cuda.Event | None = None  # after all that was queued while reading

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """The first queue may read, inside the block, what this one made."""
        self._read = None
        yield
        if self._device.type == "cuda":
            self._read = torch.cuda.Event()
            self._read.record(torch.cuda.current_stream(self._device))

    def run(self, work: Callable[[], object]) -> None:
        """Do `work` in the second queue, and wait until the device is done with it. On a CPU, just do it."""
        if self._device.type != "cuda":
            work()
            return
        self._stream = self._stream or torch.cuda.Stream(self._device)
        if self._read is None:  # it may still read or make, behind all that it holds, what work looks at
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        else:
            self._stream.wait_event(self._read)
        try:
            with torch.cuda.stream(self._stream):
                work()
        finally:
            self._stream.synchronize()
