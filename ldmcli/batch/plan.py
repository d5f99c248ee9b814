"""Which pictures are drawn together, and by whom."""

import operator
from collections.abc import Iterable, Iterator
from typing import TypeVar

from ldmcli.batch.fields import OWN, REQUEST_FIELDS
from ldmcli.batch.items import BadRow, Item
from ldmcli.errors import UsageError

_Row = TypeVar("_Row", Item, BadRow, Item | BadRow)
_settings = operator.attrgetter(*(f"request.{name}" for name in REQUEST_FIELDS if name not in OWN))


def batches(items: Iterable[Item], size: int, *, window: int = 1024) -> Iterator[list[Item]]:
    """Batches of at most `size` pictures whose requests differ in texts and seed alone.

    A batch goes out as soon as it is full, so an input that waits for its user still flows; and it goes out unfilled
    once `window` pictures have come since its first. So at most `window` are held back, and the order is the same
    every time: it depends on the items alone.
    """
    if size == 1:
        yield from ([item] for item in items)
        return
    open_batches: dict[tuple[object, ...], list[Item]] = {}  # the oldest first
    arrivals: dict[tuple[object, ...], int] = {}  # of the first picture in each
    for arrival, item in enumerate(items):
        settings = _settings(item)
        batch = open_batches.setdefault(settings, [])
        batch.append(item)
        arrivals.setdefault(settings, arrival)
        if len(batch) == size:
            del open_batches[settings], arrivals[settings]
            yield batch
        if open_batches:
            oldest = next(iter(open_batches))
            if arrival - arrivals[oldest] >= window - 1:
                del arrivals[oldest]
                yield open_batches.pop(oldest)
    yield from open_batches.values()


def shard(found: Iterable[_Row], index: int, count: int) -> Iterator[_Row]:
    """Part `index`, from 0, of `count`: every count-th row, all pictures of a row together. Raises UsageError."""
    if not 0 <= index < count:
        raise UsageError(f"shard {index} is not one of {count}; they are numbered from 0 to {count - 1}.")
    return (one for one in found if (one.row - 1) % count == index)
