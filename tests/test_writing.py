"""Files appear whole or not at all, under a name that nobody else has, and never in place of what is not ours."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import until

from ldmcli.disk.writing import check_may_write, prepare_folder, write_exact, write_new
from ldmcli.errors import CannotCreateError, StorageError


def test_names_count_up_and_overwrite_replaces(tmp_path: Path) -> None:
    os.symlink("nowhere", tmp_path / "cat-2.png")
    (tmp_path / "cat-3.png").mkdir()
    names = [write_new(tmp_path, "cat", str(i).encode(), overwrite=False).name for i in range(3)]
    assert names == ["cat.png", "cat-4.png", "cat-5.png"]
    assert write_new(tmp_path, "cat", b"new", overwrite=True) == tmp_path / "cat.png"
    assert (tmp_path / "cat.png").read_bytes() == b"new"
    assert len(os.listdir(tmp_path)) == 5


def test_one_name_is_kept_unless_overwritten(tmp_path: Path) -> None:
    path = write_exact(tmp_path / "a.png", b"old", overwrite=False)
    with pytest.raises(CannotCreateError, match="there already"):
        write_exact(path, b"new", overwrite=False)
    assert path.read_bytes() == b"old"
    write_exact(path, b"new", overwrite=True)
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.png"]


def test_overwrite_replaces_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    os.symlink("/dev/null", tmp_path / "null.png")
    for name in ("fifo", "folder", "null"):
        with pytest.raises(CannotCreateError, match="not a regular file"):
            write_new(tmp_path, name, b"x", overwrite=True)
    assert len(os.listdir(tmp_path)) == 3


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_mode_honours_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        path = write_new(tmp_path, "a", b"x", overwrite=False)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_folders_are_made_with_their_parents_and_made_anew(tmp_path: Path) -> None:
    for _ in range(2):
        prepare_folder(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []
    assert write_new(tmp_path / "gone" / "too", "a", b"x", overwrite=False).read_bytes() == b"x"
    assert write_exact(tmp_path / "gone" / "a.png", b"x", overwrite=True).read_bytes() == b"x"


@pytest.mark.parametrize("end", ["file\x1b[2J", "file\x1b[2J/below", "x" * 300, "loop", "a\0b", "/proc/pictures"])
def test_folders_that_cannot_be(tmp_path: Path, end: str) -> None:
    (tmp_path / "file\x1b[2J").touch()
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    acts: list[Callable[[Path], object]] = [
        prepare_folder,
        lambda path: write_exact(path / "a.png", b"", overwrite=False),
    ]
    for act in acts:
        with pytest.raises(CannotCreateError) as caught:
            act(tmp_path / end)
        assert str(caught.value).isprintable()


def test_only_new_and_own_files_are_written(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    check_may_write(path, b"our mark", "sheet", "--sheet")
    path.write_bytes(b"by our mark known")
    check_may_write(path, b"our mark", "sheet", "--sheet")
    path.write_bytes(b" " * 5000 + b"our mark")
    others = [path, tmp_path / "prompts.txt", tmp_path / "folder", tmp_path / "fifo", tmp_path / "dangling"]
    others[1].write_text("a prompt")
    others[2].mkdir()
    os.mkfifo(others[3])
    os.symlink("nowhere", others[4])
    for other in others:
        with pytest.raises(CannotCreateError, match="is there already and is no sheet"):
            check_may_write(other, b"our mark", "sheet", "--sheet")
    for never in (path / "below.png", tmp_path / ("n" * 300)):
        with pytest.raises(CannotCreateError):
            check_may_write(never, b"our mark", "sheet", "--sheet")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (OSError(errno.ENOSPC, "full"), StorageError),
        (OSError(errno.EDQUOT, "quota"), StorageError),
        (OSError(errno.EIO, "bad disk"), StorageError),
        (OSError(errno.EROFS, "read-only"), CannotCreateError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_fault_leaves_the_folder_as_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overwrite: bool,
    fault: BaseException,
    expected: type[BaseException],
) -> None:
    def fail(*_: object) -> int:
        raise fault

    if overwrite:
        (tmp_path / "a.png").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        for write in (
            lambda: write_new(tmp_path, "a", b"new", overwrite=overwrite),
            lambda: write_exact(tmp_path / "a.png", b"new", overwrite=overwrite),
        ):
            with pytest.raises(expected):
                write()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"] * overwrite


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EACCES, errno.EIO])
def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def no_link(*_: object) -> None:
        raise OSError(number, "no hard links here")

    monkeypatch.setattr(os, "link", no_link)
    names = [write_new(tmp_path, "a", f"{i}".encode(), overwrite=False).name for i in range(3)]
    assert names == ["a.png", "a-2.png", "a-3.png"]
    assert [(tmp_path / name).read_bytes() for name in names] == [b"0", b"1", b"2"]
    with pytest.raises(CannotCreateError, match="there already"):
        write_exact(tmp_path / "a.png", b"x", overwrite=False)

    def no_rename(*_: object) -> None:
        raise OSError(errno.EIO, "bad disk")

    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(StorageError):
        write_new(tmp_path, "b", b"x", overwrite=False)
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def test_a_folder_that_cannot_sync_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "cannot sync a folder")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert write_new(tmp_path, "a", b"x", overwrite=False).read_bytes() == b"x"


# Says what keeps it from writing much into the folder argv[1], and that little can be written afterwards.
FILL = """
import os, resource, sys
from pathlib import Path
from ldmcli.disk.writing import prepare_folder, write_new
from ldmcli.errors import LdmError
folder = Path(sys.argv[1])
if sys.argv[2:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
refused = 0
for act in (prepare_folder, lambda folder: write_new(folder, "a", bytes(100_000), overwrite=False)):
    try:
        act(folder)
    except LdmError as error:
        print(type(error).__name__, error)
        assert os.listdir(folder) == []
        refused += 1
if refused == 1:
    write_new(folder, "a", bytes(1000), overwrite=False)
"""


def test_a_real_size_limit_is_a_storage_error(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILL, str(tmp_path), "limit"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert re.fullmatch("StorageError .* File too large.*\n", done.stdout), done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [("size=64k", ["StorageError .* No space left"]), ("ro", ["CannotCreateError .* Read-only file system"] * 2)],
)
def test_full_and_read_only_disks(tmp_path: Path, options: str, said: list[str]) -> None:
    """On a tmpfs of its own, in a mount namespace that ends with the process."""
    mount = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"', str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root on Linux")
    command = [*mount, sys.executable, "-c", FILL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == len(said)
    assert all(re.match(pattern, line) for pattern, line in zip(said, lines, strict=True)), lines


def test_two_processes_with_one_stem_lose_nothing(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from ldmcli.disk.writing import write_new
        for i in range(20):
            print(write_new(Path(sys.argv[1]), "same", f"{sys.argv[2]} {i}".encode(), overwrite=False))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    writers = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "AB"]
    paths = [path for writer in writers for path in writer.communicate(timeout=120)[0].split()]
    assert len(set(paths)) == 40
    assert {path.read_text() for path in tmp_path.iterdir()} == {f"{n} {i}" for n in "AB" for i in range(20)}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_leaves_no_torn_file(tmp_path: Path, overwrite: bool) -> None:
    code = f"""
        import sys
        from pathlib import Path
        from ldmcli.disk.writing import write_new
        print("ready", flush=True)
        while True:
            write_new(Path(sys.argv[1]), "a", b"x" * 2_000_000, overwrite={overwrite})
    """
    for delay in (0.0, 0.01, None):  # the last writes one whole file at least
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        until(lambda: any(tmp_path.glob("[!.]*")), "a file") if delay is None else time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait(timeout=30)
        writer.stdout.close()
    sizes = {path.stat().st_size for path in tmp_path.glob("[!.]*")}
    assert sizes == {2_000_000}
    assert all(re.fullmatch(r"\.ldm-.*\.part", path.name) for path in tmp_path.glob(".*"))
