"""Attention on a GPU by the kernel that suits each shape: from a table of measurements, or one that is forced.

The table, attention_table.py, is data that `python -m ldmcli.bench.attention_shapes` writes on a card. It is empty of
measurements today: no card was ever had. Until it is filled, MEASURED is torch's own pick, the very same function.
"""

import functools
import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ldmcli.errors import printable
from ldmcli.networks.attention import ATTENTIONS, TORCH_KERNELS, Attend, sdpa_attention, takes
from ldmcli.speed.attention_table import ROWS

MEASURED = "measured"  # name of the choice by table, in options and in pictures' metadata
NEED_CUDA = (MEASURED, *TORCH_KERNELS, "xformers")  # names of attentions that are for GPUs
REFUSALS = (AttributeError, ImportError, RuntimeError, ValueError)  # what a kernel raises that is not for a call
_log = logging.getLogger(__name__)

Capability = tuple[int, int]


class Shape(NamedTuple):
    """What a kernel's speed depends on: tokens, the numbers in a head and their type, and how many heads there are."""

    head_dim: int
    queries: int
    keys: int
    batch_heads: int
    dtype: torch.dtype


class Row(NamedTuple):
    """One row of the table: `kernel`, a name in ATTENTIONS, was faster than torch's own pick, and as exact, on cards of
    a compute `capability` ("9.0") for this shape ("float16") at `least` and `most` heads in the batch, and at all
    numbers of heads measured between."""

    capability: str
    dtype: str
    head_dim: int
    queries: int
    keys: int
    least: int
    most: int
    kernel: str


TABLE = tuple(Row(*row) for row in ROWS)


def automatic(device: torch.device) -> str:
    """The name of what `--attention auto` comes to on a CUDA device: MEASURED where the table knows such a card, else
    torch's own pick."""
    return MEASURED if rows_for(_capability(device)) else "sdpa"


@functools.cache
def attend_by_name(name: str, device: torch.device) -> Attend:
    """The function that computes attention on a device under a name: of ATTENTIONS, or MEASURED.

    One of TORCH_KERNELS computes what it takes, and torch's own pick the rest, such as the VAE's wide heads. There is
    one function per name and device, so that what a kernel refuses is found out once per process.
    """
    capability = _capability(device)
    if name == MEASURED:
        rows = rows_for(capability)
        return Choice(functools.partial(measured, by_shape(rows)), capability) if rows else sdpa_attention
    if name in TORCH_KERNELS:
        return Choice(lambda shape: name, capability)
    return ATTENTIONS[name]


def rows_for(capability: Capability | None, table: Iterable[Row] | None = None) -> list[Row]:
    """The rows of a table, by default TABLE, that were measured on such cards; none for a CPU (None)."""
    if capability is None:
        return []
    name = "{}.{}".format(*capability)
    return [row for row in (TABLE if table is None else table) if row.capability == name]


Rows = dict[tuple[str, int, int, int], list[Row]]


def by_shape(rows: Iterable[Row]) -> Rows:
    """The rows of one kind of card, as `measured` looks them up."""
    found: Rows = {}
    for row in rows:
        found.setdefault((row.dtype, row.head_dim, row.queries, row.keys), []).append(row)
    return found


def measured(rows: Rows, shape: Shape) -> str:
    """The kernel that rows of one kind of card name for a shape; else torch's own pick. Only what was measured counts:
    no other number of tokens, and no number of heads outside a row's."""
    dtype = str(shape.dtype).removeprefix("torch.")
    for row in rows.get((dtype, shape.head_dim, shape.queries, shape.keys), ()):
        if row.least <= shape.batch_heads <= row.most:
            return row.kernel
    return "sdpa"


class Choice:
    """An Attend that computes each shape by the kernel that `pick` names for it, looked up once per shape; and by
    torch's own pick where that kernel does not take the shape or refuses a call.

    A shape should be called once before it is called in the recording of a CUDA graph: a refusal spoils the recording.
    """

    def __init__(self, pick: Callable[[Shape], str], capability: Capability | None) -> None:
        self._pick = pick
        self._capability = capability
        self._chosen: dict[tuple[int, int, int, int, torch.dtype], Attend] = {}
        self._told: set[Attend] = set()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, queries, head_dim = query.shape
        shape = (head_dim, queries, key.shape[2], batch * heads, query.dtype)
        attend = self._chosen.get(shape)
        if attend is None:
            attend = self._chosen[shape] = self._first(Shape(*shape))
        if attend is sdpa_attention:
            return attend(query, key, value)
        try:
            return attend(query, key, value)
        except torch.OutOfMemoryError:
            raise
        except REFUSALS as error:
            self._chosen[shape] = sdpa_attention
            self._tell(attend, Shape(*shape), error)
        return sdpa_attention(query, key, value)

    def _first(self, shape: Shape) -> Attend:
        """The function for a shape that is met for the first time."""
        name = self._pick(shape)
        if name in ATTENTIONS and takes(name, shape.head_dim, shape.keys, shape.dtype, self._capability):
            return ATTENTIONS[name]
        return sdpa_attention

    def _tell(self, attend: Attend, shape: Shape, error: Exception) -> None:
        """Say that a kernel refused, the first time that it does."""
        if attend in self._told:
            return
        self._told.add(attend)
        reason = printable(str(error).strip().partition("\n")[0])
        _log.info(
            "%s refused %d heads of %d numbers, %d × %d tokens (%s); torch picks the kernel there",
            *(attend.__name__, shape.batch_heads, shape.head_dim, shape.queries, shape.keys, reason),
        )


def _capability(device: torch.device) -> Capability | None:
    """A CUDA device's compute capability; None of a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None
