"""Items to pictures, whatever goes wrong: one that fails never takes its neighbours with it."""

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from ldmcli.batch.items import Item
from ldmcli.errors import LdmError, NotFiniteError, TryAgainError, printable
from ldmcli.pipeline import Begun, Pipeline
from ldmcli.spec import GenerationRequest
from ldmcli.speed.memory import is_out_of_memory
from ldmcli.speed.policy import Runtime

if TYPE_CHECKING:
    import numpy as np

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


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


@dataclasses.dataclass(frozen=True)
class Asked:
    """Items whose pictures the device was asked for."""

    items: Sequence[Item]
    begun: Begun
    runtime: Runtime
    started: float  # s


class Artist:
    """Draws batches with a pipeline, and learns how many pictures of a size fit into memory at once."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._most: dict[tuple[int | None, int | None], int] = {}  # pictures at once, for sizes that ran out of memory
        self._tiled: set[tuple[int | None, int | None]] = set()  # sizes whose latents are decoded in strips
        self._always_tiled = pipeline.tile_vae
        self._finished = 0.0  # when the last pictures were, s

    def draw(self, items: Sequence[Item]) -> list[Drawn]:
        """Each item's picture or error, all that agree in settings and prompts' lengths drawn at once.

        Where that fails it is tried by halves, until those that fail are alone. Raises DeviceLostError.
        """
        return self._drawn(self._alike(items))

    @property
    def works_ahead(self) -> bool:
        """Whether a batch is best begun before the one before is finished."""
        return self.pipeline.works_ahead

    def begin(self, items: Sequence[Item]) -> list[Asked | list[Drawn]]:
        """Ask the device for a batch, and wait for none of it. What cannot be asked for at once is drawn here.

        Raises DeviceLostError, for what went wrong in batches before this one too.
        """
        return [self._asked(some) for some in self._fitting(self._alike(items))]

    def finish(self, batch: Iterable[Asked | list[Drawn]]) -> list[Drawn]:
        """As `draw`, of a batch that was begun; batches are finished in that order."""
        drawn: list[Drawn] = []
        for some in batch:
            if isinstance(some, Asked):
                found = self._finish(some)
                drawn += found if isinstance(found, list) else self._apart(some.items, found)
            else:
                drawn += some
        return drawn

    def _drawn(self, groups: Iterable[Sequence[Item]]) -> list[Drawn]:
        """The pictures or errors of items, those of a group drawn at once where that can be."""
        drawn: list[Drawn] = []
        for some in self._fitting(groups):
            found = self._attempt(some)
            drawn += found if isinstance(found, list) else self._apart(some, found)
        return drawn

    def _fitting(self, groups: Iterable[Sequence[Item]]) -> Iterator[Sequence[Item]]:
        """The groups in parts that fit into memory, as far as is known when each is asked for."""
        waiting = deque(groups)
        while waiting:
            some = waiting.popleft()
            most = self._most.get(_size(some[0]), len(some))
            if len(some) > most:
                waiting.extendleft([some[most:], some[:most]])
            else:
                yield some

    def _apart(self, items: Sequence[Item], failure: Exception) -> list[Drawn]:
        """The pictures or errors of items that failed together: by halves, or of one alone, rescued if it can be."""
        if is_out_of_memory(failure):
            self._most[_size(items[0])] = max(1, len(items) // 2)
            _log.info("out of memory drawing %d at once; going on with fewer", len(items))
        if len(items) == 1:
            return [self._rescued(items[0], failure)]
        half = len(items) // 2
        return self._drawn([items[:half], items[half:]])

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
        started = time.perf_counter()
        pictures = self._tried(items, lambda: self.pipeline.draw([item.request for item in items]))
        return pictures if isinstance(pictures, Exception) else self._told_of(items, pictures, started)

    def _asked(self, items: Sequence[Item]) -> Asked | list[Drawn]:
        started = time.perf_counter()
        begun = self._tried(items, lambda: self.pipeline.begin([item.request for item in items]))
        if isinstance(begun, Exception):
            return self._apart(items, begun)
        return Asked(items, begun, self.pipeline.runtime, started)

    def _finish(self, asked: Asked) -> list[Drawn] | Exception:
        pictures = self._tried(asked.items, lambda: self.pipeline.finish(asked.begun))
        if isinstance(pictures, Exception):
            return pictures
        drawn = self._told_of(asked.items, pictures, max(asked.started, self._finished), asked.runtime)
        self._finished = time.perf_counter()
        return drawn

    def _told_of(
        self, items: Sequence[Item], pictures: "list[np.ndarray]", started: float, runtime: Runtime | None = None
    ) -> list[Drawn]:
        seconds = (time.perf_counter() - started) / len(items)
        runtime = runtime or self.pipeline.runtime
        return [Drawn(item, pixels, runtime, seconds) for item, pixels in zip(items, pictures, strict=True)]

    def _tried(self, items: Sequence[Item], work: Callable[[], _Result]) -> _Result | Exception:
        """What `work` on these items gives, or raises."""
        self.pipeline.tile_vae = self._always_tiled or _size(items[0]) in self._tiled
        try:
            return work()
        except torch.AcceleratorError as error:
            if not is_out_of_memory(error):
                raise DeviceLostError(f"the device failed ({_told(error)}); run again to go on.") from error
            failure: Exception = error
        except Exception as error:
            failure = error
        failure = failure.with_traceback(None)  # whose frames hold the tensors that left no room
        if is_out_of_memory(failure) and self.pipeline.runtime.device.type == "cuda":
            for model in self.pipeline.models():
                model.free_graphs()
            torch.cuda.empty_cache()
        return failure

    def _rescued(self, item: Item, failure: Exception) -> Drawn:
        """The picture of an item that failed alone, drawn another way if there is one that may do."""
        if is_out_of_memory(failure) and not self.pipeline.tile_vae:
            self._tiled.add(_size(item))
            _log.info("out of memory drawing one picture; decoding its latents in strips")
            return self._again(item, lambda: self._attempt([item]), self._rescued)
        if is_out_of_memory(failure) and self.pipeline.stage.may_narrow:
            _log.info("out of memory drawing one picture; from now on only the part at work is on the device")
            return self._again(item, lambda: self._offloaded(item), self._failed)
        if isinstance(failure, NotFiniteError) and self.pipeline.runtime.half:
            _log.info("%s: numbers that are not finite in 16 bits; drawing it in float32", printable(item.id))
            return self._again(item, lambda: self._in_float32(item), self._failed)
        return self._failed(item, failure)

    def _again(
        self, item: Item, attempt: Callable[[], list[Drawn] | Exception], then: Callable[[Item, Exception], Drawn]
    ) -> Drawn:
        found = attempt()
        return found[0] if isinstance(found, list) else then(item, found)

    def _offloaded(self, item: Item) -> list[Drawn] | Exception:
        failure = self._tried([item], self.pipeline.offload)
        return failure if isinstance(failure, Exception) else self._attempt([item])

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
