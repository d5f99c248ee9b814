"""Pictures drawn together have the same settings, come in one order, and are never held back for long."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldmcli.batch.dispatch import Stop
from ldmcli.batch.items import BadRow, Item, Outcome
from ldmcli.batch.run import Run, batches, by_loras
from ldmcli.batch.survey import shard
from ldmcli.spec import GenerationRequest, LoRA


def item(number: int, steps: int = 1, **fields: Any) -> Item:
    request = GenerationRequest(f"prompt {number}", f"not {number}", number, steps=steps, **fields)
    return Item(number, number // 2 + 1, number, f"{number}", request)


def numbers(found: Iterator[list[Item]]) -> list[list[int]]:
    return [[one.number for one in batch] for batch in found]


def test_equal_settings_share_a_batch() -> None:
    steps = [1, 1, 2, 1, 2, 2, 1]
    assert numbers(batches((item(i, s) for i, s in enumerate(steps)), 2)) == [[0, 1], [2, 4], [3, 6], [5]]
    for field, value in (
        ("width", 8),
        ("guidance_interval", (1.0, 2.0)),
        ("clip_skip", 2),
        ("schedule", "karras"),
        ("loras", ("a",)),
    ):
        assert numbers(batches([item(0), item(1, **{field: value})], 2)) == [[0], [1]]
    for field, values in (
        ("label", (1, 2)), ("layout", ((), ((1, 0, 0, 1, 1),))), ("map", ("a", "b")), ("embedding_row", (1, 2)),
    ):  # fmt: skip
        each = [item(i, **{field: value}) for i, value in enumerate(values)]
        assert numbers(batches(each, 2)) == [[0, 1]], "what each picture has of its own"
    assert numbers(batches([], 4)) == []


@pytest.mark.parametrize(("size", "needed"), [(1, 1), (4, 4)])
def test_no_more_is_read_than_a_full_batch_needs(size: int, needed: int) -> None:
    read = itertools.count()

    def endless() -> Iterator[Item]:
        for number in read:
            yield item(number)

    found = batches(endless(), size)
    for i in range(1, 4):
        next(found)
        assert next(read) == needed * i + i - 1  # each look takes one out


def test_a_rare_picture_waits_for_a_window_at_most() -> None:
    endless = (item(i, 2 if i == 3 else 1) for i in itertools.count())
    for found in numbers(itertools.islice(batches(endless, 4, window=50), 14)):
        if found == [3]:
            break
    else:
        pytest.fail("the rare one never came")


@given(st.lists(st.integers(1, 4), max_size=60), st.integers(1, 6), st.integers(1, 12))
def test_every_picture_is_in_one_batch(steps: list[int], size: int, window: int) -> None:
    pictures = [item(i, s) for i, s in enumerate(steps)]
    read = 0

    def counted() -> Iterator[Item]:
        nonlocal read
        for picture in pictures:
            read += 1
            yield picture

    out: list[Item] = []
    for batch in batches(counted(), size, window=window):
        assert 1 <= len(batch) <= size
        assert len({one.request.steps for one in batch}) == 1
        assert [one.number for one in batch] == sorted(one.number for one in batch)
        out += batch
        assert read - len(out) <= window
    assert sorted(one.number for one in out) == list(range(len(steps)))
    again = [one for batch in batches(pictures, size, window=window) for one in batch]
    assert again == out


def with_loras(names: str) -> list[Item]:
    return [item(i, loras=() if name == "-" else (LoRA(name),)) for i, name in enumerate(names)]


@pytest.mark.parametrize(
    ("names", "size", "expected"),
    [
        ("ABABABAB", 1, [[0], [2], [4], [6], [1], [3], [5], [7]]),
        ("ABABABAB", 2, [[0, 2], [4, 6], [1, 3], [5, 7]]),
        ("ABABABA", 2, [[0, 2], [4, 6], [1, 3], [5]]),
        ("-AA-B-A", 1, [[0], [3], [5], [1], [2], [6], [4]]),
    ],
)
def test_batches_of_the_same_loras_follow_one_another(names: str, size: int, expected: list[list[int]]) -> None:
    assert numbers(by_loras(batches(with_loras(names), size))) == expected


def test_weights_of_loras_tell_them_apart_and_where_they_lie_does_not() -> None:
    one, moved, weaker = LoRA("a", sha256="1"), LoRA("b", path="x", sha256="1"), LoRA("a", 0.5, sha256="1")
    found = [[item(i, loras=(lora,))] for i, lora in enumerate((one, weaker, moved))]
    assert numbers(by_loras(found)) == [[0], [2], [1]]


def test_a_rare_set_of_loras_waits_for_a_window_at_most() -> None:
    endless = ([item(i, loras=(LoRA("B" if i % 50 == 3 else "A"),))] for i in itertools.count())
    found = numbers(itertools.islice(by_loras(endless, window=20), 30))
    assert found == [[i] for i in (0, 1, 2, *range(4, 23), 3, *range(23, 30))]


@given(st.text("AB-", max_size=60), st.integers(1, 6), st.integers(1, 12))
def test_every_batch_comes_once_whatever_loras_it_has(names: str, size: int, window: int) -> None:
    came = 0

    def counted() -> Iterator[list[Item]]:
        nonlocal came
        for batch in batches(with_loras(names), size):
            came += len(batch)
            yield batch

    out = 0
    found = []
    for batch in by_loras(counted(), window=window):
        out += len(batch)
        assert came - out < window + size
        found.append(batch)
    assert sorted(numbers(found)) == sorted(numbers(batches(with_loras(names), size)))


@pytest.mark.parametrize(("rows", "expected"), [(4, [0, 2, 1, 3]), (None, [0, 1, 2, 3])])
def test_rows_of_a_file_are_drawn_by_their_loras_and_typed_ones_as_they_come(
    rows: int | None, expected: list[int], tmp_path: Path
) -> None:
    order: list[int] = []

    def engine(found: Iterator[list[Item]], stop: Stop) -> Iterator[Outcome]:
        order.extend(one.number for batch in found for one in batch)
        return iter(())

    run = Run(tmp_path, rows=rows)
    assert not list(run.draw(with_loras("ABAB"), engine, batch_size=1, stop=Stop()))
    assert order == expected


def test_shards_are_whole_rows() -> None:
    pictures = [item(i) for i in range(20)]
    parts = [list(shard(pictures, (number, 3))) for number in (1, 2, 3)]
    assert [{one.row for one in part} for part in parts] == [{1, 4, 7, 10}, {2, 5, 8}, {3, 6, 9}]
    assert sorted(one.number for part in parts for one in part) == list(range(20))
    assert list(shard(pictures, (1, 1))) == pictures
    bad = BadRow(2, 2, "2", ("no.",))
    assert list(shard([bad], (2, 3))) == [bad]
    # A row stays in its shard whatever comes before it is drawn or not.
    assert list(shard(pictures[10:], (2, 3))) == [one for one in parts[1] if one.number >= 10]
