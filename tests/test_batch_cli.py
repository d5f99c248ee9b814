"""`ldm batch` as its users run it, with the small random model; as a process where the process matters."""

import gzip
import json
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from batch_support import assert_whole, batch, manifest, status
from cli_support import assert_refused, ldm_here, pixels, start, status_of, tiny_model, until
from test_faults import mounted

PROMPTS = "# fruit\na red apple\n\nan orange\na pear\n"
SIGNALS = pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])

pytestmark = pytest.mark.usefixtures("one_thread")


def prompt_file(folder: Path, name: str = "prompts.txt", text: str = PROMPTS) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def numbered(folder: Path, count: int) -> Path:
    return prompt_file(folder, text="".join(f"prompt {i}\n" for i in range(count)))


def prompt_by_row(folder: Path) -> dict[int, str]:
    return {record["row"]: record["request"]["prompt"] for record in manifest(folder)}


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
    assert list(first) == [
        "row", "number", "status", "key", "pictures", "id", "line", "seed", "path", "sha256", "attempts", "seconds",
        "worker", "time", "request", "extra", "check",
    ]  # fmt: skip
    begun = json.loads((tmp_path / "out" / "run.json").read_text())
    assert list(begun) == ["format", "input", "model", "settings", "rows", "shard", "versions"]


INPUTS = {
    "txt": PROMPTS.encode(),
    "jsonl": b'{"prompt":"a red apple"}\r\n{"prompt":"an orange"}\r\n{"prompt":"a pear"}',
    "csv": b'\xef\xbb\xbfnote,prompt\nx,a red apple\n"y,z",an orange\n,"a pear"\n',
    "tsv": b"Prompt\tCategory\na red apple\tFruit\nan orange\t\na pear\tFruit\n",
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("format", INPUTS)
def test_every_format_from_standard_input_draws_the_same(tmp_path: Path, format: str, pack: type[bytes]) -> None:
    done = batch("-", "--format", format, "-o", tmp_path / "out", stdin=pack(INPUTS[format]))
    assert done.code == 0, done
    assert prompt_by_row(tmp_path / "out") == {1: "a red apple", 2: "an orange", 3: "a pear"}
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


BAD = '{"prompt":"a"}\n{"prompt":"a bad one","seed":"abc","steps":0}\n{"promt":"c"}\n{nonsense\n{"prompt":"d"}\n'


def test_bad_rows_are_reported_and_the_rest_is_drawn(tmp_path: Path) -> None:
    path, out = prompt_file(tmp_path, "rows.jsonl", BAD), tmp_path / "out"
    strict = batch(path, "-o", out, "--strict")
    assert (strict.code, strict.out) == (65, b"")
    assert "3 bad rows" in strict.err
    assert not out.exists()
    done = batch(path, "-o", out)
    assert done.code == 3, done
    assert len(done.paths) == 2
    for words in ("line 2: seed 'abc'", "steps 0 is not a whole number from 1 to 999", "line 3:", "line 4:"):
        assert words in done.err
    assert "2 done + 3 failed = 5 rows" in done.err
    again = batch(path, "-o", out)
    assert (again.code, again.out) == (3, b"")
    assert len(manifest(out)) == 5  # none is noted twice
    listed = ldm_here("batch", "--status", out, "--failed", "--json").records
    assert [(one["row"], one["line"], one["prompt"], one["code"]) for one in listed] == [
        (2, 2, "a bad one", 65), (3, 3, None, 65), (4, 4, None, 65),
    ]  # fmt: skip
    assert "row 2, line 2 “a bad one”: seed 'abc'" in ldm_here("batch", "--status", out, "--failed").out.decode()
    assert ldm_here("gallery", out).code == 0
    assert "a bad one" in (out / "index.html").read_text()


def test_remarks_come_once_a_run(tmp_path: Path) -> None:
    rows = "prompt,guidance_scale,guidence\na (cat:1.2),0,\nb BREAK,0.5,\n"
    done = batch(prompt_file(tmp_path, "rows.csv", rows), "-o", tmp_path / "out")
    assert done.code == 0, done
    assert done.err.count("guidance below 1 draws what the negative prompt says") == 1
    assert done.err.count("--prompt-syntax weighted") == 1
    assert done.err.count("did you mean guidance_scale?") == 1


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
        (["p.txt", "-o", "p.dat/out"], 73, ["p.dat"]),
        (["p.txt", "-o", "out", "--sheet", "p.dat/sheet.png"], 73, ["p.dat"]),
        (["--status", "."], 66, ["run.json"]),
        (["--failed"], 2, ["--status DIR"]),
    ],
)
def test_what_cannot_be_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], code: int, words: Sequence[str]
) -> None:
    for name in ("p.txt", "p.dat"):
        prompt_file(tmp_path, name)
    monkeypatch.chdir(tmp_path)
    assert_refused(ldm_here("batch", *arguments), code, *words)
    assert not Path("out/run.json").exists()


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
    path, out = prompt_file(tmp_path, text="a\n"), tmp_path / "out"
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
    whole = batch(path, "-o", tmp_path / "whole", "-b", "1").paths
    parts = [batch(path, "-o", tmp_path / f"part{i}", "--shard", f"{i}/2", "-b", "1") for i in (1, 2)]
    assert [part.code for part in parts] == [0, 0]
    drawn = {p.name: p for part in parts for p in part.paths}
    assert sorted(drawn) == sorted(p.name for p in whole)
    assert all(np.array_equal(pixels(drawn[p.name]), pixels(p)) for p in whole)
    assert status(tmp_path / "part1")["rows"] == 2


# ---- processes, signals, locks, pipes ----


def begun(folder: Path, *more: str) -> "subprocess.Popen[bytes]":
    """A run of many rows as a process, with something drawn."""
    command = ("batch", numbered(folder, 400), "-o", folder / "out", "-m", tiny_model(), "--steps", "20")
    process = start(*command, *more)
    wait_for_a_picture(folder)
    return process


def typed(folder: Path, *more: str) -> "subprocess.Popen[bytes]":
    """A run whose rows are typed."""
    command = ("batch", "-", "--format", "txt", "-o", folder / "out", "-m", tiny_model(), "--steps", "1")
    return start(*command, *more)


def wait_for_a_picture(folder: Path) -> None:
    lines = folder / "out" / "manifest" / "worker-0.jsonl"
    until(lambda: lines.exists() and b"\n" in lines.read_bytes(), "the first picture")


@SIGNALS
def test_a_signal_finishes_what_is_in_hand(tmp_path: Path, number: signal.Signals, code: int) -> None:
    process = begun(tmp_path)
    second = batch(tmp_path / "prompts.txt", "-o", tmp_path / "out")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert status_of(process) == code, err
    assert b"Traceback" not in err
    assert b"the same command goes on" in err
    assert b"add up" not in err
    facts = status(tmp_path / "out")
    assert facts["failed"] == 0
    assert 1 <= facts["done"] < 400
    assert facts["done"] == len(list((tmp_path / "out" / "images").rglob("*.png")))
    assert second.code == 75  # meanwhile
    assert f"process {process.pid}" in second.err


@SIGNALS
def test_a_signal_while_it_waits_for_rows(tmp_path: Path, number: signal.Signals, code: int) -> None:
    process = typed(tmp_path, "--json")
    assert process.stdin is not None
    assert process.stdout is not None
    for i in range(2):  # a line of JSON comes for each row before the next is typed
        process.stdin.write(f"prompt {i}\n".encode())
        process.stdin.flush()
        record = json.loads(process.stdout.readline())
        assert (record["row"], record["request"]["prompt"]) == (i + 1, f"prompt {i}")
        assert Path(record["path"]).is_file()
    process.send_signal(number)
    process.wait(timeout=60)  # with standard input still open
    assert status_of(process) == code
    assert status(tmp_path / "out")["done"] == 2


def test_a_second_signal_stops_now(tmp_path: Path) -> None:
    process = begun(tmp_path, "-b", "64")
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert status_of(process) == 130, err
    assert b"Traceback" not in err
    assert not list((tmp_path / "out" / "images").rglob("*.part"))


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    process = begun(tmp_path, "--json", "-q")
    assert process.stdout is not None
    assert process.stderr is not None
    first = json.loads(process.stdout.readline())
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    assert first["status"] == "done"
    assert status(tmp_path / "out")["done"] >= 1


def test_endless_input_ends_at_the_limit(tmp_path: Path) -> None:
    with subprocess.Popen(["yes", "a prompt"], stdout=subprocess.PIPE) as source:
        command = ("batch", "-", "--format", "txt", "-o", tmp_path / "out", "-m", tiny_model(), "--steps", "1")
        process = start(*command, "--max-images", "5", stdin=source.stdout)
        out, err = process.communicate(timeout=60)
        source.kill()
    assert process.returncode == 0, err
    assert len(out.splitlines()) == 5


def test_a_time_limit_ends_a_run_that_goes_on_later(tmp_path: Path) -> None:
    limited = batch(numbered(tmp_path, 400), "-o", tmp_path / "out", "--time-limit", "0s", "-b", "2")
    assert limited.code == 75, limited
    assert 1 <= status(tmp_path / "out")["done"] < 400


def test_a_full_disk_can_be_gone_on_from(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=200k") as small:
        path = numbered(tmp_path, 100)
        full = batch(path, "-o", small / "out", "--devices", "cpu")
        assert full.code == 74, full
        subprocess.run(["mount", "-o", "remount,size=20m", small], check=True)
        assert batch(path, "-o", small / "out", "--devices", "cpu").code == 0
        assert_whole(small / "out", 100)


def test_a_prompt_that_is_typed_as_a_file_is_missing(tmp_path: Path) -> None:
    assert_refused(ldm_here("batch", "a fox", "-o", tmp_path / "out", cwd=tmp_path), 66, "a fox does not exist")
