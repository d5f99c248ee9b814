"""The options by which `ldm serve` answers over HTTP, and what they start."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ldmcli.cli.options import option, together
from ldmcli.errors import UsageError, printable
from ldmcli.spec import ModelSpec, RuntimeSpec

if TYPE_CHECKING:
    from ldmcli.serving.work import Work

_log = logging.getLogger(__name__)

http_options = together(
    option("--http", metavar="[HOST:]PORT",
           help="Answer OpenAI's and AUTOMATIC1111's calls too, with the models that -m names and the embedded one; on "
           "this machine alone unless HOST says otherwise."),
    option("--host", metavar="HOST", help="HOST of --http."),
    option("--token", metavar="TOKEN",
           help="What clients of --http must give, as a bearer token, an API key or a password; best in LDM_TOKEN, for "
           "others see a process's options. Needed where other machines reach HOST."),
    option("--lora-dir", metavar="DIR", help="Where <lora:NAME:WEIGHT> in prompts over HTTP finds LoRAs."),
)  # fmt: skip


@contextlib.contextmanager
def http_server(
    work: "Work",
    models: Sequence[ModelSpec],
    runtime: RuntimeSpec,
    options: Mapping[str, Any],
    worked: Callable[[], object],
) -> Iterator[Callable[[], None]]:
    """An HTTP server inside the block, which answers once what is yielded was called; none where no option asks for
    it. `worked` hears of every call that begins or is done. Raises UsageError, and CannotCreateError where the address
    is taken."""
    if options["http"] is None:
        if options["host"]:
            raise UsageError("--host is for --http; give that too, or leave it out.")
        yield lambda: None
        return
    try:
        from ldmcli.serving.http.calls import Calls
        from ldmcli.serving.http.listening import HttpServer, check_token, parse_address
    except ImportError:
        raise UsageError(
            "--http needs starlette and uvicorn, which are not installed; pip install 'ldmcli[serve]'."
        ) from None
    host, port = parse_address(options["http"], options["host"])
    check_token(host, options["token"])
    calls = Calls(work, _named(models, runtime, options["lora_dir"]), runtime, worked)
    server = HttpServer(calls, host, port, options["token"])

    def start() -> None:
        server.start()
        _log.info("answering at %s", server.url)

    try:
        yield start
    finally:
        work.close()  # so that who waits for a picture hears of it
        server.close()


def _named(models: Sequence[ModelSpec], runtime: RuntimeSpec, lora_dir: str | None) -> dict[str, ModelSpec]:
    """The models by the names that clients know, the embedded one at the end. Raises UsageError where two have one
    name."""
    from ldmcli.session import Session

    found: dict[str, ModelSpec] = {}
    for spec in models:
        name = Session(spec, runtime).name
        if found.setdefault(name, spec) != spec:
            raise UsageError(f"two models are called {printable(name)}, by which clients name them; rename one.")
    embedded = Session(ModelSpec(lora_dir=lora_dir), runtime)
    return {**found, embedded.name: found.get(embedded.name, embedded.resolved)}
