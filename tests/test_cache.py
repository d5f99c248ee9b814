"""The user's cache folder, and hashes of weight files remembered there."""

import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from cli_support import tiny_single_file

from ldmcli.checkpoints.source import open_model
from ldmcli.disk import hashes
from ldmcli.disk.cache import cache_folder, is_news
from ldmcli.disk.hashes import FileHashes, user_hashes
from ldmcli.errors import LdmError, MissingInputError

OLD_NS = 1_600_000_000_000_000_000
ABC = hashlib.sha256(b"abc").hexdigest()


def remembering(folder: Path) -> FileHashes:
    return FileHashes(folder / "ldmcli" / "hashes")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is old enough for its hash to be remembered."""
    monkeypatch.setattr(hashes, "_TICK_NS", -(10**18))
    path = tmp_path / "files" / "weights.bin"
    path.parent.mkdir()
    path.write_bytes(b"abc")
    return path


def entry(folder: Path) -> Path:
    (path,) = (folder / "ldmcli" / "hashes").iterdir()
    return path


# Where it is


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"XDG_CACHE_HOME": "/x/c", "HOME": "/h"}, "/x/c/ldmcli"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/ldmcli"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/ldmcli"),
        ({"HOME": "/h"}, "/h/.cache/ldmcli"),
        ({"HOME": ""}, None),
        ({"HOME": "relative"}, None),
    ],
)
def test_cache_folder_follows_the_xdg_specification(environ: dict[str, str], expected: str | None) -> None:
    assert cache_folder(environ) == (expected and Path(expected))


def test_without_home_the_account_tells_it_or_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: "/account")
    assert cache_folder({}) == Path("/account/.cache/ldmcli")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for a user without an account
    assert cache_folder({}) is None


def test_a_disabled_cache_keeps_nothing(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    off = user_hashes(enabled=False)
    assert off.sha256(weights) == ABC
    assert off.remembered(weights) is None
    assert not (tmp_path / "cache").exists()


def test_hashing_does_not_import_torch() -> None:
    code = "import sys, ldmcli.disk.hashes, ldmcli.checkpoints.source; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# What it is like


def test_entries_are_kept_in_a_private_folder(weights: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert remembering(home).remembered(weights) is None
    assert not home.exists(), "reading makes no folder"
    old_mask = os.umask(0)
    try:
        remembering(home).sha256(weights)
    finally:
        os.umask(old_mask)
    folder = entry(home).parent
    for made in (folder, folder.parent, folder.parent.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "change",
    [lambda entry: (entry / "inner").mkdir(parents=True), os.mkfifo, lambda entry: entry.symlink_to(entry)]
    + [lambda entry, payload=payload: entry.write_bytes(payload) for payload in (
        b"", b"[]", b"{", b"\xff", b"[" * 4000, b"null", b"{}", b'{"stamp": 1, "sha256": 2}', bytes(1 << 20),
    )],
)  # fmt: skip
def test_what_is_no_entry_is_a_miss(weights: Path, tmp_path: Path, change: Any) -> None:
    remembering(tmp_path).sha256(weights)
    path = entry(tmp_path)
    path.unlink()
    change(path)
    assert remembering(tmp_path).remembered(weights) is None
    assert remembering(tmp_path).sha256(weights) == ABC


def _made(folder: Path, mode: int = 0o700) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(mode)
    return folder


@pytest.mark.parametrize(
    "prepare",
    [
        lambda base: base.write_text("in the way"),
        lambda base: base.symlink_to(base),
        lambda base: base.symlink_to(base.parent / "nowhere"),
        lambda base: (_made(base) / "hashes").write_text("in the way"),
        lambda base: (_made(base) / "hashes").symlink_to(_made(base.parent / "elsewhere")),
        lambda base: _made(base, 0o777),
        lambda base: _made(_made(base) / "hashes", 0o770),
    ],
    ids=["file", "circle", "dangling", "file within", "link within", "open to all", "open within"],
)
def test_a_folder_that_cannot_be_used_is_told_once_and_left_alone(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, prepare: Any
) -> None:
    prepare(tmp_path / "ldmcli")
    before = sorted(map(str, tmp_path.rglob("*")))
    found = FileHashes(tmp_path / "ldmcli" / "hashes")
    with caplog.at_level(logging.DEBUG):
        for _ in range(3):
            assert found.sha256(weights) == ABC
            assert found.remembered(weights) is None
    assert sorted(map(str, tmp_path.rglob("*"))) == before
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]
    assert "goes unused" in caplog.text


def test_entries_that_others_could_have_written_are_not_read(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembering(tmp_path).sha256(weights)
    (tmp_path / "ldmcli").chmod(0o777)
    assert remembering(tmp_path).remembered(weights) is None
    (tmp_path / "ldmcli").chmod(0o755)
    assert remembering(tmp_path).remembered(weights) == ABC
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert remembering(tmp_path).remembered(weights) is None


def test_root_makes_no_folder_in_anothers_home(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.stat

    def owned_by_another(path: Any, **options: Any) -> os.stat_result:
        status = list(real(path, **options))
        status[stat.ST_UID] = 1234
        return os.stat_result(status)

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "stat", owned_by_another)
    remembering(tmp_path).sha256(weights)
    assert not (tmp_path / "ldmcli").exists()


def test_a_full_disk_ends_the_writing_and_leaves_nothing(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    found = remembering(tmp_path)
    with caplog.at_level(logging.DEBUG):
        assert [found.sha256(weights) for _ in range(3)] == [ABC] * 3
    assert not list((tmp_path / "ldmcli" / "hashes").iterdir())
    assert [("No space left" in record.message) for record in caplog.records] == [True]


def test_what_was_written_first_goes_first_and_what_was_left_half_written(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "_MAX_ENTRIES", 3)
    remembering(tmp_path).sha256(weights)
    folder = tmp_path / "ldmcli" / "hashes"
    (folder / ".ldm-12-0000000000000001.part").write_bytes(b"half")
    (folder / "folder").mkdir()
    for path in folder.iterdir():
        os.utime(path, (1_600_000_000, 1_600_000_000))
    before = set(folder.iterdir())
    for number in range(3):
        (tmp_path / f"{number}.bin").write_bytes(b"abc")
        remembering(tmp_path).sha256(tmp_path / f"{number}.bin")
    assert set(folder.iterdir()) & before == {folder / "folder"}
    assert len(list(folder.iterdir())) == 4


_WRITER = """
import sys
from pathlib import Path
from ldmcli.disk import hashes
hashes._TICK_NS = -(10**18)
for number in range(100):
    path = Path(sys.argv[2], f"{number % 5}.bin")
    path.touch()
    hashes.FileHashes(Path(sys.argv[1])).sha256(path)
"""


def test_processes_may_write_the_same_entries_at_once(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ldmcli" / "hashes"
    writers = [subprocess.Popen([sys.executable, "-c", _WRITER, folder, tmp_path]) for _ in "ab"]
    empty = hashlib.sha256(b"").hexdigest()
    for number in itertools.cycle(range(5)):
        assert FileHashes(folder).remembered(tmp_path / f"{number}.bin") in (None, empty)
        if all(process.poll() is not None for process in writers):
            break
    assert [process.wait() for process in writers] == [0, 0]
    assert len(list(folder.iterdir())) == 5


# Remembered hashes


def test_a_hash_is_remembered_while_the_file_is_the_same(weights: Path, tmp_path: Path) -> None:
    assert remembering(tmp_path).remembered(weights) is None
    found = remembering(tmp_path).sha256(weights)
    assert found == ABC
    assert remembering(tmp_path).remembered(weights) == found
    link = tmp_path / "link"
    link.symlink_to(weights)
    assert remembering(tmp_path).remembered(link) == found


def _same_size_and_time(path: Path) -> None:
    status = path.stat()
    path.write_bytes(b"xyz")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the change time cannot be set back


def _replaced(path: Path) -> None:
    path.with_name("other").write_bytes(b"xyz")
    os.replace(path.with_name("other"), path)


@pytest.mark.parametrize(
    "change",
    [
        *(lambda path: path.write_bytes(b"abcd"), _same_size_and_time, _replaced, Path.unlink),
        lambda path: os.utime(path, ns=(OLD_NS, OLD_NS)),
    ],
)
def test_a_changed_file_is_hashed_again(weights: Path, tmp_path: Path, change: Any) -> None:
    remembering(tmp_path).sha256(weights)
    time.sleep(0.02)  # a tick of the file system's clock
    change(weights)
    found = remembering(tmp_path)
    assert found.remembered(weights) is None
    if weights.exists():
        assert found.sha256(weights) == hashlib.sha256(weights.read_bytes()).hexdigest()
    else:
        with pytest.raises(MissingInputError):
            found.sha256(weights)


def test_a_file_changed_just_now_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"abc")
    status = path.stat()
    newest = max(status.st_mtime_ns, status.st_ctime_ns)
    for after_s, remembered in ((-5, False), (0, False), (2, False), (4, True)):
        monkeypatch.setattr(time, "time_ns", lambda now=newest + after_s * 10**9: now)
        remembering(tmp_path).sha256(path)
        assert bool(remembering(tmp_path).remembered(path)) is remembered


def test_a_file_that_changes_under_the_hash_is_not_remembered(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.file_digest

    def slow(file: Any, kind: str) -> Any:
        found = digest(file, kind)
        weights.write_bytes(b"abcd")
        return found

    monkeypatch.setattr(hashlib, "file_digest", slow)
    remembering(tmp_path).sha256(weights)
    assert not (tmp_path / "ldmcli").exists()


@pytest.mark.parametrize("said", [None, 7, "", "a" * 63, "A" * 64, "a" * 64 + "\n"])
def test_only_a_hash_is_taken_for_one(weights: Path, tmp_path: Path, said: Any) -> None:
    remembering(tmp_path).sha256(weights)
    kept = entry(tmp_path)
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"sha256": said}))
    assert remembering(tmp_path).remembered(weights) is None


def test_a_failed_hash_is_tried_again(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = FileHashes()
    with monkeypatch.context() as broken:
        broken.setattr(hashlib, "file_digest", lambda file, kind: (_ for _ in ()).throw(OSError(5, "broken disk")))
        with pytest.raises(LdmError, match="broken disk"):
            found.sha256(weights)
    assert found.sha256(weights) == ABC


@pytest.fixture
def copied_model(embedded_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded_folder, tmp_path / "model"))


def expected_sha256(folder: Path, *parts: str) -> str:
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder).as_posix()}\n"
        for path in sorted(path for part in parts for path in (folder / part).glob("*.safetensors"))
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_a_folders_identity_is_the_same_with_and_without_memory(
    copied_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "_TICK_NS", -(10**18))
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "setpriority", lambda *arguments: asked.append(arguments))
    source = open_model(copied_model)
    expected = expected_sha256(copied_model, "text_encoder", "unet", "vae")
    assert source.sha256(FileHashes()).result() == expected
    assert [(which, nice) for which, _, nice in asked] == [(os.PRIO_PROCESS, 19)], "the processor is left to others"
    assert asked[0][1] not in (0, threading.get_native_id()), "the main thread keeps its own"

    def refused(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refused)
    assert source.sha256(remembering(tmp_path)).result() == expected
    # The second time nothing is read.
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert source.sha256(remembering(tmp_path)).result() == expected


def test_a_single_files_identity_is_the_files() -> None:
    file = tiny_single_file()
    assert open_model(file).sha256(FileHashes()).result() == hashlib.sha256(file.read_bytes()).hexdigest()


def test_what_fails_in_the_thread_is_told_by_the_future(copied_model: Path) -> None:
    source = open_model(copied_model)
    (copied_model / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(MissingInputError):
        source.sha256(FileHashes()).result()


# Facts about the machine


def test_a_fact_about_the_machine_is_news_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert [is_news(fact) for fact in ("no-cuda", "no-cuda", "cuda", "cuda", "no-cuda")] == [
        True, False, True, False, True,
    ]  # fmt: skip
    assert is_news("no-cuda", remember=False)
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "another", "", "", "")))
    assert is_news("no-cuda")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert [is_news("no-cuda"), is_news("no-cuda")] == [True, True]


def test_that_there_is_no_gpu_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    from ldmcli.spec import RuntimeSpec
    from ldmcli.speed.policy import choose_runtime

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, "ldmcli"):
        for _ in range(3):
            choose_runtime()
        assert caplog.text.count("no CUDA device found") == 1
        choose_runtime(RuntimeSpec(cache=False))
    assert caplog.text.count("no CUDA device found") == 2
