"""Receiving a large file so that nothing that has come is lost: after a cut, only the rest is asked for."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ldmcli.hub.faults import is_broken_connection

if TYPE_CHECKING:
    from tqdm import tqdm

_CHUNK = 1 << 20
_TRIES = 4  # in a row without a byte

OpenAt = Callable[[int], AbstractContextManager[Any]]


def receive(open_at: OpenAt, part: Path, size: int, *, label: str, show: bool) -> None:
    """Append to `part` what it lacks of a file of `size` bytes.

    `open_at` sends the request for all bytes from a number on and gives httpx's response. A broken connection is taken
    up again a few times, then its error raised; `part` stays for the next call.
    """
    from tqdm import tqdm

    with open(part, "ab") as out:
        done = out.seek(0, os.SEEK_END)
        # None lets tqdm look whether stderr is a terminal.
        disable = None if show else True
        with tqdm(
            total=size, initial=done, desc=label, unit="B", unit_scale=True, disable=disable, file=sys.stderr
        ) as bar:
            _fill(open_at, out, size, bar)
        out.flush()
        os.fsync(out.fileno())


def _fill(open_at: OpenAt, out: IO[bytes], size: int, bar: "tqdm[Any]") -> None:
    failures = 0
    while (before := out.seek(0, os.SEEK_END)) != size:
        if before > size:
            before = out.truncate(0)
        try:
            _append(open_at, out, size, bar)
        except Exception as error:
            failures = 0 if out.seek(0, os.SEEK_END) > before else failures + 1
            if failures == _TRIES or not is_broken_connection(error):
                raise
            time.sleep(failures)


def _append(open_at: OpenAt, out: IO[bytes], size: int, bar: "tqdm[Any]") -> None:
    """One request for all that follows what `out` holds. Raises ConnectionError where other than that comes."""
    have = out.seek(0, os.SEEK_END)
    with open_at(have) as response:
        if have and response.status_code != 206:  # the whole file comes
            out.truncate(0)
            have = out.seek(0)
            bar.reset()
        for chunk in response.iter_bytes(_CHUNK):
            have += len(chunk)
            if have > size:
                raise ConnectionError(f"more than its {size} bytes came")
            out.write(chunk)
            bar.update(len(chunk))
    if have < size:
        raise ConnectionError(f"only {have} of its {size} bytes came")
