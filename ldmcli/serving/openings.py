"""Models as clients' commands open them, each from its folder."""

import logging
from collections.abc import Callable, Mapping

from ldmcli.remarks import heard_by
from ldmcli.serving.place import in_folder
from ldmcli.session import Session
from ldmcli.spec import ModelSpec, RuntimeSpec

_KEPT = 4  # with their tokenizers, some ten megabytes each


class Openings:
    """What was opened last: the same is looked at again only where a file has changed."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ModelSpec, RuntimeSpec], tuple[Session, list[logging.LogRecord]]] = {}

    def session(
        self,
        folder: str,
        model: ModelSpec,
        runtime: RuntimeSpec,
        fetched: Mapping[str, str],
        hear: Callable[[logging.LogRecord], object],
    ) -> Session:
        """A session for a command that is run in `folder`; `hear` gets what is logged of opening it. Raises
        LdmError."""
        key, remarks = (folder, model, runtime), list[logging.LogRecord]()
        with in_folder(folder):
            before = self._known.pop(key, None)
            session = before and before[0].again(fetched)
            if before and session:
                remarks = before[1]
            else:
                with heard_by(remarks.append, set()):
                    session = Session(model, runtime, fetched=fetched)
            self._known[key] = session, remarks
            while len(self._known) > _KEPT:
                del self._known[next(iter(self._known))]
        for record in remarks:
            hear(record)
        return session
