"""One model, opened, loaded on first need, and drawn with."""

import dataclasses
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ldmcli.config import UNDECIDED, ModelConfig
from ldmcli.disk.hashes import user_hashes
from ldmcli.errors import LdmError
from ldmcli.fitting import FittedRequest
from ldmcli.frozen import frozen
from ldmcli.images.formats import Encoding
from ldmcli.named_files import shareable
from ldmcli.session.opened import Opened, open_spec
from ldmcli.spec import GenerationRequest, LoRA, ModelSpec, RuntimeSpec
from ldmcli.stopwatch import Stopwatch

if TYPE_CHECKING:
    from torch import Tensor

    from ldmcli.conditioning.known_words import WordList
    from ldmcli.networks.unet import UNet
    from ldmcli.session.drawing import Drawer
    from ldmcli.session.picture import Picture
    from ldmcli.speed.policy import Runtime
    from ldmcli.upscaling.upscaler import Upscaler

PROBED = "%s: prediction type %s, as its network answers; --prediction-type would override"
_log = logging.getLogger(__name__)


class CancelledError(LdmError):
    """Drawing was cancelled by `Session.cancel`."""


@frozen
class Progress:
    """How far pictures that are drawn together are: `done` of `steps`, from 0 on. What is written into `latents`
    (pictures, channels, height, width) is what the sampler goes on with. `preview` gives about what each picture is to
    become, small: its width, height and RGB bytes; none at the beginning. It is to be called before the next step."""

    requests: Sequence[FittedRequest]
    done: int
    steps: int
    latents: "Tensor"
    preview: Callable[[], Sequence[tuple[int, int, bytes]]]


class Session:
    """A model held in memory: opened from headers alone, read at the first draw, drawn with as often as asked.

    It may be used from any thread; one batch is drawn at a time. Use it in a `with` block, or close it, to give its
    memory back. Nothing of the process but torch's number of threads, while it draws, is touched.
    """

    remote = False  # whether another process draws

    def __init__(
        self,
        model: ModelSpec = ModelSpec(),
        runtime: RuntimeSpec = RuntimeSpec(),
        *,
        exact: bool = False,
        fetched: Mapping[str, str] | None = None,
        opened: Opened | None = None,
    ) -> None:
        """Look at the model's files, fetching what the hub has, but for what is `fetched` already, paths by name; not
        where they are `opened`. `exact`: wait for the device at the end of every phase, so that the stopwatch's times
        are the device's. Raises LdmError for what is not there or not as it should be."""
        self.runtime_spec = runtime
        self.stopwatch = Stopwatch()
        self.alone = False  # whether one picture is all that is to be drawn; to be said before `runtime` is asked for
        self._opened = opened or open_spec(model, half=runtime.dtype != "fp32", fetched=fetched)
        self._as_opened = self._opened  # before the model was asked for what its files do not say
        self._exact = exact
        self._runtime: Runtime | None = None
        self._unet: UNet | None = None  # where it had to be read to know what the model is
        self._drawer: Drawer | None = None
        self._upscaler: Upscaler | None = None
        self._sha256: Future[str] | None = None
        self._lock = threading.RLock()
        self._drawing: weakref.WeakSet[threading.Event] = weakref.WeakSet()

    @property
    def config(self) -> ModelConfig:
        """What the model is made of. Where only its U-Net can tell how it was trained, that is read here."""
        return self._settled().model.config

    @property
    def undecided(self) -> bool:
        """Whether fitting a request takes the U-Net, for nothing else tells how it was trained."""
        return self._opened.model.config.schedule.prediction_type == UNDECIDED

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._drawer is not None

    @property
    def changed(self) -> bool:
        """Whether a file of the model is another now than the one that was opened, or gone."""
        return self._opened.changed

    def again(self, fetched: Mapping[str, str]) -> "Session | None":
        """Another session of the same files, which are not looked at again; None where one has changed, or a name leads
        elsewhere now."""
        from ldmcli.hub.listing import find_here

        paths = self._opened.paths
        if self.changed or paths != {name: Path(fetched.get(name) or find_here(name) or "") for name in paths}:
            return None
        unused = dataclasses.replace(self._as_opened, _upscalers={}, _library=[])
        return Session(unused.spec, self.runtime_spec, opened=unused)

    def refresh(self) -> None:
        """Look at embeddings anew when they are next asked for; files of LoRAs are compared at every use."""
        self._opened.forget_words()

    @property
    def resolved(self) -> ModelSpec:
        """The model, named so that it is found from any folder and without the hub."""
        return self._opened.resolved

    def share(self, other: "Session") -> None:
        """Take over what another session of the same weights knows of them: their hash, and what they predict. This one
        then encodes pictures that the other has drawn."""
        if self.undecided:
            from ldmcli.checkpoints.source import with_prediction_type

            found = other.config.schedule.prediction_type
            self._opened = dataclasses.replace(self._opened, model=with_prediction_type(self._opened.model, found))
            _log.info(PROBED, self.name, found)
        self._sha256 = other.begin_hashing()

    def draws_as(self, other: "Session") -> bool:
        """Whether the two draw with the same networks, but for what finds LoRAs and embeddings, and enlarges."""
        specs = self._opened.spec.weights, other._opened.spec.weights
        return specs[0] == specs[1] and self.runtime_spec == other.runtime_spec and not other.changed

    def take_over(self, other: "Session") -> None:
        """Have the weights that another session, which draws as this one, holds in memory. It then holds none."""
        self.share(other)
        with other._lock:
            drawer, other._drawer, other._upscaler = other._drawer, None, None
            self._lock, self.stopwatch, self._unet = other._lock, other.stopwatch, None
            if drawer:
                drawer.serve(self._opened.uses, self._opened.words)
            self._drawer = drawer

    @property
    def family(self) -> str:
        """The model's family."""
        return self._opened.model.config.family

    @property
    def name(self) -> str:
        """The model's name."""
        return self._opened.model.name

    @property
    def spec(self) -> ModelSpec:
        """The model as it was named; with its prediction type where that had to be found out."""
        found = self.config.schedule.prediction_type
        unknown = self._opened.spec.prediction_type is None and self._unet is not None
        return dataclasses.replace(self._opened.spec, prediction_type=found) if unknown else self._opened.spec

    @property
    def runtime(self) -> "Runtime":
        """Where and how it computes. Imports torch. Raises UsageError where what was asked for cannot be met."""
        if self._runtime is None:
            from ldmcli.speed.policy import choose_runtime, wait_for

            self._runtime = choose_runtime(self.runtime_spec, alone=self.alone)
            if self._exact:
                self.stopwatch.settle = wait_for(self._runtime.device)
            model = dataclasses.replace(self._opened.model, half=self._runtime.half)
            refiner = self._opened.refiner and dataclasses.replace(self._opened.refiner, half=self._runtime.half)
            self._opened = dataclasses.replace(self._opened, model=model, refiner=refiner)
        return self._runtime

    @property
    def token_limit(self) -> int:
        """How many tokens of a prompt the model reads, or of each chunk of it; begin and end marks not counted."""
        return self._opened.token_limit

    def fit(self, request: GenerationRequest) -> FittedRequest:
        """The request with the model's own in place of what it leaves open, and its LoRAs found. Raises UsageError
        where the model, or this machine's memory, cannot draw it, MissingInputError or BadDataError where a LoRA is not
        there or not for the model."""
        hashes = user_hashes(enabled=self.runtime_spec.cache)
        return self._settled().fit(request, hashes, tiled=self.runtime_spec.vae_tiling)

    def find_lora(self, lora: LoRA) -> LoRA:
        """A LoRA with its path and hash; the model is not asked. Raises LdmError where it is not there, or none."""
        return self._opened.adapters.found(lora)

    def lora_names(self) -> list[str]:
        """What prompts call the LoRAs in the folder that the model's spec names. Raises MissingInputError."""
        return self._opened.adapters.names()

    def cut_text(self, text: str, request: GenerationRequest | FittedRequest) -> str:
        """What of a prompt of `request` the model does not read: "" if it reads all. Raises UsageError if something is
        cut off and the request says that this is an error."""
        return self._opened.cut_text(text, request)

    def unknown_words(self, request: GenerationRequest | FittedRequest) -> list[str]:
        """Words of the prompt that the model does not know, by the list in its folder; none without one."""
        return self._opened.unknown_words(request)

    def word_hint(self, request: GenerationRequest | FittedRequest) -> str:
        """A sentence on such words, with some that it does know; "" where there are none."""
        unknown = self.unknown_words(request)
        return self.word_list.hint(self.name, unknown) if unknown else ""

    @property
    def word_list(self) -> "WordList":
        """What the model knows, by the list in its folder. Raises BadDataError where that is damaged."""
        return self._opened.model.word_list

    def identity(self) -> dict[str, Any]:
        """Name, path and SHA-256 of the weights, and what else a picture's record says of them. Waits for the hash."""
        return self._opened.identity(self.begin_hashing().result())

    def embeddings(self, request: GenerationRequest | FittedRequest, *, named: bool = False) -> list[dict[str, str]]:
        """Name, word, path and SHA-256 of each embedding that prompts of `request` use, as a picture's record has them;
        with `named` also of all that it names itself. Those that come with a LoRA are not among them. Raises LdmError
        where one is damaged or not for the model."""
        return self._opened.embeddings(request, user_hashes(enabled=self.runtime_spec.cache), named=named)

    def encode(self, picture: "Picture", encoding: Encoding = Encoding(), *, metadata: bool = True) -> bytes:
        """A picture as the bytes of a file, a PNG unless `encoding` says otherwise. Its `metadata` says how it was
        made: A1111's text, and our record, from which it can be drawn again; for that it waits for the weights' hash.
        Raises as `Picture.pixels` does, and UsageError where the format cannot hold the size."""
        from ldmcli.images.encode import encode_pixels

        pixels = picture.pixels()
        return encode_pixels(pixels, self.record(picture) if metadata else {}, encoding)

    def record(self, picture: "Picture") -> dict[str, str]:
        """What the file of a picture says of how it was made, by keyword. Raises as `encode`."""
        from ldmcli.images.metadata import text_chunks, with_upscaling

        pixels = picture.pixels()
        # Which of several GPUs it was makes no difference.
        runtime = picture.runtime | {"device": picture.runtime["device"].partition(":")[0]}
        request, family = picture.request, self._opened.model.config.family
        embeddings = self.embeddings(request)
        model = self.identity() | ({"embeddings": embeddings} if embeddings else {})
        recorded, inputs = shareable(request.recorded), dict(request.inputs)
        text = text_chunks(recorded, model, runtime, family=family, schedule=request.schedule, inputs=inputs)
        if picture.enlarged:
            name, scale = picture.enlarged
            text = with_upscaling(text, name, by=scale, size=(pixels.shape[1], pixels.shape[0]))
        return text

    def prepare_encoding(self) -> None:
        """Import now what writes pictures."""
        from ldmcli.images.encode import prepare

        prepare()

    def begin_hashing(self) -> "Future[str]":
        """Find the weights' SHA-256 in a thread, beside whatever else is done."""
        if self._sha256 is None:
            self._sha256 = self._opened.model.sha256(user_hashes(enabled=self.runtime_spec.cache))
        return self._sha256

    def draw(
        self,
        requests: Iterable[GenerationRequest | FittedRequest],
        *,
        batch_size: int = 1,
        on_step: Callable[[Progress], object] | None = None,
    ) -> Iterator["Picture"]:
        """A picture for each request, in order; up to `batch_size` at a time are computed together as far as they agree
        in all but prompts and seed. Requests are taken as they are needed.

        A picture that cannot be drawn says so when its pixels are asked for, and takes no other with it: a batch that
        runs out of memory is drawn by halves, then decoded in strips, then offloaded part by part. `on_step` hears of
        the beginning and of every step; what it raises ends the drawing. Raises CancelledError after `cancel`, and
        DeviceLostError where the device cannot be used any more.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is not 1 or more")
        cancelled = threading.Event()
        self._drawing.add(cancelled)

        def step(progress: Progress) -> None:
            if cancelled.is_set():
                raise CancelledError("drawing was cancelled.")
            if on_step:
                on_step(progress)

        def drawn() -> "Iterator[Picture]":
            waiting = iter(requests)
            while batch := list(itertools.islice(waiting, batch_size)):
                yield from self._draw([r if isinstance(r, FittedRequest) else self.fit(r) for r in batch], step)

        return drawn()

    def cancel(self) -> None:
        """Have every `draw` that was called so far end at its next step."""
        for cancelled in list(self._drawing):
            cancelled.set()

    def load(self, first: Sequence[FittedRequest] = ()) -> None:
        """Read the model now, unless it is there; the prompts of `first` are encoded meanwhile."""
        self._loaded(first)

    def close(self) -> None:
        """Give the memory back. What was drawn stays; drawing again reads the model again."""
        with self._lock:
            if self._drawer is not None:
                self._drawer.close()
            self._drawer = self._unet = self._upscaler = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _loaded(self, first: Sequence[FittedRequest]) -> "Drawer":
        with self._lock:
            if self._drawer is None:
                self._drawer = self._read(first)
            if self._opened.upscaler and self._upscaler is None:
                from ldmcli.upscaling.upscaler import Upscaler

                self._upscaler = Upscaler(self._opened.upscaler, self.runtime)
            return self._drawer

    def _read(self, first: Sequence[FittedRequest]) -> "Drawer":
        from ldmcli.session.drawing import Drawer, threads_for
        from ldmcli.session.loading import load
        from ldmcli.speed.policy import computing

        runtime, started = self.runtime, time.perf_counter()
        opened = self._settled()
        suitable = threads_for(self.runtime_spec, opened.model.config, len(first))
        with computing(suitable):
            pipeline = load(opened, runtime, unet=self._unet, first=first, stopwatch=self.stopwatch)
        self._unet = None
        _log.debug("%s loaded in %.2f s: %s", self.name, time.perf_counter() - started, runtime.to_dict())
        return Drawer(pipeline, self.runtime_spec, self._lock, opened.uses)

    def _draw(self, batch: Sequence[FittedRequest], on_step: Callable[[Progress], object]) -> "list[Picture]":
        with self._lock:
            pictures = self._loaded(batch).draw(batch, on_step)
            if upscaler := self._upscaler:
                for picture in pictures:
                    picture.finish, picture.enlarged = upscaler.enlarged, (upscaler.name, upscaler.scale)
            return pictures

    def _settled(self) -> Opened:
        if self.undecided:
            from ldmcli.session.loading import settle

            runtime = self.runtime
            with self._lock:  # threads that come second find it settled
                if self.undecided:
                    self._opened, self._unet = settle(self._opened, runtime)
                    _log.info(PROBED, self.name, self._opened.model.config.schedule.prediction_type)
        return self._opened
