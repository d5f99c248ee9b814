"""Pictures on their way from a device."""

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ldmcli.spec import FittedRequest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ldmcli.pipeline import Drawn
    from ldmcli.speed.policy import Runtime


class Arrival:
    """What a device makes of pictures that are drawn together, copied to host memory as soon as it is there."""

    def __init__(self, drawn: "Drawn", started: float, before: "Arrival | None") -> None:
        """`started`: when the device was asked, s; `before`: the pictures that it draws first."""
        import torch

        self.latents = drawn.latents
        # Copies that are not waited for go to pinned memory.
        self._finite = drawn.finite.to("cpu", non_blocking=True)
        self._pixels = [pixels.to("cpu", non_blocking=True) for pixels in drawn.pixels]
        self._started = started
        self._before = before
        self._lock = threading.Lock()
        self._ended: float | None = None
        self._event: torch.cuda.Event | None = None
        if drawn.latents.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(drawn.latents.device))
        else:
            self.wait()

    def wait(self) -> float:
        """Until all is there; when that was, s. Raises what the device failed with."""
        with self._lock:
            if self._ended is None:
                before = self._before.wait() if self._before else 0.0
                if self._event is not None:
                    self._event.synchronize()
                self._ended = time.perf_counter()
                self._started = max(self._started, before)
                self._before = None
            return self._ended

    def seconds(self) -> float:
        """What each picture took."""
        return (self.wait() - self._started) / len(self._pixels)

    def picture(self, i: int) -> "tuple[np.ndarray, bool, bool]":
        """The i-th picture's pixels; whether its latents, and whether its image, were finite numbers."""
        self.wait()
        latents, image = self._finite[i].tolist()
        return self._pixels[i].numpy(), latents, image


class Picture:
    """One picture, which may still be on its way.

    `request` is what it was drawn from. `runtime` says how it was computed, in the words of the command line;
    `failure` is what kept it from being drawn, if anything did.
    """

    def __init__(
        self,
        request: FittedRequest,
        runtime: "Runtime",
        *,
        arrival: Arrival | None = None,
        place: int = 0,
        redraw: "Callable[[Picture, bool], Picture] | None" = None,
        failure: Exception | None = None,
    ) -> None:
        self.request = request
        self.failure = failure
        self._runtime = runtime
        self._arrival, self._place = arrival, place
        self._redraw = redraw
        self._found: np.ndarray | None = None
        self._lock = threading.Lock()

    def pixels(self) -> "np.ndarray":
        """(height, width, 3) uint8. Waits for the device; repeats in float32 what was not finite. Raises LdmError where
        the picture cannot be drawn, DeviceLostError where none can be any more."""
        with self._lock:
            if self.failure is not None:
                raise self.failure
            if self._found is None:
                assert self._arrival is not None
                found, latents_finite, image_finite = self._arrival.picture(self._place)
                if not (latents_finite and image_finite) and self._redraw:
                    again = self._redraw(self, latents_finite)
                    self._runtime, self._arrival, self._place = again._runtime, again._arrival, again._place
                    self.failure = again.failure
                    if self.failure is not None:
                        raise self.failure
                    assert self._arrival is not None
                    found, _, _ = self._arrival.picture(self._place)
                self._found = found
            return self._found

    @property
    def latents(self) -> "Tensor":
        """The latents (1, channels, height, width) that were decoded, on the device."""
        if self._arrival is None:
            self.pixels()
        assert self._arrival is not None
        return self._arrival.latents[self._place : self._place + 1]

    @property
    def seconds(self) -> float:
        """What it took; pictures that were drawn together share alike. 0 for one that failed."""
        return self._arrival.seconds() if self._arrival else 0.0

    @property
    def runtime(self) -> dict[str, str]:
        """Where and how it was computed."""
        return self._runtime.to_dict()
