"""Signals, kills, full disks, closed pipes: what is left behind is whole pictures, and a word of what happened."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import (
    LDM,
    assert_refused,
    environment,
    error_sentence,
    ldm,
    ldm_here,
    pixels,
    start,
    status_of,
    tiny_model,
    until,
)

from ldmcli.images.metadata import read_record

pytestmark = pytest.mark.timeout(300)


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """`folder` as a tmpfs of its own. Skips where this user may not mount."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting a tmpfs needs root: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def drawing(folder: Path, *options: str) -> "subprocess.Popen[bytes]":
    """`ldm` with its model loaded and its first picture written, waiting for the next prompt."""
    common = ("txt2img", "-m", tiny_model(), "-", "-s", "1", "-q", "-o", folder)
    process = start(*common, *options)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"one\n")
    process.stdin.flush()
    assert process.stdout.readline() == os.fsencode(folder / "ldm-1.png") + b"\n"
    return process


def feed(process: "subprocess.Popen[bytes]", count: int) -> None:
    assert process.stdin is not None
    process.stdin.write(b"next\n" * count)
    process.stdin.flush()


def ended(process: "subprocess.Popen[bytes]") -> tuple[int, str]:
    """Exit code and stderr, with no traceback in it."""
    _, err = process.communicate(timeout=60)
    assert b"Traceback" not in err
    return status_of(process), err.decode()


# ---- signals ----


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGKILL, 137, "")],
)
def test_a_signal_stops_at_once_and_leaves_whole_pictures(
    tmp_path: Path, number: signal.Signals, code: int, word: str
) -> None:
    process = drawing(tmp_path, "--steps", "1", "-c", str(10**12))
    until(lambda: len(list(tmp_path.glob("ldm-*.png"))) > 3, "a fourth picture")
    process.send_signal(number)
    began = time.monotonic()
    status, err = ended(process)
    assert time.monotonic() - began < 20
    assert status == code
    if word:
        assert error_sentence(err) == f"ldm: error: {word}."
    for path in tmp_path.glob("ldm-*.png"):
        pixels(path)
    others = [path.name for path in tmp_path.iterdir() if not path.name.startswith("ldm-")]
    assert len(others) <= (number == signal.SIGKILL)
    assert all(name.startswith(".ldm-") and name.endswith(".part") for name in others)


@pytest.mark.parametrize(
    ("number", "code", "delay"),
    [(signal.SIGINT, 130, 0.0), (signal.SIGTERM, 143, 0.2), (signal.SIGINT, 130, 0.8), (signal.SIGTERM, 143, 1.6)],
)
def test_a_signal_while_it_starts(tmp_path: Path, number: signal.Signals, code: int, delay: float) -> None:
    """From the time the command runs, through its imports; while Python starts, signals have their usual effect."""
    process = start("txt2img", "-m", tiny_model(), "-", "-s", "1", "--steps", "900", "-o", tmp_path)
    assert process.stdin is not None
    until(lambda: catches(process.pid, signal.SIGTERM), "the start")
    process.stdin.write(b"one\n")
    process.stdin.flush()
    time.sleep(delay)
    process.send_signal(number)
    status, err = ended(process)
    assert status == code, err
    assert not any(line for line in err.splitlines() if not line.startswith("ldm: ")), err
    assert list(tmp_path.iterdir()) == []


# What swallows all that is raised while it runs: hasattr() of C code; and, with a traceback, what is called when
# something is freed, as the locks of imports are.
SWALLOWERS = {
    "attribute": """
    with contextlib.suppress(BaseException):
        hit()
""",
    "callback": """
    class Freed:
        def __del__(self):
            hit()
    Freed()
""",
}


@pytest.mark.parametrize(("number", "swallower"), [(signal.SIGINT, "attribute"), (signal.SIGTERM, "callback")])
def test_a_signal_that_something_swallows_is_raised_again(number: signal.Signals, swallower: str) -> None:
    script = f"""
import contextlib, os, sys, time
import ldmcli.cli, ldmcli.cli.program

def hit():
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(1)

def swallow(arguments):
{SWALLOWERS[swallower]}
    time.sleep(20)
    return 0

ldmcli.cli.program._invoke = swallow
ldmcli.cli.main()
"""
    done = subprocess.run([sys.executable, "-c", script, str(int(number))], capture_output=True, text=True, timeout=60)
    assert done.returncode == -number, done.stderr
    assert done.stderr.count("\n") == 1


def test_ctrl_c_while_the_command_line_is_imported_says_nothing() -> None:
    script = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
from ldmcli.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script, "models"], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


# ---- standard streams ----


def shell(line: str) -> tuple[list[int], bytes]:
    """Run the pipe `line` in bash, where ldm is `"$@"`; returns the exit codes of its commands, and stderr."""
    script = f'exec 3>&1; {line}; echo "${{PIPESTATUS[@]}}" >&3'
    done = subprocess.run(
        ["/bin/bash", "-c", script, "-", *LDM],
        stdin=subprocess.DEVNULL, capture_output=True, env=environment(), timeout=100, check=False,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr, done.stderr
    return [int(code) for code in done.stdout.split()], done.stderr


def test_a_reader_that_leaves() -> None:
    """A closed pipe ends the run in silence, as it ends `cat`."""
    for line in ('"$@" --help | true', f'"$@" info {tiny_model()} | true'):
        codes, err = shell(line)
        assert (codes[0] in (0, 141), err) == (True, b"")


def test_closed_and_full_standard_streams(tmp_path: Path) -> None:
    model = tiny_model()
    common = f'"$@" txt2img x -m {model} -q -s 1 --steps 1 -o {tmp_path / "out"}'

    for line, code, words in (
        (f"{common} >&-", 74, "closed"),
        (f'"$@" info {model} >/dev/full', 74, "No space left"),
        ('"$@" info nowhere 2>&-', 66, ""),
        ('"$@" info nowhere 2>/dev/full', 66, ""),
        ('"$@" txt2img --nonsense 2>/dev/full', 2, ""),
        (f"{common} >/dev/full", 74, "No space left"),
    ):
        codes, err = shell(line)
        assert codes == [code]
        assert words in error_sentence(err.decode()) if words else err == b""
        assert (tmp_path / "out").exists() == (line == f"{common} >/dev/full")
    assert shell(f'"$@" txt2img - -m {model} <&-') == ([0], b"ldm: 0 prompts on standard input, nothing to draw\n")
    pixels(tmp_path / "out" / "ldm-1.png")


# ---- folders and disks ----


def test_a_full_disk(tmp_path: Path) -> None:
    """No torn file under the final name; and with room again, the run works."""
    with mounted(tmp_path / "disk", "size=64k") as disk:
        free = shutil.disk_usage(disk).free
        (disk / "filler").write_bytes(bytes(free - 12288))
        process = drawing(disk, "--steps", "1", "-W", "64", "-H", "64")  # the first picture fits, 8 to 12 kB
        feed(process, 3)
        status, err = ended(process)
        assert status == 74
        assert "No space left" in error_sentence(err)
        assert "free some space" in err
        assert sorted(path.name for path in disk.iterdir()) == ["filler", "ldm-1.png"]
        pixels(disk / "ldm-1.png")
        (disk / "more").write_bytes(bytes(shutil.disk_usage(disk).free))
        assert_refused(ldm_here("txt2img", "-m", tiny_model(), "x", "-s", "7", "-o", disk / "new"), 74, "No space left")


def test_folders_that_cannot_take_a_picture_are_found_before_the_model_loads(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere" / "x.png")
    common = ("txt2img", "-m", tiny_model(), "x", "-s", "1", "-o")
    for path, word in (
        ("/proc", "/proc"),
        ("/proc/new/folder", "/proc"),
        (tmp_path / "file", "not a folder"),
        (tmp_path / "file" / "inside", "file"),
        (tmp_path / "file" / "one.png", "file"),
        (tmp_path / ("n" * 300), "too long"),
        (tmp_path / ("n" * 300 + ".png"), "too long"),
        (tmp_path / "link.png", "there already"),
        ("/dev/null", "not a folder"),
    ):
        assert_refused(ldm_here(*common, path), 73, word, seconds=10)
    assert_refused(
        ldm_here(*common, b"\x1b[31m\xff/\x00".rstrip(b"\x00") + b"/" + b"n" * 300, cwd=tmp_path), 73, "\\x1b[31m"
    )
    with mounted(tmp_path / "frozen", "ro") as frozen:
        assert_refused(ldm_here(*common, frozen), 73, "frozen", "Read-only", seconds=10)
        assert_refused(ldm_here(*common, frozen / "one.png"), 73, "frozen", seconds=10)


@pytest.mark.parametrize("home", [None, "/"])
def test_without_a_home_or_an_account(tmp_path: Path, home: str | None) -> None:
    code = f"""
import os, pwd
def unknown(_):
    raise KeyError
pwd.getpwuid = unknown
for name in ("HOME", "XDG_CACHE_HOME"):
    os.environ.pop(name, None)
os.environ |= {{"HOME": home}} if (home := {home!r}) else {{}}
from ldmcli.cli import main
main()
"""
    program = [sys.executable, "-c", code]
    drawn = ldm("txt2img", "-m", tiny_model(), "x", "-s", "1", "--steps", "1", "-o", tmp_path, program=program)
    assert drawn.code == 0, drawn.err
    (path,) = drawn.paths
    assert pixels(path).shape == (16, 16, 3)
    assert read_record(path)["model"]["path"] == str(tiny_model())  # nothing of it is the home's name


def test_a_working_folder_that_is_gone_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    program = ["/bin/sh", "-c", 'rmdir "$PWD" && exec "$@"', "-", *LDM]
    result = ldm("txt2img", "-m", tiny_model(), "x", "-o", tmp_path / "out", program=program, cwd=tmp_path / "gone")
    assert_refused(result, 66, "working folder is gone")
    assert not (tmp_path / "out").exists()


def test_a_name_that_ends_in_a_slash_is_a_folder(tmp_path: Path) -> None:
    common = ("txt2img", "-m", tiny_model(), "x", "-s", "1", "--steps", "1", "-o")
    assert ldm_here(*common, f"{tmp_path}/x.png/").paths == [tmp_path / "x.png" / "ldm-1.png"]
    (tmp_path / "y.png").touch()
    assert_refused(ldm_here(*common, f"{tmp_path}/y.png/"), 73, "not a folder")


def test_the_output_folder_goes_away_while_drawing(tmp_path: Path) -> None:
    """What is drawn is not lost."""
    folder = tmp_path / "out"
    process = drawing(folder, "--steps", "1")
    shutil.rmtree(folder)
    feed(process, 1)
    assert ended(process) == (0, "")
    pixels(folder / "ldm-1.png")
