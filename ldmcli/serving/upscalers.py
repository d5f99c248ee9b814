"""Pictures made larger for clients: by networks that stay in memory, and by models that draw."""

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldmcli.images.formats import Encoding
from ldmcli.serving.jobs import Job
from ldmcli.serving.openings import Openings
from ldmcli.serving.place import in_folder
from ldmcli.serving.work import Work
from ldmcli.session import Session
from ldmcli.session.diffusion_upscaler import DiffusionUpscaler
from ldmcli.spec import ModelSpec, RuntimeSpec
from ldmcli.upscaling.larger import Enlargement, larger_file, read_file
from ldmcli.upscaling.target import Enlarger, Target
from ldmcli.upscaling.upscaler import EMBEDDED_UPSCALER, Upscaler, UpscalerFile, open_upscaler

_KEPT = 2


@dataclasses.dataclass(frozen=True)
class UpscalerSpec:
    """Which network enlarges, and where and in what numbers it computes."""

    name: str
    allow_pickle: bool = False
    device: str = "auto"
    dtype: str = "auto"


class Upscalers:
    """The networks that enlarged last, in memory. The thread that works uses it."""

    def __init__(self) -> None:
        self._held: dict[UpscalerSpec, tuple[UpscalerFile, Upscaler]] = {}

    def get(self, spec: UpscalerSpec) -> Upscaler:
        """The network, read anew where its file has changed. Raises LdmError."""
        from ldmcli.speed.policy import choose_runtime

        runtime = choose_runtime(RuntimeSpec(device=spec.device, dtype=spec.dtype))  # which says what it chose
        held = self._held.pop(spec, None)
        if held is None or held[0].weights.changed:
            file = open_upscaler(spec.name, allow_pickle=spec.allow_pickle)
            held = file, Upscaler(file, runtime, asked=spec.dtype != "auto")
        self._held[spec] = held
        while len(self._held) > _KEPT:
            del self._held[next(iter(self._held))]
        return held[1]


class Enlarging:
    """What one client has enlarged, and by what."""

    def __init__(
        self,
        work: Work,
        openings: Openings,
        upscalers: Upscalers,
        hear: Callable[[logging.LogRecord], object],
        tell: Callable[[dict[str, Any]], object],
    ) -> None:
        """`hear` gets what is logged of opening a model, `tell` how far a picture is, and then its file."""
        self._work, self._openings, self._upscalers, self._hear, self._tell = work, openings, upscalers, hear, tell
        self._folder, self._spec = "/", UpscalerSpec(EMBEDDED_UPSCALER)
        self.session: Session | None = None  # of a model that draws
        self._settings: dict[str, Any] = {}

    def open(
        self,
        cwd: str,
        upscaler: str,
        allow_pickle: bool,
        device: str,
        dtype: str,
        drawing: dict[str, Any] | None,
        tile: int | None,
        fetched: dict[str, str],
    ) -> str:
        """Look at the network, or the model that draws as the settings in `drawing` say. Raises LdmError."""
        self._folder = cwd
        if drawing is None:
            with in_folder(cwd):
                file = open_upscaler(upscaler, allow_pickle=allow_pickle)
            known = upscaler if upscaler == EMBEDDED_UPSCALER else os.path.join(cwd, file.weights.path)
            self._spec = UpscalerSpec(known, allow_pickle, device, dtype)
            return file.name
        model, runtime = ModelSpec(upscaler, allow_pickle=allow_pickle), RuntimeSpec(device=device, dtype=dtype)
        own = self._openings.session(cwd, model, runtime, fetched, self._hear)
        with in_folder(cwd):
            resolved = own.resolved
            name = DiffusionUpscaler(own, drawing, tile).name
        self.session, self._settings = self._work.session(resolved, runtime), drawing
        return name

    def prepared(self, source: str, how: dict[str, Any]) -> Callable[[Job], None]:
        """What a job does that enlarges a picture, which is read now. Raises LdmError."""
        asked = how | {"target": Target(**how["target"]), "encoding": Encoding(**how["encoding"])}
        enlargement = Enlargement(**asked)
        with in_folder(self._folder):
            picture, text = read_file(Path(source), enlargement)

        def enlarge(job: Job) -> None:
            def on_tile(done: int, total: int) -> None:
                job.check()
                self._tell({"event": "tile", "done": done, "total": total})

            upscaler, started = self._upscaler(enlargement.tile), time.perf_counter()
            data, size = larger_file(picture, text, upscaler, enlargement, on_tile)
            seconds = time.perf_counter() - started
            self._tell({"event": "picture", "data": data, "size": size, "name": upscaler.name, "seconds": seconds})

        return enlarge

    def _upscaler(self, tile: int | None) -> Enlarger:
        if self.session is None:
            return self._upscalers.get(self._spec)
        return DiffusionUpscaler(self.session, self._settings, tile)
