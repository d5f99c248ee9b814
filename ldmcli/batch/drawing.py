"""Items to pictures, whatever goes wrong: one that fails never takes its neighbours with it."""

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ldmcli.batch.items import Item
from ldmcli.errors import LdmError, NotFiniteError, TryAgainError, printable
from ldmcli.pipeline import Pipeline
from ldmcli.request import GenerationRequest
from ldmcli.runtime.memory import is_out_of_memory
from ldmcli.runtime.policy import Runtime

if TYPE_CHECKING:
    import numpy as np

_log = logging.getLogger(__name__)


class DeviceLostError(TryAgainError):
    """The device failed so that this process can use it no more; what is done stays done."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What became of an item: a picture, or an error in place of it."""

    item: Item
    pixels: "np.ndarray | None"  # (height, width, 3) uint8
    runtime: Runtime  # it was drawn with
    seconds: float = 0.0
    error: str = ""
    code: int = 0


class Artist:
    """Draws batches with a pipeline, and learns how many pictures of a size fit into memory at once."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._most: dict[tuple[int | None, int | None], int] = {}  # pictures at once, for sizes that ran out of memory
        self._tiled: set[tuple[int | None, int | None]] = set()  # sizes whose latents are decoded in strips
        self._always_tiled = pipeline.tile_vae

    def draw(self, items: Sequence[Item]) -> list[Drawn]:
        """Each item's picture or error, all that agree in settings and prompts' lengths drawn at once.

        Where that fails it is tried by halves, until those that fail are alone. Raises DeviceLostError.
        """
        drawn: list[Drawn] = []
        waiting = deque(self._alike(items))
        while waiting:
            some = waiting.popleft()
            most = self._most.get(_size(some[0]), len(some))
            if len(some) > most:
                waiting.extendleft([some[most:], some[:most]])
                continue
            found = self._attempt(some)
            if isinstance(found, list):
                drawn += found
                continue
            if is_out_of_memory(found):
                self._most[_size(some[0])] = max(1, len(some) // 2)
                _log.info("out of memory drawing %d at once; going on with fewer", len(some))
            if len(some) > 1:
                half = len(some) // 2
                waiting.extendleft([some[half:], some[:half]])
            else:
                drawn.append(self._rescued(some[0], found))
        return drawn

    def _alike(self, items: Sequence[Item]) -> list[list[Item]]:
        """The items in groups that can be drawn together; each alone where one of them cannot even be read."""
        of_request: dict[int, deque[Item]] = {}
        for item in items:
            of_request.setdefault(id(item.request), deque()).append(item)
        try:
            groups = self.pipeline.alike([item.request for item in items])
        except Exception:
            return [[item] for item in items]
        return [[of_request[id(request)].popleft() for request in group] for group in groups]

    def _attempt(self, items: Sequence[Item]) -> list[Drawn] | Exception:
        """The items' pictures, drawn at once, or why not."""
        self.pipeline.tile_vae = self._always_tiled or _size(items[0]) in self._tiled
        started = time.perf_counter()
        try:
            pictures = self.pipeline.draw([item.request for item in items])
        except torch.AcceleratorError as error:
            if not is_out_of_memory(error):
                raise DeviceLostError(f"the device failed ({_told(error)}); run again to go on.") from error
            failure: Exception = error
        except Exception as error:
            failure = error
        else:
            seconds = (time.perf_counter() - started) / len(items)
            runtime = self.pipeline.runtime
            return [Drawn(item, pixels, runtime, seconds) for item, pixels in zip(items, pictures, strict=True)]
        failure = failure.with_traceback(None)  # whose frames hold the tensors that left no room
        if is_out_of_memory(failure) and self.pipeline.runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        return failure

    def _rescued(self, item: Item, failure: Exception) -> Drawn:
        """The picture of an item that failed alone, drawn another way if there is one that may do."""
        if is_out_of_memory(failure) and not self.pipeline.tile_vae:
            self._tiled.add(_size(item))
            _log.info("out of memory drawing one picture; decoding its latents in strips")
            return self._again(item, lambda: self._attempt([item]))
        if isinstance(failure, NotFiniteError) and self.pipeline.runtime.half:
            _log.info("%s: numbers that are not finite in 16 bits; drawing it in float32", printable(item.id))
            return self._again(item, lambda: self._in_float32(item))
        return self._failed(item, failure)

    def _again(self, item: Item, attempt: Callable[[], list[Drawn] | Exception]) -> Drawn:
        found = attempt()
        return found[0] if isinstance(found, list) else self._failed(item, found)

    def _in_float32(self, item: Item) -> list[Drawn] | Exception:
        try:
            with self.pipeline.in_float32():
                return self._attempt([item])
        except (RuntimeError, MemoryError) as error:  # no room to widen the weights
            return error

    def _failed(self, item: Item, failure: Exception) -> Drawn:
        if is_out_of_memory(failure):
            failure = LdmError("out of memory, even alone and decoded in strips; ask for a smaller picture.")
        code = failure.exit_code if isinstance(failure, LdmError) else 1
        return Drawn(item, None, self.pipeline.runtime, error=_told(failure), code=code)


def _size(item: Item) -> tuple[int | None, int | None]:
    request: GenerationRequest = item.request
    return request.width, request.height


def _told(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, LdmError):
        return str(error)
    return printable(f"{type(error).__name__}: {error}".strip().partition("\n")[0], 500)
