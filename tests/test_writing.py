"""Files appear whole or not at all, under a name that nobody else has, and never in place of what is not ours."""

import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_support import until

from ldmcli.disk.writing import check_may_write, prepare_folder, write_exact, write_new
from ldmcli.errors import CannotCreateError, StorageError


def run_python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_names_count_up_and_overwrite_replaces(tmp_path: Path) -> None:
    names = [write_new(tmp_path, "cat", str(i).encode(), overwrite=False).name for i in range(3)]
    assert names == ["cat.png", "cat-2.png", "cat-3.png"]
    assert write_new(tmp_path, "cat", b"new", overwrite=True) == tmp_path / "cat.png"
    assert (tmp_path / "cat.png").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["cat-2.png", "cat-3.png", "cat.png"]


def test_dangling_links_and_folders_count_as_taken(tmp_path: Path) -> None:
    os.symlink("nowhere", tmp_path / "cat.png")
    (tmp_path / "cat-2.png").mkdir()
    assert write_new(tmp_path, "cat", b"x", overwrite=False).name == "cat-3.png"


def test_write_exact_keeps_what_is_there(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("stem", ["", "..", "../up", "a/b", "x" * 300, "a\0b"])
def test_stems_that_are_no_names_are_refused(tmp_path: Path, stem: str) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    for overwrite in (False, True):
        with pytest.raises(CannotCreateError) as caught:
            write_new(folder, stem, b"x", overwrite=overwrite)
        assert "\0" not in str(caught.value)
    assert os.listdir(folder) == []
    assert os.listdir(tmp_path) == ["inside"]


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
def test_mode_honours_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        path = write_new(tmp_path, "a", b"x", overwrite=False)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_prepare_folder_makes_parents_and_leaves_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        prepare_folder(tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a" / "b") == []


@pytest.mark.parametrize("end", ["file", "file/below", "x" * 300, "loop", "a\0b"])
def test_folders_that_cannot_be(tmp_path: Path, end: str) -> None:
    (tmp_path / "file").touch()
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    with pytest.raises(CannotCreateError):
        prepare_folder(tmp_path / end)


def test_folders_in_proc_are_refused() -> None:
    if Path("/proc/self").exists():
        with pytest.raises(CannotCreateError):
            prepare_folder(Path("/proc/pictures"))


def test_a_folder_that_has_gone_is_made_anew(tmp_path: Path) -> None:
    assert write_new(tmp_path / "gone" / "too", "a", b"x", overwrite=False).read_bytes() == b"x"
    assert write_exact(tmp_path / "gone" / "a.png", b"x", overwrite=True).read_bytes() == b"x"


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


Write = Callable[..., Path]
WRITERS: list[Write] = [
    lambda folder, overwrite: write_new(folder, "a", b"new", overwrite=overwrite),
    lambda folder, overwrite: write_exact(folder / "b.png", b"new", overwrite=overwrite),
]


@pytest.mark.parametrize("write", WRITERS)
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
    write: Write,
    overwrite: bool,
    fault: BaseException,
    expected: type[BaseException],
) -> None:
    if overwrite:
        (tmp_path / "a.png").write_bytes(b"old")
        (tmp_path / "b.png").write_bytes(b"old")
    before = sorted(os.listdir(tmp_path))

    def fail(*_: object) -> int:
        raise fault

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(expected):
        write(tmp_path, overwrite)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == before
    assert all((tmp_path / name).read_bytes() == b"old" for name in before)


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


def test_a_real_size_limit_is_a_storage_error(tmp_path: Path) -> None:
    code = """
        import resource, sys
        from pathlib import Path
        from ldmcli.errors import StorageError
        from ldmcli.disk.writing import write_new
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_new(Path(sys.argv[1]), "a", bytes(100_000), overwrite=False)
        except StorageError as error:
            print(error)
    """
    finished = run_python(code, tmp_path)
    assert "File too large" in finished.stdout, finished.stderr
    assert os.listdir(tmp_path) == []


def on_tmpfs(tmp_path: Path, options: str, code: str) -> str:
    """Run `code` with a tmpfs of its own on argv[1], in a mount namespace that ends with it; its stdout."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting needs root on Linux")
    mount = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"', str(tmp_path)]
    try:
        probe = subprocess.run([*mount, "true"], capture_output=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("no unshare")
    if probe.returncode != 0:
        pytest.skip("cannot mount here")
    command = [*mount, sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_a_full_disk_is_a_storage_error_and_can_go_on(tmp_path: Path) -> None:
    code = """
        import os, sys
        from pathlib import Path
        from ldmcli.errors import StorageError
        from ldmcli.disk.writing import write_new
        folder = Path(sys.argv[1])
        write_new(folder, "a", bytes(40_000), overwrite=False)
        try:
            write_new(folder, "a", bytes(40_000), overwrite=False)
        except StorageError as error:
            print(error)
        assert os.listdir(folder) == ["a.png"]
        write_new(folder, "a", bytes(10_000), overwrite=False)
        assert sorted(os.listdir(folder)) == ["a-2.png", "a.png"]
    """
    assert "No space left" in on_tmpfs(tmp_path, "size=64k", code)


def test_a_read_only_folder_cannot_be_prepared(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from ldmcli.errors import CannotCreateError
        from ldmcli.disk.writing import check_may_write, prepare_folder, write_new
        for act in (prepare_folder, lambda folder: write_new(folder, "a", b"x", overwrite=True)):
            try:
                act(Path(sys.argv[1]))
            except CannotCreateError as error:
                print(error)
    """
    assert on_tmpfs(tmp_path, "ro", code).count("Read-only file system") == 2


def test_two_processes_with_one_stem_lose_nothing(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from ldmcli.disk.writing import write_new
        for i in range(40):
            print(write_new(Path(sys.argv[1]), "same", f"{sys.argv[2]} {i}".encode(), overwrite=False))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    writers = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "AB"]
    paths = [path for writer in writers for path in writer.communicate(timeout=120)[0].split()]
    assert len(set(paths)) == 80
    assert {path.read_text() for path in tmp_path.iterdir()} == {f"{n} {i}" for n in "AB" for i in range(40)}


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
    for delay in (0.0, 0.003, 0.01, 0.03, None):  # the last writes one whole file at least
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


def test_errors_escape_names(tmp_path: Path) -> None:
    (tmp_path / "\x1b[2J").touch()
    acts: list[Callable[[], object]] = [
        lambda: prepare_folder(tmp_path / "\x1b[2J"),
        lambda: write_exact(tmp_path / "\x1b[2J", b"", overwrite=False),
        lambda: write_exact(tmp_path / "\x1b[2J" / "a.png", b"", overwrite=False),
        lambda: check_may_write(tmp_path / "\x1b[2J", b"mark", "sheet", "--sheet"),
    ]
    for act in acts:
        with pytest.raises(CannotCreateError) as caught:
            act()
        assert "\x1b" not in str(caught.value)
