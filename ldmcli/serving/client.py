"""The client: a session whose model a server holds. Imports neither torch nor Pillow, nor what opens models."""

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from ldmcli.fitting import FittedRequest
from ldmcli.frozen import frozen
from ldmcli.images.formats import Encoding
from ldmcli.named_files import named_files
from ldmcli.serving.connection import Connection, GoneError, RefusedError
from ldmcli.serving.wire import error_from_dict, fitted_from_dict
from ldmcli.spec import GenerationRequest, ModelSpec, RuntimeSpec
from ldmcli.stopwatch import Stopwatch

if TYPE_CHECKING:
    from ldmcli.session import Session
    from ldmcli.session.picture import Picture

_OF_PROCESSES = ("/dev/", "/proc/")  # where a path may lead elsewhere in another process
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@frozen
class RemoteProgress:
    """How far pictures are that a server draws together, as `session.Progress` but for the latents."""

    requests: Sequence[FittedRequest]
    done: int
    steps: int
    seen: Sequence[tuple[int, int, bytes]]

    def preview(self) -> Sequence[tuple[int, int, bytes]]:
        """About what each picture is to become, at the steps for which the server was asked for it."""
        return self.seen


class RemotePicture:
    """A picture that came from the server as the bytes of its file; or what kept it from that."""

    failed = False

    def __init__(self, request: FittedRequest, message: dict[str, Any]) -> None:
        self.request = request
        self.seconds = float(message.get("seconds", 0.0))
        self._message = message

    def pixels(self) -> None:
        """Raises LdmError where the picture cannot be drawn. The pixels are in the file."""
        if self._message.get("of") == "pixels":
            raise error_from_dict(self._message["failure"])

    @property
    def data(self) -> bytes:
        """The bytes of its file. Raises as `Session.encode` does."""
        self.pixels()
        if "failure" in self._message:
            failure = self._message["failure"]
            raise ValueError(failure["message"]) if failure["class"] == "ValueError" else error_from_dict(failure)
        data = self._message["data"]
        assert isinstance(data, bytes)
        return data


class RemoteSession:
    """A `Session` of which a server holds the model; its pictures come as bytes of their files. Where the server
    refuses or is gone, this process goes on by itself, with its own words and errors."""

    def __init__(
        self,
        connection: Connection,
        open_here: "Callable[[], Session]",
        runtime: RuntimeSpec,
        encoding: Encoding,
        *,
        metadata: bool,
        preview: int = 0,
    ) -> None:
        """`preview`: after how many steps each Progress has what pictures are to become; 0 for never."""
        self._connection, self._open_here = connection, open_here
        self.here: Session | None = None  # what draws since the server does not
        self.stopwatch = Stopwatch()
        self.alone = False  # as a Session's, which does not matter to a server
        self._runtime_spec, self._encoding, self._metadata = runtime, encoding, metadata
        self._preview = preview
        self._facts: dict[str, Any] = {}
        self._identity: dict[str, Any] = {}  # comes with pictures

    @property
    def remote(self) -> bool:
        """Whether a server draws."""
        return self.here is None

    @property
    def loaded(self) -> bool:
        """Whether a server had the model in memory when it was asked."""
        return bool(self._facts.get("loaded")) if self.here is None else self.here.loaded

    @property
    def runtime_spec(self) -> RuntimeSpec:
        """Where and how it was asked to compute."""
        return self._runtime_spec

    @property
    def undecided(self) -> bool:
        """A server finds out by itself how a model was trained."""
        return self.here is not None and self.here.undecided

    @property
    def name(self) -> str:
        """As of a Session, and so are the others."""
        return self._local("name") if self.here else str(self._facts["name"])

    @property
    def family(self) -> str:
        return self._local("family") if self.here else str(self._facts["family"])

    @property
    def spec(self) -> ModelSpec:
        return self._home().spec

    @property
    def token_limit(self) -> int:
        return self._local("token_limit") if self.here else int(self._facts["token_limit"])

    @property
    def runtime(self) -> Any:
        return self._ask("runtime", lambda session: session.runtime)

    def open(self, model: ModelSpec) -> None:
        """Have the server look at the model. A name of the hub is looked up, and maybe fetched, here."""
        names = (model.model, model.vae, model.refiner, model.lora_dir, model.embedding_dir, model.upscaler)
        if any(map(is_of_process, (*names, model.image_encoder))):
            self._come_home(None)
            return
        where, runtime = os.getcwd(), self._runtime_spec
        fetched = fetched_of(names[:3], runtime)
        self._facts = self._ask("open", lambda session: {}, cwd=where, model=model, runtime=runtime, fetched=fetched)

    def fit(self, request: GenerationRequest) -> FittedRequest:
        if any(map(is_of_process, named_files(request))):
            self._come_home(None)
        return self._ask("fit", lambda session: session.fit(request), fitted_from_dict, request=request)

    def cut_text(self, text: str, request: FittedRequest) -> str:
        return self._ask("cut_text", lambda session: session.cut_text(text, request), text=text, request=request)

    def word_hint(self, request: FittedRequest) -> str:
        return self._ask("word_hint", lambda session: session.word_hint(request), request=request)

    def embeddings(self, request: FittedRequest, *, named: bool = False) -> list[dict[str, str]]:
        def here(session: "Session") -> list[dict[str, str]]:
            return session.embeddings(request, named=named)

        return self._ask("embeddings", here, request=request, named=named)

    def identity(self) -> dict[str, Any]:
        return self.here.identity() if self.here else self._identity

    def begin_hashing(self) -> "Future[str] | None":
        return self.here.begin_hashing() if self.here else None

    def prepare_encoding(self) -> None:
        if self.here:
            self.here.prepare_encoding()

    def load(self, first: Sequence[FittedRequest] = ()) -> None:
        self._ask("load", lambda session: session.load(first), first=list(first))

    def encode(self, picture: "Picture | RemotePicture", encoding: Encoding, *, metadata: bool = True) -> bytes:
        if isinstance(picture, RemotePicture):
            return picture.data
        return self._home().encode(picture, encoding, metadata=metadata)

    def close(self) -> None:
        self._connection.close()
        if self.here:
            self.here.close()

    def draw(
        self,
        requests: Iterable[FittedRequest],
        *,
        batch_size: int = 1,
        on_step: Callable[[Any], object] | None = None,
    ) -> Iterator[Any]:
        waiting = iter(requests)
        while batch := list(itertools.islice(waiting, batch_size)):
            came: list[RemotePicture] = []
            if self.here is None:
                try:
                    self._drawn(batch, on_step, came)
                except (GoneError, RefusedError) as error:
                    self._come_home(error)
            yield from came
            if len(came) < len(batch):
                from ldmcli.speed.linking import settle_down

                # Drawn as it would have been, so that it is the same.
                self._home().load(batch[:1])
                settle_down()
                drawn = self._home().draw(batch, batch_size=batch_size, on_step=on_step)
                yield from itertools.islice(drawn, len(came), None)

    def _drawn(
        self, batch: list[FittedRequest], on_step: Callable[[Any], object] | None, came: list[RemotePicture]
    ) -> None:
        first = 0  # of those that are drawn together just now

        def on_event(message: dict[str, Any]) -> None:
            nonlocal first
            if message["event"] == "picture":
                for name, seconds in message.get("phases", {}).items():
                    self.stopwatch.add(name, seconds)
                self._identity = message["identity"]
                came.append(RemotePicture(batch[len(came)], message))
                return
            done, steps, count = message["done"], message["steps"], message["count"]
            self.stopwatch.mark("first_step" if done else "ready")
            if on_step:
                on_step(RemoteProgress(batch[first : first + count], done, steps, message["preview"]))
            first += count if done == steps else 0

        how = {"encoding": self._encoding, "metadata": self._metadata, "preview": self._preview}
        self._connection.call("draw", on_event=on_event, requests=batch, **how)

    def _ask(
        self,
        name: str,
        here: "Callable[[Session], _Result]",
        read: Callable[[Any], _Result] = lambda reply: reply,
        **arguments: Any,
    ) -> _Result:
        """What the server answers, or what a session here does."""
        if self.here is None:
            try:
                return read(self._connection.call(name, **arguments))
            except (GoneError, RefusedError) as error:
                self._come_home(error)
        return here(self._home())

    def _local(self, name: str) -> Any:
        return getattr(self.here, name)

    def _home(self) -> "Session":
        self._come_home(None)
        assert self.here is not None
        return self.here

    def _come_home(self, error: Exception | None) -> None:
        """Go on in this process."""
        if self.here is not None:
            return
        if isinstance(error, GoneError) and self._facts:
            _log.warning("the server is gone; going on without it")
        elif error is not None:
            _log.debug("the server does not do it (%s); this process does", error)
        from ldmcli.speed.startup import quicken

        self._connection.leave()
        quicken()
        self.here = self._open_here()
        self.here.stopwatch = self.stopwatch


def is_of_process(path: str | bytes | None) -> bool:
    """Whether a path may name something else, or nothing, in another process."""
    if not isinstance(path, str):
        return False
    return os.path.realpath(os.path.expanduser(path)).startswith(_OF_PROCESSES)


def fetched_of(names: Iterable[str | None], runtime: RuntimeSpec) -> dict[str, str]:
    """Where models of the hub are that have these names, fetched if need be. Raises LdmError."""
    wanted = [name for name in names if name and "/" in name and not os.path.lexists(os.path.expanduser(name))]
    if not wanted:
        return {}
    from ldmcli.hub.listing import find_model

    return {name: os.path.abspath(find_model(name, half=runtime.dtype != "fp32")) for name in wanted}
