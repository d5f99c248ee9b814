"""Batches to pictures, whatever goes wrong: one that fails never takes its neighbours with it."""

import dataclasses
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldmcli.conditioning.pairs import context_chunks
from ldmcli.conditioning.prompts import PromptEncoder
from ldmcli.conditioning.words import Words
from ldmcli.config import ModelConfig
from ldmcli.errors import LdmError, NotFiniteError, TryAgainError, printable
from ldmcli.fitting import FittedRequest
from ldmcli.pipeline.pipeline import Drawn, Pipeline
from ldmcli.session.picture import Arrival, Picture
from ldmcli.session.session import Progress
from ldmcli.spec import LoRA, RuntimeSpec
from ldmcli.speed.cpu.threads import choose_threads
from ldmcli.speed.memory import is_out_of_memory
from ldmcli.speed.policy import computing

if TYPE_CHECKING:
    from ldmcli.adapters.adapter import Use

_log = logging.getLogger(__name__)


class DeviceLostError(TryAgainError):
    """The device failed so that this process can use it no more; what is done stays done."""


class _Ended(BaseException):
    """What a caller's `on_step` raised, which is no fault of the pictures'."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__()
        self.cause = cause


def threads_for(spec: RuntimeSpec, config: ModelConfig, pictures: int) -> int:
    """How many threads suit so many pictures of a model on a CPU, unless `spec` says."""
    return choose_threads(spec.threads, config.unet, pictures=max(1, pictures), cores=spec.cores)


class Drawer:
    """Draws with a pipeline, and learns how many pictures of a size fit into memory at once. Whoever calls it holds
    `lock`; so do pictures while they are drawn again. `uses` says what is to be merged for LoRAs."""

    def __init__(
        self,
        pipeline: Pipeline,
        spec: RuntimeSpec,
        lock: threading.RLock,
        uses: "Callable[[Sequence[LoRA]], Sequence[Use]]",
    ) -> None:
        self.pipeline = pipeline
        self._uses = uses
        self._spec, self._lock = spec, lock
        self._most: dict[tuple[int, int], int] = {}  # pictures at once, for sizes that ran out of memory
        self._tiled: set[tuple[int, int]] = set()  # sizes whose latents are decoded in strips
        self._last: Arrival | None = None

    def draw(self, requests: Sequence[FittedRequest], on_step: Callable[[Progress], object]) -> list[Picture]:
        """Each request's picture, all that can be computed together at once. Raises DeviceLostError, and what `on_step`
        raises."""
        drawn: dict[int, Picture] = {}
        try:
            suitable = threads_for(self._spec, self.pipeline.config, len(requests))
            with computing(suitable):
                for group in self._alike(requests):
                    some = self._group([requests[i] for i in group], on_step)
                    drawn |= zip(group, some, strict=True)
        except _Ended as ended:
            raise ended.cause from None
        return [drawn[i] for i in range(len(requests))]

    def serve(
        self,
        uses: "Callable[[Sequence[LoRA]], Sequence[Use]]",
        words: Callable[[FittedRequest], Words],
    ) -> None:
        """Draw for another session, which says what is merged for LoRAs and which words stand for embeddings."""
        self._uses = uses
        for model in self.pipeline.models:
            if isinstance(model.prompts, PromptEncoder):
                model.prompts.words = words

    def close(self) -> None:
        """Give the memory of recorded steps back."""
        for model in self.pipeline.models:
            model.free_graphs()

    def _alike(self, requests: Sequence[FittedRequest]) -> list[list[int]]:
        """Which of the requests can be drawn together: those that agree in their settings and their prompts' lengths;
        each alone where one of them cannot even be read. In the order of each group's first."""
        groups: dict[object, list[int]] = {}
        model = self.pipeline.model
        for i, request in enumerate(requests):
            try:
                chunks = context_chunks(model.config, model.prompts, request)
            except LdmError:
                return [[i] for i in range(len(requests))]
            groups.setdefault((request.settings, chunks), []).append(i)
        return list(groups.values())

    def _group(self, requests: Sequence[FittedRequest], on_step: Callable[[Progress], object]) -> list[Picture]:
        """Pictures of requests that are alike, by halves where they cannot be drawn at once."""
        waiting, pictures = deque([requests]), []
        while waiting:
            some = waiting.popleft()
            most = min(self._most.get(some[0].final_size, len(some)), len(some))
            if len(some) > most:
                waiting.extendleft([some[most:], some[:most]])
                continue
            found = self._tried(some[0], functools.partial(self._drawn, some, on_step))
            if isinstance(found, Arrival):
                pictures += [self._picture(request, found, i) for i, request in enumerate(some)]
                continue
            if is_out_of_memory(found):
                self._most[some[0].final_size] = max(1, len(some) // 2)
                _log.info("out of memory drawing %d at once; going on with fewer", len(some))
            if len(some) == 1:
                pictures.append(self._rescued(some[0], found, on_step))
            else:
                half = len(some) // 2
                waiting.extendleft([some[half:], some[:half]])
        return pictures

    def _picture(self, request: FittedRequest, arrival: Arrival, place: int) -> Picture:
        return Picture(request, self.pipeline.runtime, arrival, place, self._again)

    def _drawn(self, requests: Sequence[FittedRequest], on_step: Callable[[Progress], object]) -> Arrival:
        started, steps = time.perf_counter(), sum(each.steps_taken for each in requests[0].passes)

        def step(done: int, latents: Tensor, denoised: Tensor | None) -> None:
            try:
                on_step(Progress(requests, done, steps, latents, functools.partial(self._preview, denoised)))
            except BaseException as error:
                raise _Ended(error) from None

        for request in (each for each in requests if each.inputs):
            from ldmcli.images.canvas import check_unchanged

            check_unchanged(request)
        self.pipeline.adapt(self._uses(requests[0].loras))
        drawn = self.pipeline.draw(requests, step)
        self._last = Arrival(drawn, started, self._last)
        return self._last

    def _preview(self, denoised: Tensor | None) -> list[tuple[int, int, bytes]]:
        """As of Progress: none where there is no room for it, which is no reason to end."""
        try:
            found = [] if denoised is None else self.pipeline.preview(denoised)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            found = []
        return [(one.shape[1], one.shape[0], one.numpy().tobytes()) for one in found]

    def _tried(self, request: FittedRequest, work: Callable[[], Arrival]) -> Arrival | Exception:
        """What `work` on pictures of this size gives, or raises."""
        self.pipeline.tile_vae = self._spec.vae_tiling or request.final_size in self._tiled
        try:
            return work()
        except torch.AcceleratorError as error:
            if not is_out_of_memory(error):
                raise DeviceLostError(f"the device failed ({_in_one_line(error)}); run again to go on.") from error
            failure: Exception = error
        except Exception as error:
            failure = error
        failure = failure.with_traceback(None)  # whose frames hold the tensors that left no room
        if is_out_of_memory(failure) and self.pipeline.runtime.device.type == "cuda":
            self.close()
            torch.cuda.empty_cache()
        return failure

    def _rescued(self, request: FittedRequest, failure: Exception, on_step: Callable[[Progress], object]) -> Picture:
        """The picture of a request that failed alone, drawn another way if there is one that may do."""
        for attempt in self._other_ways(request, failure, on_step):
            if isinstance(attempt, Arrival):
                return self._picture(request, attempt, 0)
            failure = attempt
        if is_out_of_memory(failure):
            failure = LdmError("out of memory, even alone and decoded in strips; ask for a smaller picture.")
        elif not isinstance(failure, LdmError):
            failure = LdmError(f"{_in_one_line(failure)}.")
        return Picture(request, self.pipeline.runtime, failure)

    def _other_ways(
        self, request: FittedRequest, failure: Exception, on_step: Callable[[Progress], object]
    ) -> Iterator[Arrival | Exception]:
        draw = functools.partial(self._drawn, [request], on_step)
        if is_out_of_memory(failure) and not self.pipeline.tile_vae:
            self._tiled.add(request.final_size)
            _log.info("out of memory drawing one picture; decoding its latents in strips")
            yield self._tried(request, draw)
        if is_out_of_memory(failure) and self.pipeline.stage.may_narrow:
            _log.info("out of memory drawing one picture; from now on only the part at work is on the device")

            def offloaded() -> Arrival:
                self.pipeline.offload()
                return draw()

            yield self._tried(request, offloaded)

    def _again(self, picture: Picture, latents_finite: bool) -> Picture:
        """A picture that came out with numbers which are not finite, once more in float32."""
        suitable = threads_for(self._spec, self.pipeline.config, 1)
        with self._lock, computing(suitable):
            found = self._tried(picture.request, functools.partial(self._in_float32, picture, latents_finite))
            if isinstance(found, Arrival):
                wide = dataclasses.replace(self.pipeline.runtime, dtype=torch.float32)
                runtime = self.pipeline.runtime if latents_finite else wide
                return Picture(picture.request, runtime, found)
            return self._rescued(picture.request, found, lambda progress: None)

    def _in_float32(self, picture: Picture, latents_finite: bool) -> Arrival:
        started = time.perf_counter()
        if latents_finite:
            pixels = self.pipeline.decode(picture.latents)
            canvases = [picture.canvas] if picture.canvas else []
            sound = torch.ones(1, 2, dtype=torch.bool)
            return Arrival(Drawn(picture.latents, [pixels], sound, canvases), started, None)
        if not self.pipeline.runtime.half:
            raise NotFiniteError("the U-Net gave numbers that are not finite; its weights may be damaged.")
        _log.info("numbers that are not finite in 16 bits; drawing the picture in float32")
        self.pipeline.adapt(self._uses(picture.request.loras))
        with self.pipeline.in_float32():
            drawn = self.pipeline.draw([picture.request])
            latents_finite, image_finite = drawn.finite[0].tolist()
            if not latents_finite:
                raise NotFiniteError("the U-Net gave numbers that are not finite; its weights may be damaged.")
            if not image_finite:
                raise NotFiniteError("the VAE gave numbers that are not finite; its weights may be damaged.")
            return Arrival(drawn, started, None)


def _in_one_line(error: Exception) -> str:
    """What went wrong, in one line."""
    return printable(f"{type(error).__name__}: {error}".strip().partition("\n")[0], 500)
