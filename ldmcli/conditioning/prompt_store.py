"""What text encoders made of prompts, kept in the user's cache: rows of hidden states by the hash of what made them.

An entry is a line that tells number type and shapes, then the numbers. Nothing of it can be read as text.
"""

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import Tensor

from ldmcli.disk.cache import EntryStore
from ldmcli.errors import printable

_log = logging.getLogger(__name__)
_BUDGET = 64 << 20  # bytes that a process adds at most: a batch of many prompts must not push out all others
_WAIT_S = 5.0


@dataclasses.dataclass(frozen=True)
class RowKind:
    """What one row of an encoder's output has to be: states (tokens, width), and pooled (pooled_width,) unless that is
    None."""

    tokens: int
    width: int
    pooled_width: int | None
    dtype: torch.dtype

    def fits(self, states: Tensor, pooled: Tensor | None) -> bool:
        """Whether a row is of this kind and finite."""
        shapes = [(self.tokens, self.width), *([(self.pooled_width,)] if self.pooled_width else [])]
        tensors = [states, *([] if pooled is None else [pooled])]
        return [tuple(t.shape) for t in tensors] == shapes and all(
            t.dtype == self.dtype and bool(t.isfinite().all()) for t in tensors
        )

    def head(self) -> bytes:
        """The line with which an entry of this kind begins."""
        told = {"dtype": str(self.dtype), "states": [self.tokens, self.width], "pooled": self.pooled_width}
        return json.dumps(told).encode() + b"\n"


Row = tuple[Tensor, Tensor | None]


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A row to be stored once the encoder's identity, the hash of its weights, is known."""

    identity: "Future[str]"
    key: Callable[[str], str]
    kind: RowKind
    row: Row


class PromptStore:
    """Rows by key, in `entries`. Never raises for what the disk is like; what cannot be kept is not.

    `budget` is how many bytes it adds at most.
    """

    def __init__(self, entries: EntryStore, budget: int = _BUDGET) -> None:
        self._entries = entries
        self._left = budget
        self._pending: list[_Pending] = []
        self._lock = threading.Lock()

    @property
    def enabled(self) -> bool:
        """Whether it may hold or keep anything."""
        return self._entries.enabled

    def get(self, key: str, kind: RowKind) -> Row | None:
        """The row under `key`, on the CPU; None where there is none. One that is not of `kind` is removed."""
        payload = self._entries.read(key)
        if payload is None:
            return None
        row = _decoded(payload, kind)
        if row is None:
            self._entries.remove(key)
        return row

    def add(self, identity: "Future[str]", key: Callable[[str], str], kind: RowKind, row: Row) -> None:
        """Have `row` stored under `key(identity)` at a flush; until then it stays where it is, on a GPU say."""
        size = sum(t.nbytes for t in row if t is not None)
        with self._lock:
            if not self.enabled or self._left <= 0:
                return
            self._left -= size
            if self._left <= 0:
                _log.debug("cache: enough of this run's prompts are kept")
                return
            self._pending.append(_Pending(identity, key, kind, row))

    def flush(self, timeout: float = _WAIT_S) -> None:
        """Write what was added, waiting up to `timeout` seconds for identities; with 0, the rest waits for the next."""
        until = time.monotonic() + timeout
        with self._lock:
            pending, self._pending = self._pending, []
        later = [one for one in pending if not self._written(one, until)]
        with self._lock:
            self._pending = later + self._pending

    def _written(self, one: _Pending, until: float) -> bool:
        """Whether nothing is left to be done for it."""
        try:
            identity = one.identity.result(max(0.0, until - time.monotonic()))
            states, pooled = one.row
            row = states.cpu(), None if pooled is None else pooled.cpu()
        except Exception as error:  # no identity, or the device is lost, which whoever needs it will see
            if not one.identity.done():
                return False
            _log.debug("cache: a prompt is not kept: %s", printable(str(error)))
            return True
        if one.kind.fits(*row):
            tensors = [t for t in row if t is not None]
            self._entries.write(one.key(identity), one.kind.head() + b"".join(map(_bytes, tensors)))
        return True


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def _decoded(payload: bytes, kind: RowKind) -> Row | None:
    """The row of an entry; None where it is not of `kind`."""
    head = kind.head()
    sizes = [kind.tokens * kind.width, kind.pooled_width or 0]
    if not payload.startswith(head) or len(payload) != len(head) + sum(sizes) * kind.dtype.itemsize:
        return None
    numbers = torch.frombuffer(bytearray(payload[len(head) :]), dtype=kind.dtype)
    flat, last = numbers.split(sizes)
    states, pooled = flat.reshape(kind.tokens, kind.width), last if kind.pooled_width else None
    return (states, pooled) if kind.fits(states, pooled) else None
