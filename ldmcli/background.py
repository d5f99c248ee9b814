"""Work beside the main thread's."""

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_Result = TypeVar("_Result")


def in_background(work: Callable[[], _Result], name: str) -> "Future[_Result]":
    """The result of `work`, done in a thread of that name; what it raises, `result()` raises.

    The thread is a daemon: an interrupted command does not wait until gigabytes are read. What it logs is heard by
    whoever hears this thread.
    """
    context = contextvars.copy_context()
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(context.run(work))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
