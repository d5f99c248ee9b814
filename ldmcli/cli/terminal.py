"""What is shown on a terminal: the bar of steps, pictures as they grow, results and log lines, none of them written
into another."""

import contextlib
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from ldmcli.errors import LdmError, printable

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
    with cleared():
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
        with cleared():
            super().emit(record)


class StepBar:
    """A bar for the steps of the pictures that are drawn together, which it numbers; call it with each Progress, which
    it passes on."""

    def __init__(self, pass_on: "Callable[[Progress], object]") -> None:
        self._pass_on = pass_on
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
        self._pass_on(progress)
        if progress.done == progress.steps:
            self._drawn += len(progress.requests)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def hindrance() -> str:
    """Why standard output shows no pictures; "" where it does."""
    if not sys.stdout.isatty():
        return "standard output is no terminal"
    if os.environ.get("TERM", "dumb") == "dumb":
        return "TERM says that this terminal has no colours"
    return "" if all(os.get_terminal_size(sys.stdout.fileno())) else "this terminal gives no size (see stty cols, rows)"


def shows_pictures(asked: bool) -> bool:
    """Whether pictures are shown on the terminal, as --show asks for; a warning says why not. The terminal is asked
    here what it can, before anything else reads what is typed."""
    if asked and (why := hindrance()):
        _log.warning("%s, so --show shows nothing", why)
        return False
    if asked:
        from ldmcli.cli.terminal_pictures import ask_terminal

        ask_terminal()
    return asked


def show_file(path: Path) -> None:
    """Show a picture that was just written; what keeps it from that is no reason to end."""
    from ldmcli.cli.terminal_pictures import show_picture

    try:
        show_picture(str(path))
    except LdmError as error:
        _log.warning("%s", error)


class _Passing:
    """How many lines above the bar show a picture as it grows; they go when something else is written."""

    lines = 0
    lock = threading.RLock()


@contextlib.contextmanager
def cleared() -> Iterator[None]:
    """Inside the block neither a bar nor a picture as it grows is on the terminal, and no other thread writes there. It
    must not log."""
    with _Passing.lock, _without_bars():
        _replace_passing("", 0)
        yield


def pass_by(text: str, lines: int) -> None:
    """Put on the terminal what stays until something else is written, in place of what did so before."""
    with _Passing.lock, _without_bars():
        _replace_passing(text, lines)


def _replace_passing(text: str, lines: int) -> None:
    if _Passing.lines:
        text = f"\x1b[{_Passing.lines}A\x1b[J{text}"  # up, and all below taken away
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
    _Passing.lines = lines


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Inside the block no bar is on the terminal. Without tqdm there is none."""
    if "tqdm" not in sys.modules:
        yield
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        yield
