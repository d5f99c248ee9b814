"""How far a run is: in its progress line, at one look, and followed by another process, which never disturbs it."""

import io
import logging
import os
import re
from pathlib import Path
from typing import Any

import pytest
from batch_support import batch
from cli_support import assert_refused, ldm_here
from test_batch_ledger import done, draw, failed, item

from ldmcli.batch import watching
from ldmcli.batch.ledger import Counts
from ldmcli.batch.manifest import ManifestWriter
from ldmcli.batch.pace import Pace, summary
from ldmcli.batch.runfile import RunIdentity, open_run
from ldmcli.batch.survey import Survey
from ldmcli.batch.watching import Watch
from ldmcli.cli import run_status
from ldmcli.cli.run_status import RunBar
from ldmcli.disk import lock
from ldmcli.disk.lock import folder_lock, held_by

ROWS = '{"prompt": "a fox"}\n{"prompt": "an owl", "steps": 0}\n{"prompt": "a cat"}\n'


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_here(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error as a terminal, on which progress shows."""
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    logging.getLogger("ldmcli").setLevel(logging.INFO)
    return stream


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of four rows, nothing of it drawn."""
    open_run(tmp_path, RunIdentity({"name": "rows.txt"}, {}, {}, rows=4))
    return tmp_path


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in found}


# ---- the pace ----


def test_the_pace_is_that_of_late() -> None:
    pace = Pace(0.0)
    assert pace.per_second(10.0) == 0
    assert pace.seconds_left(5, 10.0) is None
    for at in range(1000, 1100):
        pace.note(at)  # the first took very long
    assert pace.per_second(1099.0) == pytest.approx(1.0, rel=0.05)
    for at in range(1102, 1402, 2):
        pace.note(at)
    assert pace.per_second(1400.0) == pytest.approx(0.5, rel=0.05)
    assert pace.seconds_left(10, 1400.0) == pytest.approx(20.0, rel=0.05)
    assert pace.per_second(2800.0) < 0.05  # none comes any more


@pytest.mark.parametrize(
    ("per_second", "left", "failures", "shown"),
    [
        (0.0, None, 0, ""),
        (2.25, 46.2, 0, "2.2 pictures/s, 0:46 left"),
        (0.05, 7265.0, 3, "20.0 s/picture, 2:01:05 left, 3 failed"),
        (0.0, None, 1, "1 failed"),
    ],
)
def test_what_a_progress_line_says(per_second: float, left: float | None, failures: int, shown: str) -> None:
    assert summary(per_second, left, failures) == shown


def last_line(terminal: Terminal) -> str:
    return next(filter(str.strip, reversed(re.split(r"[\r\n]+", terminal.getvalue())))).strip()


def test_a_progress_line_has_rate_time_left_and_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_here(monkeypatch)
    monkeypatch.setattr(run_status.time, "monotonic", iter([100.0, 102.0, 104.0, 106.0]).__next__)
    before = Counts(rows=10, done=2, failed=0, pending=8, images=2, failed_images=0)
    bar = RunBar(before, Survey(10, 9, 1, [], 0), {"retry_failed": False, "max_images": None})
    bar.note(done(item(2)))
    bar.note(failed(item(3)))
    bar.note(done(item(4)))
    bar.close()
    assert last_line(terminal).endswith(" 5/9 pictures, 2.0 s/picture, 0:08 left, 2 failed")


def test_a_progress_line_of_rows_that_still_come(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_here(monkeypatch)
    monkeypatch.setattr(run_status.time, "monotonic", iter([100.0, 100.5]).__next__)
    bar = RunBar(Counts(None, 0, 0, None, 0, 0), None, {"retry_failed": False, "max_images": None})
    bar.note(failed(item(0)))
    bar.close()
    assert last_line(terminal) == "1 pictures, 2.0 pictures/s, 1 failed"


# ---- the watch ----


def test_a_watch_sees_what_comes_while_another_process_draws(run: Path) -> None:
    draw(run, [item(0)])
    with folder_lock(run), ManifestWriter(run, "w1") as writer:
        before = contents(run)
        watch = Watch(run)
        view = watch.view()
        assert (view.over, view.counts.done, view.counts.pending, view.failures) == (False, 1, 3, ())
        assert watch.view().counts == view.counts
        assert contents(run) == before
        draw(run, [item(1)], "w2")  # a worker of whom there was no file yet
        writer.append(failed(item(2)))
        view = watch.view()
        assert (view.counts.done, view.counts.failed, view.counts.pending) == (2, 1, 1)
        assert [one["row"] for one in view.failures] == [3]
        assert view.per_second > 0
        assert view.seconds_left is not None
        writer.append(done(item(2)))  # it was tried again
        assert watch.view().counts.failed == 0
        assert not watch.view().failures
    view = watch.view()
    assert (view.over, view.counts.pending, view.seconds_left) == (True, 1, None)


def test_a_watch_reads_no_line_before_it_is_whole(run: Path) -> None:
    draw(run, [item(0), item(1)])
    path = run / "manifest" / "w0.jsonl"
    text = path.read_bytes()
    start = text.index(b"\n") + 1
    path.write_bytes(text[: start + 40])
    watch = Watch(run)
    assert watch.view().counts.done == 1
    path.write_bytes(text)
    assert watch.view().counts.done == 2


def test_who_holds_a_folder_is_told_without_its_lock(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert held_by(run) is None
    with folder_lock(run):
        held = held_by(run)
        assert held is not None
        assert (held.pid, held.here) == (os.getpid(), True)
        kept = (run / ".lock.json").read_text()
    (run / ".lock.json").write_text(kept.replace(str(os.getpid()), str(2**22 + 1)))  # more than there can be
    assert held_by(run) is None
    monkeypatch.setattr(lock.platform, "node", lambda: "elsewhere")
    assert held_by(run) is not None  # another machine's may be there
    for damaged in ("", "[]", '{"pid": 1}', "nothing"):
        (run / ".lock.json").write_text(damaged)
        assert held_by(run) is None


def test_a_run_of_another_machine_is_over_with_its_rows(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(run, [item(number) for number in range(3)])
    monkeypatch.setattr(watching, "held_by", lambda _: lock.Holder(1, "elsewhere", "2026-01-01 00:00:00+00:00"))
    watch = Watch(run)
    assert not watch.view().over
    draw(run, [item(3)], "w1")
    assert watch.view().over


def test_the_command_follows_a_run_to_its_end(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    """Each look is a step of the run here."""
    terminal = terminal_here(monkeypatch)
    steps = [lambda: draw(run, [item(1)]), lambda: None, lambda: draw(run, [item(2), item(3)])]
    with folder_lock(run):
        draw(run, [item(0)])

        def step(_: float) -> None:
            if steps:
                steps.pop(0)()
            else:
                (run / ".lock.json").unlink()

        monkeypatch.setattr(run_status.time, "sleep", step)
        counts = run_status.watch_run(run, as_json=False)
    assert counts.pending == 0
    assert "2/4 rows" in terminal.getvalue()
    assert capsysbinary.readouterr().out.splitlines()[1:3] == [b"rows:          4", b"done:          4"]


def test_runs_that_nobody_draws(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    out = tmp_path / "out"
    assert batch(tmp_path / "rows.jsonl", "-o", out, "--max-images", "1").code == 75
    before = contents(out)
    unfinished = ldm_here("batch", "--watch", out)
    assert unfinished.code == 75
    assert "1 rows are still to be drawn" in unfinished.err
    assert contents(out) == before
    assert batch(tmp_path / "rows.jsonl", "-o", out).code == 3
    watched = ldm_here("batch", "--watch", out, "--json")
    assert watched.code == 3
    expected: dict[str, Any] = {"rows": 3, "done": 2, "failed": 1, "pending": 0, "running": False}
    assert watched.records[-1].items() >= expected.items()
    assert_refused(ldm_here("batch", "--watch", tmp_path / "nowhere"), 66, "nowhere", "no run")
    assert_refused(ldm_here("batch", "--watch", tmp_path, "--status", tmp_path), 2, "--status", "--watch")
    for unheeded in (["rows.jsonl"], ["--output", "x"], ["--steps", "3"], ["--dry-run"]):
        for look in ("--watch", "--status"):
            assert_refused(ldm_here("batch", look, out, *unheeded), 2, "draw nothing; leave out")


def test_facts_stand_in_columns(run: Path) -> None:
    draw(run, [item(0)])
    status = ldm_here("batch", "--status", run).out.decode().splitlines()
    samplers = ldm_here("samplers").out.decode().splitlines()
    models = ldm_here("models").out.decode().splitlines()
    for lines, column in ((status, r"\S.*: +"), (samplers, r"\S+ +"), (models, r"\S+ +[\d.]+ [MG]B +")):
        starts = [found.end() for line in lines if (found := re.match(column, line))]
        assert len(lines) == len(starts) > 0
        assert len(set(starts)) == 1, lines
