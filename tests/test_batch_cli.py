"""`ldm batch` as its users run it: real processes with the small random model."""

import contextlib
import gzip
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import Result, assert_refused, ldm, pixels, start, status_of, tiny_model, until

PROMPTS = "# fruit\na red apple\n\nan orange\na pear\n"


def batch(*arguments: str | Path, **settings: Any) -> Result:
    """`ldm batch` with the random model and one step."""
    return ldm("batch", *arguments, "-m", tiny_model(), "--steps", "1", **settings)


def prompt_file(folder: Path, name: str = "prompts.txt", text: str = PROMPTS) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for path in sorted((folder / "manifest").glob("*")) for line in path.read_text().splitlines()
    ]


def status(folder: Path) -> dict[str, Any]:
    return ldm("batch", "--status", folder, "--json").records[0]


def assert_whole(folder: Path, rows: int) -> None:
    """Every row is done exactly once, every picture is sound and the one that the manifest tells of."""
    done = [record for record in manifest(folder) if record["status"] == "done"]
    assert sorted(record["row"] for record in done) == list(range(1, rows + 1))
    for record in done:
        data = (folder / record["path"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == record["sha256"]
        assert pixels(data).shape == (16, 16, 3)
    on_disk = {str(path.relative_to(folder)) for path in (folder / "images").rglob("*") if path.is_file()}
    assert on_disk == {record["path"] for record in done}  # and nothing temporary is left
    assert status(folder) | {"folder": ""} == {
        "folder": "", "rows": rows, "done": rows, "failed": 0, "pending": 0, "images": rows, "failed_images": 0,
    }  # fmt: skip


# ---- input ----


def test_a_run_and_its_account(tmp_path: Path) -> None:
    done = batch(prompt_file(tmp_path), "-o", tmp_path / "out", "--sheet", tmp_path / "sheet.png")
    assert done.code == 0, done
    assert len(done.paths) == 3
    assert "3 done + 0 failed = 3 rows" in done.err
    assert_whole(tmp_path / "out", 3)
    assert pixels(tmp_path / "sheet.png").shape[1] > 3 * 16
    first = min(manifest(tmp_path / "out"), key=lambda record: record["number"])  # threads write a batch in any order
    assert (first["row"], first["line"], first["id"], first["seed"]) == (1, 2, "1", first["request"]["seed"])
    assert first["request"]["prompt"] == "a red apple"


INPUTS = {
    "txt": PROMPTS.encode(),
    "jsonl": b'{"prompt":"a red apple"}\r\n{"prompt":"an orange"}\r\n{"prompt":"a pear"}',
    "csv": b'\xef\xbb\xbfnote,prompt\nx,a red apple\n"y,z",an orange\n,"a pear"\n',
    "tsv": b"Prompt\tCategory\na red apple\tFruit\nan orange\t\na pear\tFruit\n",
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("format", INPUTS)
def test_every_format_from_standard_input_draws_the_same(tmp_path: Path, format: str, packed: bool) -> None:
    data = gzip.compress(INPUTS[format]) if packed else INPUTS[format]
    done = batch("-", "--format", format, "-o", tmp_path / "out", stdin=data)
    assert done.code == 0, done
    texts = {record["row"]: record["request"]["prompt"] for record in manifest(tmp_path / "out")}
    assert texts == {1: "a red apple", 2: "an orange", 3: "a pear"}
    if format == "csv":
        assert {record["extra"]["note"] for record in manifest(tmp_path / "out")} == {"x", "y,z", ""}


def test_rows_override_options_and_the_grid_multiplies(tmp_path: Path) -> None:
    rows = '{"prompt":"a","steps":2,"seed":7,"count":2,"id":"x"}\n{"prompt":"b","guidance_scale":3}\n'
    path = prompt_file(tmp_path, "rows.jsonl", rows)
    done = batch(path, "-o", tmp_path / "out", "--grid", "guidance_scale=1,2", "--json")
    assert done.code == 0, done
    drawn = [(r["row"], r["seed"], r["request"]["steps"], r["request"]["guidance_scale"]) for r in done.records]
    own = drawn[-1][1]
    assert drawn == [(1, 7, 2, 1.0), (1, 8, 2, 1.0), (1, 7, 2, 2.0), (1, 8, 2, 2.0), (2, own, 1, 3.0)]
    assert status(tmp_path / "out")["done"] == 2
    assert status(tmp_path / "out")["images"] == 5


def test_a_dry_run_draws_nothing(tmp_path: Path) -> None:
    done = batch(prompt_file(tmp_path), "--dry-run", "--json", "-c", "2", "-o", tmp_path / "out")
    assert done.records == [{"rows": 3, "images": 6, "bad_rows": 0, "pixel_steps": 6 * 16 * 16}]
    assert not (tmp_path / "out").exists()


BAD = '{"prompt":"a"}\n{"prompt":"b","seed":"abc","steps":0}\n{"promt":"c"}\n{nonsense\n{"prompt":"d"}\n'


def test_bad_rows_are_told_of_and_the_rest_is_drawn(tmp_path: Path) -> None:
    path = prompt_file(tmp_path, "rows.jsonl", BAD)
    done = batch(path, "-o", tmp_path / "out")
    assert done.code == 3, done
    assert len(done.paths) == 2
    for words in ("line 2: seed 'abc'", "steps 0 is not a whole number from 1 to 999", "line 3:", "line 4:"):
        assert words in done.err
    assert "2 done + 3 failed = 5 rows" in done.err
    again = batch(path, "-o", tmp_path / "out")
    assert (again.code, again.out) == (3, b"")
    assert len(manifest(tmp_path / "out")) == 5  # none is told of twice


def test_what_failed_is_listed_with_its_prompt(tmp_path: Path) -> None:
    batch(prompt_file(tmp_path, "rows.jsonl", BAD), "-o", tmp_path / "out")
    listed = ldm("batch", "--status", tmp_path / "out", "--failed", "--json").records
    assert [(one["row"], one["line"], one["prompt"], one["code"]) for one in listed] == [
        (2, 2, "b", 65), (3, 3, None, 65), (4, 4, None, 65),
    ]  # fmt: skip
    told = ldm("batch", "--status", tmp_path / "out", "--failed").out.decode()
    assert "row 2, line 2 “b”: seed 'abc'" in told
    assert_refused(ldm("batch", "--failed"), 2, "--status DIR")


def test_remarks_come_once_a_run(tmp_path: Path) -> None:
    rows = [{"prompt": "a (cat:1.2)", "guidance_scale": 0}, {"prompt": "b BREAK", "guidance_scale": 0.5}]
    path = prompt_file(tmp_path, "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    done = batch(path, "-o", tmp_path / "out")
    assert done.code == 0, done
    assert done.err.count("guidance below 1 draws what the negative prompt says") == 1
    assert done.err.count("--prompt-syntax weighted") == 1


def test_strict_draws_nothing_where_a_row_is_bad(tmp_path: Path) -> None:
    done = batch(prompt_file(tmp_path, "rows.jsonl", BAD), "-o", tmp_path / "out", "--strict")
    assert (done.code, done.out) == (65, b"")
    assert "3 bad rows" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "\n\n# nothing\n"])
def test_an_empty_file_is_no_error(tmp_path: Path, text: str) -> None:
    done = batch(prompt_file(tmp_path, text=text), "-o", tmp_path / "out")
    assert (done.code, done.out) == (0, b"")
    assert "0 rows" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere.txt", "-o", "out"], 66, ["nowhere.txt"]),
        (["-o", "out"], 2, ["FILE"]),
        (["p.txt"], 2, ["--output"]),
        (["p.txt", "-o", "out", "--grid", "stepz=1"], 2, ["stepz"]),
        (["p.txt", "-o", "out", "--grid", "steps=0"], 2, ["steps 0"]),
        (["p.txt", "-o", "out", "--shard", "3/2"], 2, ["3/2"]),
        (["p.txt", "-o", "out", "--time-limit", "soon"], 2, ["soon"]),
        (["p.txt", "-o", "out", "--devices", "tpu"], 2, ["tpu"]),
        (["p.txt", "-o", "out", "--ray-address", "x"], 2, ["--engine ray"]),
        (["p.dat", "-o", "out"], 2, ["--format"]),
        (["p.txt", "-o", "p.txt"], 73, ["p.txt"]),
        (["--status", "."], 66, ["run.json"]),
    ],
)
def test_what_cannot_be_meant(tmp_path: Path, arguments: Sequence[str], code: int, words: Sequence[str]) -> None:
    for name in ("p.txt", "p.dat"):
        prompt_file(tmp_path, name)
    assert_refused(ldm("batch", *arguments, cwd=tmp_path), code, *words)


# ---- going on ----


def test_the_same_command_goes_on(tmp_path: Path) -> None:
    path, out = prompt_file(tmp_path), tmp_path / "out"
    part = batch(path, "-o", out, "--max-images", "1")
    assert (part.code, len(part.paths)) == (75, 1)
    assert "2 rows are still to be drawn" in part.err
    kept = part.paths[0].stat()
    (out / "images" / "00000" / ".ldm-x.part").write_bytes(b"half a picture")
    with (out / "manifest" / "worker-0.jsonl").open("a") as file:
        file.write('{"row": 2, "numb')  # torn
    rest = batch(path, "-o", out)
    assert (rest.code, len(rest.paths)) == (0, 2)
    assert part.paths[0].stat().st_mtime_ns == kept.st_mtime_ns
    assert_whole(out, 3)
    nothing = batch(path, "-o", out)
    assert (nothing.code, nothing.out) == (0, b"")
    part.paths[0].unlink()
    assert [p.name for p in batch(path, "-o", out).paths] == [part.paths[0].name]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-g", "2"], "settings.guidance_scale"),
        (["--seed", "1"], "settings.seed: 0 -> 1"),
        (["--grid", "steps=1,2"], "settings.grid"),
        (["--vae", "MODEL"], "model.vae"),
    ],
)
def test_another_run_in_the_folder_is_refused(tmp_path: Path, arguments: Sequence[str], words: str) -> None:
    path, out = prompt_file(tmp_path), tmp_path / "out"
    assert batch(path, "-o", out).code == 0
    more = [str(tiny_model()) if argument == "MODEL" else argument for argument in arguments]
    refused = batch(path, "-o", out, *more)
    assert (refused.code, refused.out) == (65, b""), refused
    assert words in refused.err


def test_extend_takes_rows_added_at_the_end(tmp_path: Path) -> None:
    path, out = prompt_file(tmp_path), tmp_path / "out"
    assert batch(path, "-o", out).code == 0
    path.write_text(PROMPTS + "a plum\n")
    refused = batch(path, "-o", out)
    assert refused.code == 65
    assert "--extend" in refused.err
    more = batch(path, "-o", out, "--extend")
    assert (more.code, len(more.paths)) == (0, 1)
    assert_whole(out, 4)
    path.write_text("a lemon\n" + PROMPTS + "a plum\n")
    assert batch(path, "-o", out, "--extend").code == 65


def test_rows_of_standard_input_are_compared_as_they_come(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert batch("-", "--format", "txt", "-o", out, stdin=b"one\ntwo\n").code == 0
    same = batch("-", "--format", "txt", "-o", out, stdin=b"one\ntwo\nthree\n")
    assert (same.code, len(same.paths)) == (0, 1)
    other = batch("-", "--format", "txt", "-o", out, stdin=b"one\nzwei\n")
    assert other.code == 65
    assert "row 2" in other.err


def test_only_what_failed_is_tried_again(tmp_path: Path) -> None:
    path, out = prompt_file(tmp_path), tmp_path / "out"
    assert batch(path, "-o", out, "--max-images", "2").code == 75
    lines = (out / "manifest" / "worker-0.jsonl").read_text().splitlines()
    failed = json.loads(lines[0])
    (out / failed.pop("path")).unlink()
    failed |= {"status": "failed", "error": "made up", "code": 1}
    (out / "manifest" / "worker-0.jsonl").write_text(json.dumps(failed) + "\n" + lines[1] + "\n")
    assert (status(out)["done"], status(out)["failed"], status(out)["pending"]) == (1, 1, 1)
    again = batch(path, "-o", out, "--retry-failed")
    assert (again.code, len(again.paths)) == (75, 1)  # the third row is still to be drawn
    assert (status(out)["done"], status(out)["failed"]) == (2, 0)
    assert batch(path, "-o", out).code == 0


def test_shards_make_up_the_whole(tmp_path: Path) -> None:
    path = prompt_file(tmp_path)
    whole = batch(path, "-o", tmp_path / "whole").paths
    parts = [batch(path, "-o", tmp_path / f"part{i}", "--shard", f"{i}/2") for i in (1, 2)]
    assert [part.code for part in parts] == [0, 0]
    drawn = {p.name: p for part in parts for p in part.paths}
    assert sorted(drawn) == sorted(p.name for p in whole)
    assert all(np.array_equal(pixels(drawn[p.name]), pixels(p)) for p in whole)
    assert status(tmp_path / "part1")["rows"] == 2


def test_two_workers_draw_what_one_does(tmp_path: Path) -> None:
    path = prompt_file(tmp_path, text="".join(f"prompt {i}\n" for i in range(12)))
    one, two = tmp_path / "one", tmp_path / "two"
    assert batch(path, "-o", one, "-b", "4").code == 0
    assert batch(path, "-o", two, "--devices", "cpu*2").code == 0
    assert_whole(one, 12)
    assert_whole(two, 12)
    for record in manifest(one):
        difference = pixels(one / record["path"]).astype(int) - pixels(two / record["path"])
        assert np.abs(difference).max() <= 1


# ---- signals, locks, pipes ----


def long_run(folder: Path, *more: str) -> "subprocess.Popen[bytes]":
    path = prompt_file(folder, text="".join(f"prompt {i}\n" for i in range(400)))
    return start("batch", path, "-o", folder / "out", "-m", tiny_model(), "--steps", "20", *more)


def wait_for_pictures(folder: Path, count: int = 3) -> None:
    lines = folder / "out" / "manifest" / "worker-0.jsonl"
    until(lambda: lines.exists() and lines.read_bytes().count(b"\n") >= count, "the first pictures")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_what_is_in_hand(tmp_path: Path, number: signal.Signals, code: int) -> None:
    process = long_run(tmp_path)
    wait_for_pictures(tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert status_of(process) == code, err
    assert b"Traceback" not in err
    assert b"the same command goes on" in err
    facts = status(tmp_path / "out")
    assert facts["failed"] == 0
    assert 3 <= facts["done"] < 400
    assert facts["done"] == len(list((tmp_path / "out" / "images").rglob("*.png")))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_it_waits_for_rows(tmp_path: Path, number: signal.Signals, code: int) -> None:
    process = start("batch", "-", "--format", "txt", "-o", tmp_path / "out", "-m", tiny_model(), "--steps", "1")
    assert process.stdin is not None
    process.stdin.write(b"one\n")
    process.stdin.flush()
    wait_for_pictures(tmp_path, 1)
    process.send_signal(number)
    process.wait(timeout=60)  # with standard input still open
    assert status_of(process) == code
    assert status(tmp_path / "out")["done"] == 1


def test_a_second_signal_stops_now(tmp_path: Path) -> None:
    process = long_run(tmp_path, "-b", "64")
    wait_for_pictures(tmp_path, 1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert status_of(process) == 130, err
    assert b"Traceback" not in err
    assert not list((tmp_path / "out" / "images").rglob("*.part"))


def test_a_second_run_in_the_folder_is_told_of_the_first(tmp_path: Path) -> None:
    process = long_run(tmp_path)
    wait_for_pictures(tmp_path, 1)
    second = batch(tmp_path / "prompts.txt", "-o", tmp_path / "out")
    process.terminate()
    process.communicate(timeout=60)
    assert second.code == 75
    assert f"process {process.pid}" in second.err


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    process = long_run(tmp_path, "--json", "-q")
    assert process.stdout is not None
    first = json.loads(process.stdout.readline())
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert first["status"] == "done"
    assert status(tmp_path / "out")["done"] >= 1


def test_json_lines_come_as_pictures_are_finished(tmp_path: Path) -> None:
    process = start("batch", "-", "--format", "txt", "-o", tmp_path, "-m", tiny_model(), "--steps", "1", "--json")
    assert process.stdin is not None
    assert process.stdout is not None
    for i in range(3):
        process.stdin.write(f"prompt {i}\n".encode())
        process.stdin.flush()
        record = json.loads(process.stdout.readline())
        assert (record["row"], record["request"]["prompt"]) == (i + 1, f"prompt {i}")
        assert Path(record["path"]).is_file()
    process.stdin.close()
    assert process.wait(timeout=60) == 0


def test_endless_input_ends_at_the_limit(tmp_path: Path) -> None:
    source = subprocess.Popen(["yes", "a prompt"], stdout=subprocess.PIPE)
    process = start(
        "batch", "-", "--format", "txt", "-o", tmp_path / "out", "-m", tiny_model(), "--steps", "1",
        "--max-images", "5",
        stdin=source.stdout,
    )  # fmt: skip
    out, err = process.communicate(timeout=60)
    source.kill()
    source.wait()
    assert process.returncode == 0, err
    assert len(out.splitlines()) == 5


def test_a_time_limit_ends_a_run_that_goes_on_later(tmp_path: Path) -> None:
    process = long_run(tmp_path, "--time-limit", "1s")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert 1 <= status(tmp_path / "out")["done"] < 400


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_loads(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert_refused(batch(prompt_file(tmp_path), "-o", tmp_path / "file" / "out"), 73, "file")


def test_a_sheet_that_cannot_be_written_is_refused_before_the_model_loads(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused = batch(prompt_file(tmp_path), "-o", tmp_path / "out", "--sheet", tmp_path / "file" / "sheet.png")
    assert_refused(refused, 73, "file")
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_column_that_may_be_misspelt_is_told_of_once(tmp_path: Path) -> None:
    done = batch(prompt_file(tmp_path, "rows.csv", "prompt,guidence scale\na,3\n"), "-o", tmp_path / "out")
    assert done.code == 0, done
    assert done.err.count("guidance_scale") == 1


def test_a_full_disk_can_be_gone_on_from(tmp_path: Path) -> None:
    """A file system of 200 KB; needs the right to mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", small], capture_output=True, check=False
    ).returncode
    if mounted != 0:
        pytest.skip("may not mount a file system")
    try:
        path = prompt_file(tmp_path, text="".join(f"prompt {i}\n" for i in range(100)))
        full = batch(path, "-o", small / "out")
        assert full.code == 74, full
        assert "Traceback" not in full.err
        subprocess.run(["mount", "-o", "remount,size=20m", small], check=True)
        assert batch(path, "-o", small / "out").code == 0
        assert_whole(small / "out", 100)
    finally:
        with contextlib.suppress(OSError):
            os.chdir(tmp_path)
        subprocess.run(["umount", small], check=False)
