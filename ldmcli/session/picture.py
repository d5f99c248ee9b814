"""Pictures on their way from a device."""

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ldmcli.fitting import FittedRequest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ldmcli.images.canvas import Canvas
    from ldmcli.pipeline.pipeline import Drawn
    from ldmcli.speed.policy import Runtime


class Arrival:
    """What a device makes of pictures that are drawn together, copied to host memory as soon as it is there."""

    def __init__(self, drawn: "Drawn", started: float, before: "Arrival | None") -> None:
        """`started`: when the device was asked, s; `before`: the pictures that it draws first."""
        import torch

        self.latents, self.canvases = drawn.latents, drawn.canvases
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
    """One picture, which may still be on its way. `request` is what it is drawn from."""

    def __init__(
        self,
        request: FittedRequest,
        runtime: "Runtime",
        source: Arrival | Exception,
        place: int = 0,
        redraw: "Callable[[Picture, bool], Picture] | None" = None,
    ) -> None:
        """`source` brings it, at `place`, or is what kept it from being drawn. `redraw` draws it once more where its
        numbers are not finite; it hears whether the latents' were."""
        self.request = request
        self._runtime = runtime
        self._source, self._place = source, place
        self._redraw = redraw
        self.finish: Callable[[np.ndarray], np.ndarray] | None = None  # what is done with the pixels, such as upscaling
        self.enlarged: tuple[str, int] | None = None  # the upscaler's name, and how many times as large
        self._found: np.ndarray | None = None
        self._lock = threading.Lock()

    def pixels(self) -> "np.ndarray":
        """(height, width, 3) uint8. Waits for the device; repeats in float32 what was not finite. Raises LdmError where
        the picture cannot be drawn, DeviceLostError where none can be any more."""
        with self._lock:
            if self._found is None:
                found = self._finished()
                self._found = self.finish(found) if self.finish else found
                self._redraw = self.finish = None  # they hold models
            return self._found

    @property
    def failed(self) -> bool:
        """Whether it is known by now that it cannot be drawn; `pixels` says why."""
        return isinstance(self._source, Exception)

    @property
    def latents(self) -> "Tensor":
        """The latents (1, channels, height, width) that are decoded, on the device. Raises LdmError where there are
        none."""
        return self._arrival.latents[self._place : self._place + 1]

    @property
    def canvas(self) -> "Canvas | None":
        """What of a given picture it is drawn on."""
        canvases = self._arrival.canvases
        return canvases[self._place] if canvases else None

    @property
    def seconds(self) -> float:
        """What it took; pictures that were drawn together share alike. 0 for one that failed."""
        return 0.0 if isinstance(self._source, Exception) else self._source.seconds()

    @property
    def runtime(self) -> dict[str, str]:
        """Where and how it was computed, in the words of the command line."""
        return self._runtime.to_dict()

    @property
    def _arrival(self) -> Arrival:
        if isinstance(self._source, Exception):
            raise self._source
        return self._source

    def _finished(self) -> "np.ndarray":
        arrival = self._arrival
        pixels, latents_finite, image_finite = arrival.picture(self._place)
        if (latents_finite and image_finite) or self._redraw is None:
            return arrival.canvases[self._place].finished(pixels) if arrival.canvases else pixels
        again = self._redraw(self, latents_finite)
        self._runtime, self._source, self._place, self._redraw = again._runtime, again._source, again._place, None
        return self._finished()
