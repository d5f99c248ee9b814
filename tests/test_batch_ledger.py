"""The ledger of a batch run: what is on the disk after any interruption is what the account says, and no more."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import resource
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cli_support import environment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_faults import mounted

from ldmcli.batch.items import BadRow, Item, Outcome
from ldmcli.batch.ledger import Counts, Ledger, audit, status
from ldmcli.batch.manifest import ManifestWriter, bad_state, key_of, read_manifests, read_states
from ldmcli.batch.pictures import PICTURE_PATH, clean_temporaries, numbers_there, picture_path, write_picture
from ldmcli.batch.runfile import RunIdentity, open_run, read_run, record_rows
from ldmcli.disk.lock import folder_lock
from ldmcli.errors import BadDataError, CannotCreateError, LdmError, MissingInputError, StorageError, TryAgainError
from ldmcli.spec import GenerationRequest

PNG = b"\x89PNG not looked into"
SHA = hashlib.sha256(PNG).hexdigest()
many = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def item(number: int, row: int | None = None, **fields: Any) -> Item:
    """Picture `number`, the only one of its row unless said."""
    row = number + 1 if row is None else row
    request = GenerationRequest(**{"prompt": f"picture of row {row}", "seed": 40 + number} | fields)
    return Item(number=number, row=row, line=row + 1, id=f"r{row}", request=request, extra={"mood": "calm"})


def done(one: Item) -> Outcome:
    return Outcome(one, "done", picture_path(one), SHA, 1.23456, worker="w0")


def failed(one: Item) -> Outcome:
    return Outcome(one, "failed", error="out of memory.", code=1, attempts=2)


def draw(folder: Path, items: Sequence[Item], worker: str = "w0", png: bytes = PNG) -> None:
    """What a worker does."""
    with ManifestWriter(folder, worker) as writer:
        for one in items:
            write_picture(folder, picture_path(one), png)
            writer.append(done(one))


def wanted(ledger: Ledger, items: Sequence[Item], *, retry_failed: bool = False) -> list[int]:
    return [one.number for one in items if ledger.wanted(one, retry_failed=retry_failed)]


def lines(folder: Path) -> list[dict[str, Any]]:
    return list(read_manifests(folder))


# ---- names and pictures ----


def test_pictures_are_named_by_row_and_seed_in_folders_of_ten_thousand() -> None:
    assert picture_path(item(0)) == "images/00000/00000001-40.png"
    assert picture_path(item(31_234, seed=7)) == "images/00003/00031235-7.png"
    assert picture_path(item(5, row=2, seed=2**64 - 1)) == f"images/00000/00000002-{2**64 - 1}-5.png"
    assert picture_path(item(10**12, row=10**12)) == f"images/100000000/{10**12}-{10**12 + 40}-{10**12}.png"


@given(
    st.lists(
        st.tuples(st.integers(0, 40_000), st.integers(1, 40_000), st.integers(0, 3)), unique_by=lambda made: made[0]
    )
)
def test_no_two_pictures_share_a_name_and_all_names_are_safe(made: list[tuple[int, int, int]]) -> None:
    paths = [picture_path(item(number, row=row, seed=seed)) for number, row, seed in made]
    assert len(set(paths)) == len(paths)
    assert all(PICTURE_PATH.fullmatch(path) for path in paths)
    for number, path in zip((number for number, *_ in made), paths, strict=True):
        assert int(path.split("/")[1]) == number // 10_000


def test_a_picture_is_whole_or_not_there(tmp_path: Path) -> None:
    path = picture_path(item(20_000))
    assert write_picture(tmp_path, path, PNG) == SHA
    assert write_picture(tmp_path, path, PNG + b"!") != SHA  # what a killed run left is replaced
    assert (tmp_path / path).read_bytes() == PNG + b"!"
    assert [p.name for p in (tmp_path / path).parent.iterdir()] == [Path(path).name]
    assert list(numbers_there(tmp_path)) == [20_000]


def test_only_sound_files_in_their_place_are_pictures(tmp_path: Path) -> None:
    write_picture(tmp_path, "images/00000/00000003-1.png", PNG)
    write_picture(tmp_path, "images/00000/00000003-1-77.png", PNG)
    write_picture(tmp_path, "images/00001/00000005-1.png", PNG)  # not where it belongs
    write_picture(tmp_path, "images/elsewhere/00000006-1.png", PNG)
    (tmp_path / "images/00000/00000007-1.png").touch()
    (tmp_path / "images/00000/00000008-1.png").mkdir()
    (tmp_path / "images/00000/00000009-1.png").symlink_to("nowhere")
    (tmp_path / "images/00000/notes.txt").write_text("mine")
    (tmp_path / "images/00002").write_text("a file")
    assert sorted(numbers_there(tmp_path)) == [2, 77]
    assert list(numbers_there(tmp_path / "nothing")) == []


def test_stale_temporaries_go_and_nothing_else(tmp_path: Path) -> None:
    draw(tmp_path, [item(0)])
    stale = [tmp_path / name for name in (".ldm-1-ab.part", "images/.ldm-1-ab.part", "images/00000/.ldm-9-cd.part")]
    for path in stale:
        path.write_bytes(b"half")
    kept = tmp_path / "images/00000/ldm.part"
    kept.write_bytes(b"mine")
    clean_temporaries(tmp_path)
    assert not any(path.exists() for path in stale)
    assert kept.exists()
    assert list(numbers_there(tmp_path)) == [0]
    clean_temporaries(tmp_path / "nothing")


# ---- manifests ----


def test_a_line_holds_all_that_the_picture_is_made_of(tmp_path: Path) -> None:
    one = item(3, prompt="grün \u202e\n", guidance_interval=(0.5, 2.0))
    with ManifestWriter(tmp_path, "gpu-0") as writer:
        writer.append(done(one))
        writer.append(failed(item(4)))
    raw = (tmp_path / "manifest/gpu-0.jsonl").read_bytes()
    assert raw.isascii()
    assert raw.count(b"\n") == 2
    good, bad = lines(tmp_path)
    assert GenerationRequest.from_dict(good["request"]) == one.request
    assert (good["id"], good["row"], good["line"], good["number"], good["seed"]) == ("r4", 4, 5, 3, 43)
    assert (good["status"], good["path"], good["sha256"]) == ("done", picture_path(one), SHA)
    assert (good["seconds"], good["attempts"], good["worker"], good["extra"]) == (1.235, 1, "w0", {"mood": "calm"})
    assert (bad["status"], bad["error"], bad["code"], bad["attempts"]) == ("failed", "out of memory.", 1, 2)
    assert bad["worker"] == "gpu-0"
    assert "path" not in bad


def test_the_key_tells_recipes_apart_and_outlives_new_fields() -> None:
    one = item(0)
    assert key_of(one) == key_of(dataclasses.replace(one, number=9, line=9, extra={}))
    others = [dataclasses.replace(one, row=2), dataclasses.replace(one, id="x"), item(0, seed=1), item(0, steps=3)]
    assert len({key_of(other) for other in [one, *others]}) == 5
    assert key_of(one) == "b6236de7e1e1f167"  # as in folders that were begun before


@many
@given(data=st.data())
def test_a_manifest_cut_anywhere_resumes_with_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("run")
    items = [item(i, prompt="y" * (70_000 if i == 1 else 5)) for i in range(4)]
    draw(folder, items)
    path = folder / "manifest/w0.jsonl"
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    near = st.sampled_from(ends).flatmap(lambda end: st.integers(max(0, end - 3), min(len(whole), end + 3)))
    cut = data.draw(st.integers(0, len(whole)) | near)
    path.write_bytes(whole[:cut])
    complete = sum(end <= cut for end in ends)
    ledger = Ledger(folder)
    assert ledger.counts(4) == Counts(4, complete, 0, 4 - complete, complete, 0)
    assert wanted(ledger, items) == list(range(complete, 4))
    draw(folder, items[complete:])  # the torn line is cut off, not continued
    assert path.read_bytes().count(b"\n") == 4
    assert [record["number"] for record in lines(folder)] == [0, 1, 2, 3]
    assert Ledger(folder).counts(4).done == 4


@many
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["done", "failed"]), st.sampled_from(["a", "b", "c"])),
        max_size=25,
    )
)
def test_workers_in_any_order_make_one_account(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[int, str, str]]
) -> None:
    """Done wins over failed, and nothing is counted twice."""
    folder = tmp_path_factory.mktemp("run")
    writers = {name: ManifestWriter(folder, name) for name in "abc"}
    state: dict[int, str] = {}
    for number, how, worker in events:
        one = item(number)
        if how == "done":
            write_picture(folder, picture_path(one), PNG)
        writers[worker].append(done(one) if how == "done" else failed(one))
        state[number] = "done" if "done" in (how, state.get(number)) else "failed"
    for writer in writers.values():
        writer.close()
    ledger = Ledger(folder)
    good, bad = (list(state.values()).count(how) for how in ("done", "failed"))
    assert ledger.counts(6) == Counts(6, good, bad, 6 - good - bad, good, bad)
    items = [item(number) for number in range(6)]
    assert wanted(ledger, items) == [i for i in range(6) if i not in state]
    assert wanted(ledger, items, retry_failed=True) == [i for i in range(6) if state.get(i) == "failed"]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\0" * 500,
        b"{",
        b"[" * 100_000,
        b"7",
        b'{"id": "r2", "row": 2}',
        b"\xff\xfe",
        b'{"row": ' + b"9" * 5000 + b"}",
        json.dumps({"id": "x", "row": 2, "number": 1, "status": "done", "key": "0" * 16, "path": "../../etc"}).encode(),
        json.dumps({"id": "x", "row": 2, "number": -1, "status": "failed", "key": "0" * 16}).encode(),
        json.dumps({"id": "x", "row": 2, "number": True, "status": "failed", "key": "0" * 16}).encode(),
        json.dumps({"id": "x", "row": 2, "number": None, "status": "done"}).encode(),
        json.dumps({"id": "x", "row": 2, "number": 1, "status": "failed", "key": "zz"}).encode(),
    ],
)
def test_a_damaged_line_costs_only_its_picture(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    items = [item(i) for i in range(3)]
    draw(tmp_path, items)
    path = tmp_path / "manifest/w0.jsonl"
    first, _, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + damage + b"\n" + third)
    with caplog.at_level(logging.WARNING):
        ledger = Ledger(tmp_path)
    assert "damaged lines left out: 1" in caplog.text
    assert wanted(ledger, items) == [1]
    assert ledger.counts(3) == Counts(3, 2, 0, 1, 2, 0)


def test_lines_that_another_program_rewrote_mean_the_same(tmp_path: Path) -> None:
    draw(tmp_path, [item(0)])
    with ManifestWriter(tmp_path, "w1") as writer:
        writer.append(failed(item(1)))
        writer.append_bad(BadRow(3, 4, "r3", ("no",)))
    states = list(read_states(tmp_path))
    assert states == [(0, 1, 1, 1, key_of(item(0))), (1, 2, 0, 1, key_of(item(1))), bad_state(3)]
    for path in (tmp_path / "manifest").iterdir():
        rewritten = [json.dumps(json.loads(line), sort_keys=True) for line in path.read_text().splitlines()]
        path.write_text("\n".join(rewritten) + "\n")
    assert list(read_states(tmp_path)) == states


@many
@given(st.data())
def test_both_ways_of_reading_agree_on_what_is_damaged(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("run")
    with ManifestWriter(folder, "w0") as writer:
        writer.append(done(item(0)))
        writer.append(failed(item(1)))
    raw = bytearray(writer.path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=3)):
        raw[place] = data.draw(st.integers(0, 255))
    writer.path.write_bytes(raw)
    sound = [(record["number"], record["row"], record["status"] == "done") for record in lines(folder)]
    assert [state[:3] for state in read_states(folder)] == sound


def test_a_torn_last_line_is_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw(tmp_path, [item(0)])
    with (tmp_path / "manifest/w0.jsonl").open("a") as file:
        file.write('{"row": 2, "num')
    with caplog.at_level(logging.WARNING):
        assert Ledger(tmp_path).counts(2).pending == 1
        assert len(lines(tmp_path)) == 1
    assert not caplog.records


def test_a_line_without_end_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldmcli.batch.manifest._MAX_LINE", 2000)
    items = [item(i) for i in range(2)]
    draw(tmp_path, items)
    path = tmp_path / "manifest/w0.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b'"' + b"x" * 10_000 + b'"\n' + second + b"y" * 10_000)
    assert [record["number"] for record in lines(tmp_path)] == [0, 1]


def test_what_a_line_cannot_hold_is_left_out_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldmcli.batch.manifest._MAX_LINE", 2000)
    with ManifestWriter(tmp_path, "w0") as writer:
        writer.append(done(dataclasses.replace(item(0), extra={"novel": "x" * 5000})))
    assert lines(tmp_path)[0]["extra"] == {}


def test_a_manifest_must_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "manifest").mkdir()
    os.mkfifo(tmp_path / "manifest/w0.jsonl")
    with pytest.raises(CannotCreateError, match="not a regular file"):
        ManifestWriter(tmp_path, "w0")
    with pytest.raises(BadDataError, match="pipe"):
        lines(tmp_path)


# ---- the ledger ----


def test_half_done_and_lost_pictures_are_drawn_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    items = [item(i) for i in range(5)]
    draw(tmp_path, items[:4])
    write_picture(tmp_path, picture_path(items[4]), PNG)  # killed before its line
    (tmp_path / picture_path(items[1])).unlink()
    os.truncate(tmp_path / picture_path(items[2]), 0)
    with caplog.at_level(logging.WARNING):
        ledger = Ledger(tmp_path)
    assert "2 pictures that were done are gone" in caplog.text
    assert wanted(ledger, items) == [1, 2, 4]
    assert ledger.counts(5) == Counts(5, 2, 0, 3, 2, 0)
    draw(tmp_path, [items[i] for i in (1, 2, 4)], "w1")
    assert Ledger(tmp_path).counts(5) == Counts(5, 5, 0, 0, 5, 0)


def test_a_row_that_changed_is_named(tmp_path: Path) -> None:
    draw(tmp_path, [item(0), item(1)])
    with ManifestWriter(tmp_path, "w0") as writer:
        writer.append(failed(item(2)))
    ledger = Ledger(tmp_path)
    for number in (1, 2):
        changed = item(number, prompt="another\n")
        with pytest.raises(BadDataError, match=rf"row {number + 1} \(line {number + 2}, id 'r{number + 1}'\)"):
            ledger.wanted(changed, retry_failed=True)
    assert ledger.wanted(item(3, prompt="another"))


def test_outcomes_count_as_they_come(tmp_path: Path) -> None:
    items = [item(i) for i in range(3)]
    ledger = Ledger(tmp_path)
    ledger.note(failed(items[0]))
    ledger.note(done(items[1]))
    assert ledger.counts(3) == Counts(3, 1, 1, 1, 1, 1)
    ledger.note(done(items[0]))  # tried again
    assert wanted(ledger, items) == [2]
    assert ledger.counts(None) == Counts(None, 2, 0, None, 2, 0)


def of_row(row: int, first: int, pictures: int) -> list[Item]:
    """The pictures of a row that has several."""
    return [dataclasses.replace(item(first + i, row, seed=1), pictures=pictures) for i in range(pictures)]


def test_a_row_is_done_when_all_its_pictures_are(tmp_path: Path) -> None:
    rows = [of_row(1, 0, 3), of_row(2, 3, 1), of_row(4, 9, 5000), of_row(5, 5009, 2), of_row(6, 5011, 4)]
    outcomes = [done(one) for one in (*rows[0], *rows[1], *rows[2][:-1], *rows[4][:-1])]
    outcomes += [failed(rows[2][-1]), failed(rows[3][0])]
    ledger = Ledger(tmp_path / "none")
    with ManifestWriter(tmp_path, "w0") as writer:
        for outcome in outcomes:
            ledger.note(outcome)
            if outcome.item.row != 4:
                writer.append(outcome)
    counts = ledger.counts(6)
    assert (counts.done, counts.failed, counts.pending) == (2, 1, 3)
    assert (counts.images, counts.failed_images) == (3 + 1 + 4999 + 3, 2)
    partly = Ledger(tmp_path / "none")  # after a kill, with pictures drawn in another order
    for one in (rows[0][0], rows[0][2], rows[4][1], rows[4][3]):
        partly.note(done(one))
    assert partly.counts(6) == Counts(6, 0, 0, 6, 4, 0)
    ledger.note(failed(rows[3][1]))
    ledger.note(done(rows[4][-1]))
    ledger.note_bad(BadRow(3, 4, "r3", ("no",)))
    assert audit(ledger.counts(6)) == ("3 done + 3 failed = 6 rows, all of the input.", True)
    for one in (*rows[0], *rows[1], *rows[4][:-1]):
        write_picture(tmp_path, picture_path(one), PNG)
    counts = Ledger(tmp_path).counts(6)
    assert (counts.done, counts.failed, counts.pending) == (2, 0, 4)


def test_bad_rows_are_noted_once(tmp_path: Path) -> None:
    bad = BadRow(2, 3, "r2", ("seed 'abc' is no number.", "steps 0 is not from 1 to 999."))
    for expected in (True, False):  # the first run, and the one after it
        ledger = Ledger(tmp_path)
        assert ledger.note_bad(bad) is expected
        assert not ledger.note_bad(bad)
        if expected:
            with ManifestWriter(tmp_path, "input") as writer:
                writer.append_bad(bad)
        draw(tmp_path, [item(0)])
    (line, *_) = lines(tmp_path)
    assert line["error"] == "seed 'abc' is no number. steps 0 is not from 1 to 999."
    assert (line["row"], line["line"], line["id"], line["code"], line["number"]) == (2, 3, "r2", 65, None)
    assert Ledger(tmp_path).counts(2) == Counts(2, 1, 1, 0, 1, 0)
    assert wanted(Ledger(tmp_path), [item(0)], retry_failed=True) == []


def test_a_bad_row_that_is_good_to_a_newer_version_is_counted_once(tmp_path: Path) -> None:
    with ManifestWriter(tmp_path, "input") as writer:
        writer.append_bad(BadRow(1, 2, "r1", ("unknown field",)))
    ledger = Ledger(tmp_path)
    assert ledger.wanted(item(0))
    assert ledger.counts(1).pending == 1
    draw(tmp_path, [item(0)], "a")
    assert Ledger(tmp_path).counts(1) == Counts(1, 1, 0, 0, 1, 0)


def test_a_number_far_off_costs_little(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.note(failed(item(10**18, row=10**18)))
    assert ledger.counts(3) == Counts(3, 0, 1, 2, 0, 1)


def test_the_audit_holds_only_where_all_rows_are_accounted_for() -> None:
    assert audit(Counts(10, 8, 2, 0, 8, 2)) == ("8 done + 2 failed = 10 rows, all of the input.", True)
    assert audit(Counts(0, 0, 0, 0, 0, 0))[1]
    for rows in (9, 11, None):
        sentence, holds = audit(Counts(rows, 8, 2, None, 8, 2))
        assert not holds
        assert str(rows or "not known") in sentence


def test_status_is_plain_json(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no run"):
        status(tmp_path)
    open_run(tmp_path, identity(rows=None))
    draw(tmp_path, [item(0)])
    assert status(tmp_path)["pending"] is None
    record_rows(tmp_path, 3)
    assert json.loads(json.dumps(status(tmp_path))) == {
        "folder": str(tmp_path), "rows": 3, "done": 1, "failed": 0, "pending": 2, "images": 1, "failed_images": 0,
    }  # fmt: skip


# ---- run.json ----


def identity(**fields: Any) -> RunIdentity:
    return RunIdentity(
        **{
            "input": {"name": "prompts.csv", "sha256": "ab" * 32, "bytes": 120},
            "model": {"name": "tiny", "sha256": "cd" * 32},
            "settings": {"request": {"steps": 20, "guidance_interval": (1.0, 2.0)}, "count": 1, "seed": 5},
            "rows": 10,
            "versions": {"ldmcli": "1.0"},
        }
        | fields
    )


def test_the_same_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_run(tmp_path, identity())
    before = (tmp_path / "run.json").read_bytes()
    moved = {"name": "elsewhere/prompts.csv", "sha256": "ab" * 32, "bytes": 120}
    renamed = {"name": "big", "path": "/models/big", "sha256": "cd" * 32}
    with caplog.at_level(logging.WARNING):
        open_run(tmp_path, identity())
        open_run(tmp_path, identity(input=moved, model=renamed), extend=True)
        assert not caplog.records
        open_run(tmp_path, identity(versions={"ldmcli": "1.1", "torch": "3"}))
    assert 'ldmcli: "1.0" -> "1.1", torch: none -> "3"' in caplog.text
    assert (tmp_path / "run.json").read_bytes() == before
    assert read_run(tmp_path).rows == 10


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"input": {"name": "b.csv", "sha256": "00", "bytes": 9}},
            ['input.name: "prompts.csv" -> "b.csv"', "--extend"],
        ),
        ({"input": {"name": "stdin"}}, ["-> none", "input.sha256"]),
        ({"model": {"name": "big", "sha256": "ef"}}, ['model.name: "tiny" -> "big"', "model.sha256"]),
        ({"model": {"name": "tiny", "sha256": "cd" * 32, "vae": "v"}}, ['model.vae: none -> "v"']),
        ({"settings": {"request": {"steps": 30}, "count": 1, "seed": 5}}, ["settings.request.steps: 20 -> 30"]),
        ({"settings": {"x\x1b[2J" + "y" * 999: "\u202e" * 999}}, ["settings.x\\x1b[2J", "\\u202e"]),
        ({"settings": {str(i): i for i in range(9)}}, ["settings.0: none -> 0", "and 7 more"]),
        ({"shard": "1/2"}, ['shard: none -> "1/2"']),
    ],
)
def test_another_run_is_refused_with_the_difference(tmp_path: Path, fields: dict[str, Any], words: list[str]) -> None:
    open_run(tmp_path, identity())
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(BadDataError) as refusal:
        open_run(tmp_path, identity(**fields))
    sentence = str(refusal.value)
    assert all(word in sentence for word in ["holds another run", "another folder", *words]), sentence
    assert sentence.isprintable()
    assert len(sentence) < 1500
    assert ("--extend" in sentence) == ("input" in fields)
    assert (tmp_path / "run.json").read_bytes() == before


def test_extending_takes_grown_inputs_only(tmp_path: Path) -> None:
    open_run(tmp_path, identity())
    grown = identity(input={"name": "prompts.csv", "sha256": "ee" * 32, "bytes": 240}, rows=20)
    asked: list[Any] = []

    def is_extended(before: Any) -> bool:
        asked.append(before)
        return True

    with pytest.raises(BadDataError, match="give --extend"):
        open_run(tmp_path, grown, is_extended=is_extended)
    with pytest.raises(BadDataError, match="must be unchanged"):
        open_run(tmp_path, grown, extend=True, is_extended=lambda before: False)
    other = dataclasses.replace(grown, settings=dict(grown.settings) | {"count": 2})
    with pytest.raises(BadDataError, match="count"):
        open_run(tmp_path, other, extend=True, is_extended=is_extended)
    assert not asked
    open_run(tmp_path, grown, extend=True, is_extended=is_extended)
    assert asked == [identity().input]
    assert (read_run(tmp_path).rows, read_run(tmp_path).input) == (20, grown.input)
    open_run(tmp_path, grown)
    with pytest.raises(BadDataError, match="holds another run"):
        open_run(tmp_path, identity())


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff", b'{"format": 1}', b'{"format": 2}', b'{"format": "\x1b"}',
        b'{"format": 1, "input": 1, "model": {}, "settings": {}}',
        b'{"format": 1, "input": {}, "model": {}, "settings": {}, "rows": -1}',
        b'{"format": 1, "input": {}, "model": {}, "settings": {}, "rows": true}',
        b'{"format": 1, "input": {}, "model": {}, "settings": {}, "news": 1}',
    ],
)  # fmt: skip
def test_a_damaged_run_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    for use in (lambda: open_run(tmp_path, identity()), lambda: status(tmp_path)):
        with pytest.raises(BadDataError, match=r"run\.json") as refusal:
            use()
        assert str(refusal.value).isprintable()
    assert (tmp_path / "run.json").read_bytes() == content


def test_manifests_without_their_run_file_are_not_taken_over(tmp_path: Path) -> None:
    draw(tmp_path, [item(0)])
    with pytest.raises(BadDataError, match=r"no run\.json"):
        open_run(tmp_path, identity())


# ---- the lock ----

_HOLD = """
import sys, time
from pathlib import Path
from ldmcli.disk.lock import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_second_run_names_the_first_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLD, tmp_path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        by_whom = rf"is being written by process {holder.pid} on \S+ since \d"
        with pytest.raises(TryAgainError, match=by_whom), folder_lock(tmp_path):
            pass
        for content in (b"", b"[]", b'{"pid": "x"}', b"[" * 9999):  # not written yet, or damaged
            (tmp_path / ".lock.json").write_bytes(content)
            with pytest.raises(TryAgainError, match="written by another process"), folder_lock(tmp_path):
                pass
        holder.kill()
    assert (tmp_path / ".lock.json").exists()
    for _ in range(2):
        with folder_lock(tmp_path):
            assert json.loads((tmp_path / ".lock.json").read_bytes())["pid"] == os.getpid()
            with pytest.raises(TryAgainError, match=f"process {os.getpid()}"), folder_lock(tmp_path):
                pass
        assert not (tmp_path / ".lock.json").exists()


def test_a_lock_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CannotCreateError, match="not a folder"):
        folder_lock(tmp_path / "file").__enter__()
    (tmp_path / ".lock").symlink_to("elsewhere")
    with pytest.raises(LdmError, match="cannot lock"):
        folder_lock(tmp_path).__enter__()


# ---- faults ----


def test_a_full_disk_tears_no_line(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk, ManifestWriter(disk, "w0") as writer:
        written = 0
        with contextlib.suppress(StorageError):
            for written in range(1000):
                writer.append(failed(item(written)))
        before = writer.path.read_bytes()
        assert before.endswith(b"\n")
        with pytest.raises(StorageError, match="No space left"):
            writer.append(failed(item(written)))
        assert writer.path.read_bytes() == before
        assert [record["number"] for record in lines(disk)] == list(range(written))


def test_a_line_written_in_part_is_taken_back(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ManifestWriter(tmp_path, "w0") as writer:
        writer.append(failed(item(0)))
        before = writer.path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
        try:
            with pytest.raises(StorageError, match=os.strerror(errno.EFBIG)):
                writer.append(failed(item(1)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert writer.path.read_bytes() == before
        writer.append(failed(item(1)))
    assert [record["number"] for record in lines(tmp_path)] == [0, 1]


def test_a_read_only_folder_is_refused_but_has_a_status(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=256k") as disk:
        open_run(disk, identity(rows=2))
        draw(disk, [item(0)])
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for attempt in (
            lambda: write_picture(disk, picture_path(item(1)), PNG),
            lambda: write_picture(disk, picture_path(item(10_001)), PNG),
            lambda: ManifestWriter(disk, "w0"),
            lambda: record_rows(disk, 3),
            lambda: folder_lock(disk).__enter__(),
        ):
            with pytest.raises(CannotCreateError, match="Read-only"):
                attempt()
        assert status(disk)["done"] == 1


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "images").write_text("mine")
    with pytest.raises(CannotCreateError, match=r"images is there already and is not a folder"):
        write_picture(tmp_path, picture_path(item(0)), PNG)
    assert Ledger(tmp_path).counts(1).pending == 1


_LOAD = """
import sys
from pathlib import Path
from ldmcli.batch import ledger
ledger.numbers_there = lambda folder: range(180_000)
counts = ledger.Ledger(Path(sys.argv[1])).counts(200_000)
assert "torch" not in sys.modules
# Not ru_maxrss, in which the process that started this one is counted.
peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))
print(counts.done, counts.pending, peak)
"""


def test_many_pictures_are_read_in_little_memory(tmp_path: Path) -> None:
    with ManifestWriter(tmp_path, "w0") as writer:
        writer.append(dataclasses.replace(done(item(0)), seconds=0.5))
    _, middle, rest = writer.path.read_bytes().partition(b', "status"')
    rest = middle + rest[: rest.rindex(b', "check"')]
    with writer.path.open("wb") as file:
        for i in range(200_000):
            body = b'{"row": %d, "number": %d%b' % (i + 1, i, rest)
            file.write(b'%b, "check": "%08x"}\n' % (body, zlib.crc32(body)))
    script = [sys.executable, "-c", _LOAD, tmp_path]
    counted = subprocess.run(script, check=True, capture_output=True, text=True, env=environment()).stdout.split()
    assert counted[:2] == ["180000", "20000"]
    assert int(counted[2]) < 80_000  # KiB: half of it is Python and this program
