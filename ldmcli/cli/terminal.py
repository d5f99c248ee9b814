"""What is shown on a terminal: the bar of steps, results and log lines, none of them written into another."""

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import click

from ldmcli.errors import printable

if TYPE_CHECKING:
    from tqdm import tqdm

    from ldmcli.session.session import Progress

_log = logging.getLogger("ldmcli")


class _NoBar:
    """In place of a bar that nobody sees: importing tqdm takes as long as a step."""

    total = n = 0

    def update(self, n: int = 1) -> None:
        """Show nothing; so do the others."""

    def refresh(self) -> None: ...

    def set_description_str(self, *, refresh: bool = True) -> None: ...

    def set_postfix_str(self, text: str, *, refresh: bool = True) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


def bar(**settings: Any) -> "tqdm[Any] | _NoBar":
    """A progress bar on standard error, where that is a terminal and -q was not given; it leaves nothing behind."""
    if not _log.isEnabledFor(logging.INFO) or not sys.stderr.isatty():
        return _NoBar()
    from tqdm import tqdm

    return tqdm(file=sys.stderr, dynamic_ncols=True, leave=False, **settings)


def loading(name: str) -> "tqdm[Any] | _NoBar":
    """A line that says that `name` is loading; close it to take it away."""
    return bar(bar_format="{desc}", desc=f"loading {printable(name)} …")


def write_result(data: bytes) -> None:
    """Write to standard output at once, bars out of the way meanwhile."""
    with _bars_cleared():
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def print_facts(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Print facts on standard output: names and values in two columns, or as a JSON object."""
    if as_json:
        click.echo(json.dumps(facts))
        return
    width = max(map(len, facts)) + 1
    for name, value in facts.items():
        if isinstance(value, list):
            shown = ", ".join(map(str, value))
        elif value is None:
            shown = "unknown"
        else:
            shown = f"{value:,}" if type(value) is int and name != "pid" else str(value)
        label = f"{name.replace('_', ' ')}:"
        click.echo(f"{label:{width}} {printable(shown, 4096)}".rstrip())


class LogHandler(logging.StreamHandler[Any]):
    """Log lines on standard error, bars out of the way meanwhile."""

    def emit(self, record: logging.LogRecord) -> None:
        with _bars_cleared():
            super().emit(record)


class StepBar:
    """A bar for the steps of the pictures that are drawn together, which it numbers; call it with each Progress."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | _NoBar | None = None
        self._drawn = 0

    def __call__(self, progress: "Progress") -> None:
        if progress.done == 0:
            self.close()
            first, last = self._drawn + 1, self._drawn + len(progress.requests)
            self._bar = bar(total=progress.steps, desc=str(first) if first == last else f"{first}…{last}", unit="step")
            return
        if self._bar is not None:
            self._bar.update()
        if progress.done == progress.steps:
            self._drawn += len(progress.requests)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


@contextlib.contextmanager
def _bars_cleared() -> Iterator[None]:
    """Inside the block no bar is on the terminal. Without tqdm there is none."""
    if "tqdm" not in sys.modules:
        yield
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        yield
