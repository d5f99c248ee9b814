"""`ldm serve`: models stay in memory, and the other commands draw with them."""

import contextlib
import logging
import os
import signal
from typing import Any

import click

from ldmcli.cli.command import command
from ldmcli.cli.option_types import Duration, Name
from ldmcli.cli.options import (
    json_option,
    option,
    runtime_options,
    runtime_spec,
    verbosity_options,
)
from ldmcli.cli.over_http import http_options, http_server
from ldmcli.cli.terminal import print_facts
from ldmcli.errors import MissingInputError, printable
from ldmcli.remarks import Own
from ldmcli.spec import ModelSpec

_log = logging.getLogger(__name__)
_WAIT_S = 10.0  # for a server to stop


@command(short_help="Keep models in memory, for all commands to draw with.")
@option("-m", "--model", "models", metavar="MODEL", multiple=True, type=Name(), envvar="LDM_MODEL",
        help="Read this model at once; may be given again. Others are read when a command names them.")  # fmt: skip
@option("--idle", type=Duration(), metavar="TIME", help="End after 90s, 10m, 1h … without work.  [default: never]")
@option("--max-models", type=click.IntRange(1, 64), metavar="N",
        help="Models in memory at once; the one that was not used for the longest time makes room.  "
        "[default: as many as -m names, 1 at least]")  # fmt: skip
@http_options
@runtime_options
@option("--status", is_flag=True,
        help="Tell what the server does, and whether this program agrees with it so as to use it; exit code 66 where "
        "there is none.")  # fmt: skip
@option("--stop", is_flag=True, help="End the server; commands go on by themselves.")
@json_option("With --status: as a JSON object.")
@verbosity_options
@click.pass_context
def serve(context: click.Context, **options: Any) -> None:
    """Keep models in memory until Ctrl-C, --stop or --idle ends it.

    txt2img, img2img, sample, batch and upscale of the same user find the server by themselves and draw the same
    pictures, without loading the model; --no-server has them do without. It listens on a Unix socket in
    $XDG_RUNTIME_DIR, or where LDM_SERVER says, which only you can open. --dtype, --device and the like are for the
    models that -m names; each command brings its own.

    \b
    Examples:
    ldm serve -m sd15.safetensors --idle 1h &
    ldm serve -m sd15.safetensors --http 7860
    ldm serve --status
    ldm serve --stop
    """
    from ldmcli.serving.place import listening, socket_path

    if options["status"] or options["stop"]:
        _ask("stop" if options["stop"] else "status", as_json=options["as_json"])
        return
    from ldmcli.hub.fetch import stay_offline
    from ldmcli.serving.server import Server
    from ldmcli.serving.work import Work
    from ldmcli.session import Session
    from ldmcli.speed.linking import settle_down
    from ldmcli.speed.startup import quicken

    path = socket_path()
    _hear_everything()
    with listening(path) as listener:
        quicken()
        runtime = runtime_spec(options)
        work = Work(max_models=options["max_models"] or max(1, len(options["models"])))
        server = Server(work, idle=options["idle"])
        try:
            named = [ModelSpec(name, lora_dir=options["lora_dir"]) for name in options["models"]]
            models = [Session(spec, runtime).resolved for spec in named]
            with http_server(work, models, runtime, options, server.worked) as start:
                for name, spec in zip(options["models"], models, strict=True):
                    work.load(work.session(spec, runtime)).wait()
                    _log.info("%s is in memory", printable(name))
                settle_down()
                stay_offline()  # clients ask the hub themselves
                _log.info("listening at %s", printable(str(path)))
                os.chdir("/")
                start()
                signal.signal(signal.SIGTERM, lambda *_: server.stop())
                server.serve(listener)
            if work.failure is not None:
                raise work.failure
        finally:
            work.close()


def _hear_everything() -> None:
    """Let clients hear what they want to, and standard error only what is not theirs."""
    logger = logging.getLogger("ldmcli")
    for handler in logger.handlers:
        handler.setLevel(logger.level)
        handler.addFilter(Own())
    logger.setLevel(logging.DEBUG)


def _ask(what: str, *, as_json: bool) -> None:
    """Have the server tell what it does, or stop. Raises MissingInputError where there is none."""
    from ldmcli.serving.connection import GoneError, connect

    connection = connect(any_version=True)
    if connection is None:
        raise MissingInputError("no server of yours answers; start one by ldm serve.")
    with contextlib.closing(connection):
        if what == "stop":
            with contextlib.suppress(GoneError):  # it may be gone before it answers
                connection.call(what)
                connection.wait_for_end(_WAIT_S)
            return
        facts, agreed = connection.call(what), {"agrees": connection.greeting.agreed}
    print_facts(facts | agreed, as_json=as_json)
