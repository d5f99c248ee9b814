"""How far a run of `ldm batch` is: in a progress line, at one look, or followed from another terminal."""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ldmcli.cli.terminal import bar, print_facts, write_result
from ldmcli.errors import TryAgainError, printable

if TYPE_CHECKING:
    from ldmcli.batch.items import Outcome
    from ldmcli.batch.ledger import Counts
    from ldmcli.batch.survey import Survey

_log = logging.getLogger(__name__)
_LOOK_S = 1.0  # between two looks at a run that another process draws
_OF_MANY = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}{postfix}"
_OF_ANY = "{desc}{n_fmt} {unit}{postfix}"  # where nobody knows yet how many there are


class RunBar:
    """The progress line of the run that this process draws: pictures, rate, time left, failures. Close it."""

    def __init__(self, before: "Counts", found: "Survey | None", options: Mapping[str, Any]) -> None:
        from ldmcli.batch.pace import Pace

        settled = before.images + (0 if options["retry_failed"] else before.failed_images)
        self._left = None if found is None else max(0, found.images - settled)
        if self._left is not None and options["max_images"]:
            self._left = min(self._left, options["max_images"])
        self._failed = (found.bad_rows if found else 0) + settled - before.images
        self._pace = Pace(time.monotonic())
        total = None if self._left is None else settled + self._left
        shown = {"unit": "pictures", "desc": "loading", "bar_format": _OF_ANY if total is None else _OF_MANY}
        self._bar = bar(total=total, initial=settled, mininterval=0, **shown)

    def note(self, outcome: "Outcome") -> None:
        """Show that a picture is there, or has failed."""
        from ldmcli.batch.pace import summary

        now = time.monotonic()
        self._pace.note(now)
        self._failed += outcome.status != "done"
        self._left = None if self._left is None else max(0, self._left - 1)
        left = None if self._left is None else self._pace.seconds_left(self._left, now)
        self._bar.set_description_str(refresh=False)
        self._bar.set_postfix_str(summary(self._pace.per_second(now), left, self._failed), refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Take the line away."""
        self._bar.close()


def print_status(folder: Path, *, as_json: bool) -> None:
    """Print how far the run in `folder` is. Raises MissingInputError where there is none."""
    from ldmcli.batch.ledger import status

    print_facts(status(folder), as_json=as_json)


def print_failures(folder: Path, *, as_json: bool) -> None:
    """Print what has failed in it, a line each."""
    from ldmcli.batch.ledger import failures

    for facts in failures(folder):
        if as_json:
            click.echo(json.dumps(facts))
        else:
            prompt = "" if facts["prompt"] is None else f" “{printable(facts['prompt'])}”"
            click.echo(f"row {facts['row']}, line {facts['line']}{prompt}: {printable(str(facts['error']), 1000)}")


def print_totals(found: "Survey", *, as_json: bool) -> None:
    """Print what a prompt file asks for."""
    names = ("rows", "images", "bad_rows", "pixel_steps")
    print_facts({name: getattr(found, name) for name in names}, as_json=as_json)


def watch_run(folder: Path, *, as_json: bool) -> "Counts":
    """Show how far the run in `folder` is until no process draws it any more, then print its account. Raises
    MissingInputError where there is none, TryAgainError where it ended before its rows did."""
    from ldmcli.batch.pace import summary
    from ldmcli.batch.watching import Watch

    watch, shown = Watch(folder), None
    with bar(total=1, unit="rows", bar_format=_OF_MANY) as progress:
        while True:
            view = watch.view()
            counts = view.counts
            for failure in view.failures:
                _log.error("row %s: %s", failure["row"], printable(str(failure.get("error")), 1000))
            if as_json and (counts, view.over) != shown:
                write_result(json.dumps({"folder": str(folder), **view.to_dict()}).encode("ascii") + b"\n")
            shown = counts, view.over
            if view.over:
                break
            settled = counts.done + counts.failed
            progress.total, progress.n = counts.rows or settled, settled
            failed = counts.failed_images or counts.failed
            progress.set_postfix_str(summary(view.per_second, view.seconds_left, failed))
            time.sleep(_LOOK_S)
    if not as_json:
        print_status(folder, as_json=False)
    if counts.pending != 0:
        rest = "some rows" if counts.pending is None else f"{counts.pending} rows"
        raise TryAgainError(f"no process draws this run now, and {rest} are still to be drawn; run its command again.")
    return counts
