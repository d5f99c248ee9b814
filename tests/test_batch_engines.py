"""The local engine: one device in this process, several in processes, some of which are killed."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_support import batches, item, items, lines_of, pictures, setup_in, statuses
from cli_support import environment, until
from oracle.comparing import pixels_apart

from ldmcli.batch import local
from ldmcli.batch.dispatch import Batch, Dispatcher, Feed, StartError, Stop, noted
from ldmcli.batch.items import Item, Outcome
from ldmcli.batch.local import cores_each, parse_devices, present, run_local
from ldmcli.batch.worker import Worker
from ldmcli.errors import LdmError, UsageError

TWO = ("cpu", "cpu")
SLOW = {"steps": 30}  # pictures that take long enough to be killed over


def workers_of(parent: int) -> list[int]:
    """The processes that a process started by `multiprocessing`, less its tracker."""
    found = []
    for path in Path(f"/proc/{parent}/task").glob("*/children"):
        found += [int(pid) for pid in path.read_text().split()]
    return [pid for pid in found if b"spawn_main" in proc(pid, "cmdline")]


def alive(pid: int) -> bool:
    status = proc(pid, "stat").rpartition(b")")[2].split()
    return bool(status) and status[0] != b"Z"


def proc(pid: int, name: str) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/{name}").read_bytes()
    return b""


def breaking() -> Iterator[list[Item]]:
    """A plan that fails after a batch."""
    yield items(2)
    raise LdmError("the input is damaged.")


@pytest.fixture(autouse=True)
def no_children_left(one_thread: None) -> Iterator[None]:
    yield
    assert workers_of(os.getpid()) == []


# ---- devices ----


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("0,1", ("cuda:0", "cuda:1")), ("cpu*2", ("cpu", "cpu")), ("cuda:3, cpu", ("cuda:3", "cpu")),
        ("0*2,1", ("cuda:0", "cuda:0", "cuda:1")), ("auto", ("auto",)), ("all", ("all",)), ("cuda", ("cuda",)),
    ],
)  # fmt: skip
def test_devices(text: str, devices: tuple[str, ...]) -> None:
    assert parse_devices(text) == devices


@pytest.mark.parametrize(
    "text", ["", "0,,1", "gpu", "cpu*0", "cpu*257", "0*200,1*200", "-1", "cpu*", "all,0", "٣", "0 1"]
)
def test_devices_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="devices"):
        parse_devices(text)


def test_all_devices_and_their_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert present(("all",)) == ("cuda:0", "cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert present(("all",)) == ("cpu",)
    assert present(("cpu", "cuda:0")) == ("cpu", "cuda:0")
    assert cores_each(TWO, 8) == 4
    assert cores_each(("cpu",) * 9, 4) == 1
    assert cores_each(("cuda:0", "cpu"), 8) == 8


# ---- one device ----


def test_one_device_needs_no_process(tmp_path: Path) -> None:
    seen = []
    for outcome in run_local(setup_in(tmp_path), batches(items(5), 2), ["cpu"], stop=Stop()):
        seen.append(outcome)
        assert workers_of(os.getpid()) == []
    assert statuses(seen) == dict.fromkeys(range(5), "done")


def test_closing_the_run_stops_now(tmp_path: Path) -> None:
    run = run_local(setup_in(tmp_path), batches(items(1000), 1), ["cpu"], stop=Stop())
    next(run)
    run.close()
    assert len(lines_of(tmp_path)) <= 3


# ---- several ----


def test_two_processes_draw_what_one_does_though_one_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("ldmcli"), "propagate", True)
    given: dict[str, set[int]] = {}
    really_give = local._Process.give

    def give(process: local._Process, batch: Batch) -> None:
        given.setdefault(process.name.split()[0], set()).update(item.number for item in batch.items)
        really_give(process, batch)

    monkeypatch.setattr(local._Process, "give", give)
    row = items(12, **SLOW)
    found: list[Outcome] = []
    killed = False
    for outcome in run_local(setup_in(tmp_path / "two"), batches(row, 2), TWO, stop=Stop()):
        found.append(outcome)
        if not killed:  # a worker that stands still, with something in hand
            pid = workers_of(os.getpid())[int(outcome.worker.removeprefix("worker-"))]
            os.kill(pid, signal.SIGSTOP)
            killed = bool(given[outcome.worker] - lines_of(tmp_path / "two").keys())
            os.kill(pid, signal.SIGKILL if killed else signal.SIGCONT)
    assert statuses(found) == dict.fromkeys(range(12), "done")
    assert lines_of(tmp_path / "two") == {number: ["done"] for number in range(12)}
    assert max(outcome.attempts for outcome in found) == 2
    (died,) = (record.getMessage() for record in caplog.records if "died" in record.getMessage())
    assert "killed by signal 9" in died
    alone = list(run_local(setup_in(tmp_path / "one"), batches(row, 1), ["cpu"], stop=Stop()))
    assert pixels_apart(pictures(tmp_path / "one", alone), pictures(tmp_path / "two", found)) <= 1


def test_stop_lets_workers_finish_their_batch(tmp_path: Path) -> None:
    stop, found = Stop(), []
    for outcome in run_local(setup_in(tmp_path), batches(items(100, **SLOW), 2), TWO, stop=stop):
        stop.request()
        found.append(outcome)
    assert 2 <= len(found) <= 8
    assert lines_of(tmp_path) == {number: ["done"] for number in statuses(found)}


def test_an_error_of_a_worker_or_of_the_plan_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(LdmError, match="does not exist"):
        list(run_local(setup_in(tmp_path, model=str(tmp_path / "none")), batches(items(4), 1), TWO, stop=Stop()))
    with pytest.raises(LdmError, match="damaged"):
        list(run_local(setup_in(tmp_path), breaking(), TWO, stop=Stop()))


_RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
if __name__ == "__main__":
    from batch_support import batches, items, setup_in
    from ldmcli.batch.dispatch import Stop
    from ldmcli.batch.local import run_local
    setup = setup_in(Path({folder!r}), model={model!r})
    for outcome in run_local(setup, batches(items(10_000, steps=100), 2), ("cpu", "cpu"), stop=Stop()):
        print(outcome.item.number, flush=True)
"""


def test_no_worker_outlives_its_parent(tmp_path: Path) -> None:
    """Nor does a Ctrl-C, which a terminal sends to all, end one before its parent says so."""
    from cli_support import tiny_model

    script = tmp_path / "run.py"
    tests = str(Path(__file__).parent)
    script.write_text(_RUN.format(tests=tests, folder=str(tmp_path / "out"), model=str(tiny_model())))
    parent = subprocess.Popen(
        [sys.executable, script], env=environment(), stdout=subprocess.PIPE, start_new_session=True
    )
    assert parent.stdout is not None
    parent.stdout.readline()
    workers = workers_of(parent.pid)
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    for _ in range(4):
        assert parent.stdout.readline()
    assert all(map(alive, workers))
    parent.kill()
    parent.communicate()
    until(lambda: not any(map(alive, workers)), "the end of the workers", 10)


def test_what_two_workers_say_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A warning on a LoRA, say; what one says twice is said twice."""

    class Process:
        def __init__(self, name: str) -> None:
            self.name = name

    with contextlib.closing(Dispatcher(tmp_path, [], Stop())) as dispatcher:
        for name, text in (("a", "x"), ("b", "x"), ("a", "x"), ("b", "y")):
            record = logging.LogRecord("heard", logging.WARNING, "", 0, f"{text} is amiss", None, None)
            assert not list(local._taken(record, Process(name), dispatcher))  # type: ignore[arg-type]
    assert [record.getMessage() for record in caplog.records] == ["x is amiss", "x is amiss", "y is amiss"]


# ---- what becomes of the batches of the dead ----


@pytest.fixture
def dispatcher(tmp_path: Path) -> Iterator[Dispatcher]:
    with contextlib.closing(Dispatcher(tmp_path, [], Stop())) as dispatcher:
        yield dispatcher


def handed_out(dispatcher: Dispatcher) -> list[Batch]:
    found = []
    while batch := dispatcher.next([]):
        found.append(batch)
    return found


def test_batches_of_the_dead_are_tried_again_then_apart_then_given_up(dispatcher: Dispatcher, tmp_path: Path) -> None:
    row = tuple(items(3))
    assert list(dispatcher.died([Batch(row)])) == []
    (second,) = handed_out(dispatcher)
    assert second == Batch(row, 2)
    assert list(dispatcher.died([second])) == []
    third = handed_out(dispatcher)
    assert third == [Batch((one,), 3) for one in row]
    (failed,) = dispatcher.died([third[1]])
    assert (failed.item, failed.status, failed.attempts) == (row[1], "failed", 3)
    assert "3 workers died" in failed.error
    assert lines_of(tmp_path) == {1: ["failed"]}
    assert handed_out(dispatcher) == []


def test_a_suspect_is_held_alone(tmp_path: Path) -> None:
    with contextlib.closing(Dispatcher(tmp_path, [[item(5)], [item(6)]], Stop())) as dispatcher:
        list(dispatcher.died([Batch((item(0),))]))
        assert dispatcher.next([Batch((item(9),))]) is None
        suspect = dispatcher.next([])
        assert suspect == Batch((item(0),), 2)
        assert dispatcher.next([suspect]) is None
        first = until(lambda: dispatcher.next([]), "the first batch")
        second = until(lambda: dispatcher.next([first]), "the second batch")
        assert dispatcher.next([first, second]) is None


def test_what_the_dead_had_noted_is_not_drawn_again(dispatcher: Dispatcher, tmp_path: Path) -> None:
    row = items(4)
    with contextlib.closing(Worker(setup_in(tmp_path), "worker-0")) as worker:
        done = [future.result() for future in worker.submit(row[:3])]
    lost = next(outcome for outcome in done if outcome.item.number == 1)
    (tmp_path / lost.path).write_bytes(b"something else")
    other = item(2, "another prompt")
    found = list(dispatcher.died([Batch((row[0], row[1], other, row[3]))]))
    assert [(outcome.item.number, outcome.status, outcome.worker) for outcome in found] == [(0, "done", "worker-0")]
    assert found[0].sha256 == next(outcome.sha256 for outcome in done if outcome.item.number == 0)
    (again,) = handed_out(dispatcher)
    assert again.items == (row[1], other, row[3])
    assert noted(tmp_path, []) == {}


def test_workers_that_always_die_loading(dispatcher: Dispatcher) -> None:
    for lived in (False, False, False, True, False, False, False):
        dispatcher.started(lived=lived)
    with pytest.raises(StartError, match="4 workers in a row"):
        dispatcher.started(lived=False)


def test_a_feed_reads_little_ahead_and_nothing_after_it_is_closed() -> None:
    read: list[int] = []

    def plan() -> Iterator[Batch]:
        for number in range(100):
            read.append(number)
            yield Batch([item(number)])

    feed = Feed(plan(), Stop())
    until(lambda: len(read) == 3, "reading ahead")
    assert feed.get()
    until(lambda: len(read) == 4, "reading on")
    feed.close()
    assert feed.get() is None
    time.sleep(0.3)
    assert len(read) == 4
