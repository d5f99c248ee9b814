"""A worker draws what it is given, whatever its neighbours do, and notes it, while it draws the next."""

import contextlib
import errno
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batch_support import batches, item, items, lines_of, pictures, setup_in, statuses
from cli_support import tiny_model
from conftest import open_session
from oracle.comparing import pixels_apart

from ldmcli.batch import worker as worker_module
from ldmcli.batch.dispatch import Batch, Feed, Stop
from ldmcli.batch.items import Item, Outcome
from ldmcli.batch.worker import Worker
from ldmcli.errors import LdmError, StorageError
from ldmcli.fitting import FittedRequest
from ldmcli.images.metadata import read_record
from ldmcli.pipeline.pipeline import Pipeline
from ldmcli.session.drawing import DeviceLostError


def opened(folder: Path, **fields: Any) -> "contextlib.closing[Worker]":
    return contextlib.closing(Worker(setup_in(folder, **fields), "worker-0"))


@pytest.fixture
def worker(one_thread: None, tmp_path: Path) -> Iterator[Worker]:
    with opened(tmp_path) as worker:
        yield worker


def run(worker: Worker, plan: Iterable[Sequence[Item]], stop: Stop | None = None) -> Iterator[Outcome]:
    return worker.run(Feed(map(Batch, plan), stop or Stop()))


def drawn(worker: Worker, plan: Iterable[Sequence[Item]]) -> list[Outcome]:
    return list(run(worker, plan))


def before_writing(monkeypatch: pytest.MonkeyPatch, look: Any) -> None:
    """Let workers call `look` with the path of each picture before they write it."""
    write = worker_module.write_picture

    def looked_at(folder: Path, path: str, data: bytes) -> str:
        look(path)
        return write(folder, path, data)

    monkeypatch.setattr(worker_module, "write_picture", looked_at)


def poisoned(monkeypatch: pytest.MonkeyPatch, bad: dict[str, Exception]) -> list[list[str]]:
    """Let pipelines raise for batches with certain prompts; returns the list of batches they are asked for."""
    asked: list[list[str]] = []
    draw = Pipeline.draw

    def poisonous(self: Pipeline, requests: Sequence[FittedRequest], *more: Any) -> Any:
        asked.append([request.prompt for request in requests])
        for request in requests:
            if request.prompt in bad:
                raise bad[request.prompt]
        return draw(self, requests, *more)

    monkeypatch.setattr(Pipeline, "draw", poisonous)
    return asked


# ---- what is drawn ----


def test_outcomes_manifest_and_files_agree(worker: Worker, tmp_path: Path) -> None:
    outcomes = drawn(worker, [items(3)])
    assert lines_of(tmp_path) == {number: ["done"] for number in range(3)}
    for outcome in outcomes:
        record = read_record(tmp_path / outcome.path)
        assert record["request"] == outcome.item.request.to_dict()
        assert record["model"]["name"] == "tiny"
        assert record["runtime"]["device"] == "cpu"
        assert (outcome.worker, outcome.attempts, len(outcome.sha256)) == ("worker-0", 1, 64)
        assert outcome.seconds > 0


def test_pictures_without_metadata(one_thread: None, tmp_path: Path) -> None:
    with opened(tmp_path, metadata=False) as worker:
        (outcome,) = drawn(worker, [items(1)])
    with pytest.raises(LdmError, match="no text at all"):
        read_record(tmp_path / outcome.path)


def test_prompts_of_all_lengths_in_one_batch(worker: Worker, tmp_path: Path) -> None:
    long = [item(n, text, on_long_prompt="chunk") for n, text in enumerate(["a", "a " * 60, "b", "b " * 60, "c"])]
    together = pictures(tmp_path, drawn(worker, [long]))
    alone = pictures(tmp_path, drawn(worker, [[one] for one in long]))
    assert pixels_apart(together, alone) <= 1


# ---- rows that fail ----


@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (RuntimeError("shapes \x1b[31m do not\nmatch"), r"RuntimeError: shapes \x1b[31m do not", 1),
        (StorageError("something."), "something.", 74),
    ],
)
def test_one_bad_row_takes_no_other_with_it(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str, code: int
) -> None:
    poisoned(monkeypatch, {"prompt 5": error})
    outcomes = drawn(worker, batches(items(8), 8))
    assert statuses(outcomes) == dict.fromkeys(range(8), "done") | {5: "failed"}
    (failed,) = (outcome for outcome in outcomes if outcome.status == "failed")
    assert failed.error.startswith(words)
    assert failed.error.isprintable()
    assert failed.code == code
    assert lines_of(tmp_path)[5] == ["failed"]


def test_a_lost_device_ends_the_run(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that would be drawn after it could be: the rows are not to blame."""
    poisoned(monkeypatch, {"prompt 2": torch.AcceleratorError("CUDA error: an illegal memory access\nCUDA …")})
    outcomes = []
    with pytest.raises(DeviceLostError, match="illegal memory access") as raised:
        outcomes.extend(run(worker, ([one] for one in items(4))))
    assert raised.value.exit_code == 75
    assert lines_of(tmp_path) == {0: ["done"], 1: ["done"]}


# ---- the disk ----


def test_a_full_disk_ends_the_run_after_what_fits(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, reported = os.fsync, []

    def full(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path.suffix == ".part" and b"prompt 3\nSteps" in path.read_bytes():
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        reported.extend(run(worker, batches(items(9), 3)))
    noted = {number for number, lines in lines_of(tmp_path).items() if lines == ["done"]}
    assert noted >= {0, 1, 2, 4, 5}
    assert noted >= statuses(reported).keys()
    assert 3 not in noted
    assert not list(tmp_path.rglob("*.part"))
    monkeypatch.undo()
    left = [one for one in items(9) if one.number not in noted]
    assert set(statuses(drawn(worker, [left]))) | noted == set(range(9))


def test_what_was_in_hand_when_the_disk_was_full_is_reported(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: str) -> None:
        if "00000004-" in path:
            raise StorageError("cannot write: No space left on device.")

    before_writing(monkeypatch, full)
    reported: list[int] = []
    with pytest.raises(StorageError):
        reported.extend(outcome.item.number for outcome in run(worker, batches(items(9), 3)))
    assert reported == [0, 1, 2, 4, 5, 6, 7, 8]  # the batch in hand, the third, too


# ---- stopping, waiting, and plans that fail ----


def test_a_batch_is_drawn_while_the_one_before_is_written(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, second = poisoned(monkeypatch, {}), threading.Event()
    draw = Pipeline.draw

    def noted(self: Pipeline, requests: Sequence[FittedRequest], *more: Any) -> Any:
        if requests[0].prompt == "prompt 2":
            second.set()
        return draw(self, requests, *more)

    monkeypatch.setattr(Pipeline, "draw", noted)
    before_writing(monkeypatch, lambda path: "00000001-" not in path or second.wait(60) or pytest.fail("not drawn"))
    assert [outcome.item.number for outcome in run(worker, batches(items(4), 2))] == [0, 1, 2, 3]
    assert [len(prompts) for prompts in asked] == [2, 2]


def test_what_is_done_is_reported_before_more_is_waited_for(worker: Worker) -> None:
    """Whoever hands out batches gives a third when the first is reported; and a plan may wait for its input."""
    reported: list[int] = []

    def plan() -> Iterator[list[Item]]:
        yield items(1)
        yield [item(1)]
        while reported != [0, 1]:
            pass
        yield [item(2)]

    for outcome in run(worker, plan()):
        reported.append(outcome.item.number)
    assert reported == [0, 1, 2]


def test_stop_finishes_the_batch_in_hand(worker: Worker, tmp_path: Path) -> None:
    stop, found = Stop(), []
    for outcome in run(worker, batches(items(100), 2), stop):
        stop.request()
        found.append(outcome)
    # The first batch is reported while the second is in hand: that one too, and no more.
    assert statuses(found) == dict.fromkeys(range(4), "done")
    assert set(lines_of(tmp_path)) == set(range(4))


def test_stop_while_the_plan_waits(worker: Worker) -> None:
    stop, release, ended = Stop(), threading.Event(), threading.Event()

    def endless() -> Iterator[list[Item]]:
        yield items(1)
        release.wait(60)
        ended.set()

    for _ in run(worker, endless(), stop):  # reported at once, though no more batches come
        stop.request()
    assert not ended.is_set()
    release.set()


def test_what_a_plan_raises_comes_after_its_batches(worker: Worker) -> None:
    def breaking() -> Iterator[list[Item]]:
        yield items(2)
        raise LdmError("the input is damaged.")

    found: list[Outcome] = []
    with pytest.raises(LdmError, match="damaged"):
        found.extend(run(worker, breaking()))
    assert statuses(found) == {0: "done", 1: "done"}


def test_nothing_to_draw(worker: Worker, tmp_path: Path) -> None:
    assert drawn(worker, []) == []
    assert lines_of(tmp_path) == {}


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LdmError, match="does not exist"):
        Worker(setup_in(tmp_path, model=str(tmp_path / "none")), "worker-0")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("size", [1, 3])
def test_the_same_files_on_a_gpu(tmp_path: Path, size: int) -> None:
    """Whether the device is waited for after every batch or not."""
    row = [item(n, f"prompt {n} {n % 7}", steps=8, width=64, height=64) for n in range(24)]
    with opened(tmp_path, device="cuda", dtype="fp16") as worker:
        outcomes = drawn(worker, batches(row, size))
    assert statuses(outcomes) == dict.fromkeys(range(24), "done")
    with open_session(tiny_model(), device="cuda", dtype="fp16") as session:
        wanted = [picture.pixels() for picture in session.draw((one.request for one in row), batch_size=size)]
    assert np.array_equal(pictures(tmp_path, outcomes), np.stack(wanted))
