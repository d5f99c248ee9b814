"""What is logged on the way: said once for each command, and heard by whom it concerns, in every thread of its work."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Listener = Callable[[logging.LogRecord], object]

_here: set[str] = set()  # what this process has said, where it works for one command alone
_said: ContextVar[set[str] | None] = ContextVar("said", default=None)
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def warn_once(logger: logging.Logger, sentence: str) -> None:
    """A warning, unless the command that this thread works for has heard it."""
    said = sayings()
    if sentence not in said:
        said.add(sentence)
        logger.warning("%s", sentence)


def sayings() -> set[str]:
    """What the command that this thread works for has heard."""
    said = _said.get()
    return _here if said is None else said


@contextlib.contextmanager
def heard_by(listener: Listener | None, said: set[str]) -> Iterator[None]:
    """Inside the block, and in threads that it starts by `in_background`, `listener` hears what is logged, by a
    Relay."""
    tokens = _listener.set(listener), _said.set(said)
    try:
        yield
    finally:
        _listener.reset(tokens[0])
        _said.reset(tokens[1])


class Relay(logging.Handler):
    """Passes what is logged on to whom it concerns."""

    def emit(self, record: logging.LogRecord) -> None:
        listener = _listener.get()
        if listener is not None:
            listener(record)


class Own(logging.Filter):
    """Lets pass what concerns nobody but this process."""

    def filter(self, record: logging.LogRecord) -> bool:
        return _listener.get() is None
