"""Whether a command draws by itself or with the server; where there is none, nothing of its client is imported."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ldmcli.images.formats import Encoding
from ldmcli.serving.place import is_safe, socket_path
from ldmcli.spec import ModelSpec, RuntimeSpec

if TYPE_CHECKING:
    from ldmcli.serving.client import RemoteSession
    from ldmcli.serving.connection import Connection
    from ldmcli.session import Session

_log = logging.getLogger(__name__)


def find_server(options: Mapping[str, Any]) -> "Connection | None":
    """A connection to the server that a command's options have it use, if there is one; with --keep one is started."""
    keep = options["keep"]
    if options["no_server"] or not (keep or is_safe(socket_path())):
        return None
    from ldmcli.serving.connection import connect, start_server

    found = connect()
    if keep and not found:
        _log.info("starting a server that ends after %g s without work, for this command and the next", keep)
        found = start_server(keep)
    if keep and not found:
        _log.warning("no server could be left behind; ldm serve says why")
    return found


def open_session(
    options: Mapping[str, Any],
    model: ModelSpec,
    runtime: RuntimeSpec,
    *,
    encoding: Encoding,
    metadata: bool,
    exact: bool = False,
    preview: int = 0,
) -> "Session | RemoteSession":
    """The session that a command draws with: the server's, or one of this process. `preview`: after how many steps that
    tells what pictures are to become; 0 for never. Raises as Session does."""

    def here() -> "Session":
        from ldmcli.session import Session

        return Session(model, runtime, exact=exact)

    connection = find_server(options)
    if connection is None:
        return here()
    from ldmcli.serving.client import RemoteSession

    remote = RemoteSession(connection, here, runtime, encoding, metadata=metadata, preview=preview)
    remote.open(model)
    return remote.here or remote
