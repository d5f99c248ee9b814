"""`ldm upscale` with a server."""

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmcli.cli.output import Output
from ldmcli.cli.terminal import bar
from ldmcli.cli.upscale import report, show
from ldmcli.serving.client import fetched_of, is_of_process
from ldmcli.serving.connection import Connection, GoneError, RefusedError
from ldmcli.spec import RuntimeSpec
from ldmcli.upscaling.larger import Enlargement

if TYPE_CHECKING:
    from ldmcli.cli.upscale import _Work

_log = logging.getLogger(__name__)


class RemoteWork:
    """Has a server enlarge pictures; what it does not do, this process does."""

    def __init__(
        self,
        connection: Connection,
        how: Enlargement,
        options: dict[str, Any],
        drawing: dict[str, Any] | None,
        here: "Callable[[], _Work]",
    ) -> None:
        """`drawing`: the settings of a model that draws."""
        self._connection, self._how, self._here = connection, how, here
        self._home: _Work | None = None
        name, settings = options["upscaler"], {each: options[each] for each in ("allow_pickle", "device", "dtype")}
        if is_of_process(name):
            self._come_home()
            return
        runtime = RuntimeSpec(device=options["device"], dtype=options["dtype"])
        fetched = fetched_of([name], runtime) if drawing else {}
        settings |= {"upscaler": name, "drawing": drawing, "tile": how.tile, "fetched": fetched}
        self._ask("open_upscaler", cwd=os.getcwd(), **settings)

    def enlarge(self, source: Path, output: Output) -> None:
        """As `_Work.enlarge` of `upscale`."""
        sent: dict[str, Any] = {}
        if self._home is None and not is_of_process(str(source)):
            with contextlib.closing(bar(desc=source.stem, unit="tile")) as progress:

                def on_event(message: dict[str, Any]) -> None:
                    if message["event"] == "tile":
                        show(progress, message["done"], message["total"])
                    else:
                        sent.update(message)

                self._ask("enlarge", on_event=on_event, source=str(source), how=vars(self._how))
        if self._home is None and sent:
            report(source, output, sent["data"], tuple(sent["size"]), sent["name"], sent["seconds"])
        else:
            self._come_home().enlarge(source, output)

    def _ask(self, name: str, **arguments: Any) -> None:
        try:
            self._connection.call(name, **arguments)
        except GoneError:
            _log.warning("the server is gone; going on without it")
            self._come_home()
        except RefusedError:
            self._come_home()

    def _come_home(self) -> "_Work":
        if self._home is None:
            self._connection.leave()
            self._home = self._here()
        return self._home
