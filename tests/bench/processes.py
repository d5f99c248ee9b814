"""Contenders' processes: asked over pipes in lines of JSON, or timed from start to end; none is left behind."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ldmcli.errors import LdmError, printable

LIMIT = 3600.0  # seconds for one answer: compiling a large U-Net takes minutes
_TESTS = Path(__file__).resolve().parent.parent


class ContenderError(LdmError):
    """A contender ended badly; the message says how."""


def environment(folder: Path, threads: int | None, compile_cache: Path | None = None) -> dict[str, str]:
    """What contenders find: none of ldm's own settings, no network, the same number of threads for all, and caches in
    `folder`, empty at first; those of compiled code in `compile_cache` if there is one."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LDM_", "_LDM_"))}
    compiled = compile_cache or folder
    own = {
        "PYTHONPATH": os.pathsep.join([str(_TESTS), str(_TESTS.parent), *filter(None, [kept.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
        "TRITON_CACHE_DIR": str(compiled / "triton"),
        "CUDA_CACHE_PATH": str(compiled / "cuda"),
    }
    return {**kept, **own, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}


def python(module: str, *arguments: str) -> list[str]:
    """The command line of a module, which finds nothing in the current folder."""
    return [sys.executable, "-P", "-m", module, *arguments]


@dataclasses.dataclass(frozen=True)
class Ended:
    """A process that ran to its end: wall time in seconds, what it printed, and its peak of memory in bytes, which is
    no less than that of this process."""

    seconds: float
    out: str
    peak: int


def run(command: list[str], env: Mapping[str, str], limit: float = LIMIT) -> Ended:
    """Run a command to its end. Raises ContenderError where it fails or takes longer than `limit` seconds."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        started = time.monotonic()
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=log, start_new_session=True
        )
        with _killed_after(limit, process) as overdue:
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise _failure(process.returncode, log, limit if overdue.is_set() else None)
        out.seek(0)
        return Ended(seconds, out.read().decode(), usage.ru_maxrss * 1024)


class Worker:
    """A contender's process that stays: one question, one answer (serving.py)."""

    def __init__(self, command: list[str], env: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by kill
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True
        )

    def ask(self, question: str, limit: float = LIMIT, **fields: Any) -> dict[str, Any]:
        """The answer. Raises ContenderError where the process has ended, or takes longer than `limit` seconds."""
        line = b""
        with _killed_after(limit, self.process) as overdue, contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps({"ask": question, **fields}).encode() + b"\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
            line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise _failure(self.process.wait(), self._log, limit if overdue.is_set() else None)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        """End it and all that it started, at once."""
        _kill_group(self.process)
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self._log):
            with contextlib.suppress(OSError):
                file.close()  # type: ignore[union-attr]


@contextlib.contextmanager
def _killed_after(limit: float, process: "subprocess.Popen[bytes]") -> Iterator[threading.Event]:
    """Kill the process and all that it started after so many seconds, and where this one is interrupted. Tells whether
    it was overdue."""
    overdue = threading.Event()
    timer = threading.Timer(limit, lambda: (overdue.set(), _kill_group(process)))
    timer.start()
    try:
        yield overdue
    except BaseException:
        _kill_group(process)
        raise
    finally:
        timer.cancel()


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _failure(code: int, log: IO[bytes], overdue: float | None) -> ContenderError:
    """How a process ended: overdue, with the last line on its stderr, or with its code or signal alone."""
    if overdue is not None:
        return ContenderError(f"gave no answer within {overdue:g} s")
    log.seek(0)
    lines = [line for line in log.read().decode(errors="backslashreplace").splitlines() if line.strip()]
    how = f"ended with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
    return ContenderError(f"{how}: {printable(lines[-1].strip())}" if lines else how)
