"""Contenders' processes: started, asked over pipes in lines of JSON, timed to their end, and never left behind."""

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import ldmcli
from ldmcli.errors import LdmError, printable
from ldmcli.stopwatch import process_peak

TIMEOUT = 3600.0  # seconds for one answer: compiling a large U-Net takes minutes
_GRACE = 5.0  # seconds for a process that has closed its pipes to end
_ROOT = str(Path(ldmcli.__file__).resolve().parent.parent)


class ContenderError(LdmError):
    """A contender ended or answered with an error; the message names it. `refusal` is its own exit code, if it gave
    one: that of a request it refused."""

    def __init__(self, name: str, reason: str, refusal: int | None = None) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason
        self.exit_code = refusal or LdmError.exit_code

    def cause(self) -> LdmError:
        """What it ended of, as this program's own error: for processes that are no contenders."""
        error = LdmError(self.reason.partition(": ")[2] or self.reason)
        error.exit_code = self.exit_code
        return error


@dataclasses.dataclass(frozen=True)
class Ended:
    """A process that ran to its end: from just before it was started to its exit, in seconds; what it printed; the
    largest memory it held (bytes; None where that cannot be told); and the clock (time.monotonic) when it started."""

    seconds: float
    out: str
    peak: int | None
    started: float


class Processes:
    """The processes of one run; all of them are killed when the block ends. Their stderr is kept in `folder`."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._environment = dict(environment)
        self._count = 0

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def worker(self, name: str, module: str, *arguments: str, extra: Mapping[str, str] | None = None) -> "Worker":
        """A process that answers questions; `extra` is put into its environment."""
        log = self._log()
        process = self._start(module, arguments, log, extra or {})
        worker = Worker(name, process, log)
        self._stack.callback(worker.kill)
        return worker

    def run(
        self,
        name: str,
        module: str,
        *arguments: str,
        extra: Mapping[str, str] | None = None,
        timeout: float = TIMEOUT,
    ) -> Ended:
        """Run `module`'s main to its end. Raises ContenderError where it fails or takes longer than `timeout`."""
        log, out = self._log(), self._log()
        started = time.monotonic()
        process = self._start(module, arguments, log, extra or {}, out)
        overdue = threading.Event()

        def stop() -> None:
            overdue.set()
            kill_group(process.pid)

        timer = threading.Timer(timeout, stop)
        timer.start()
        try:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its number stays taken
            seconds = time.monotonic() - started
            kill_group(process.pid)  # what it may have left behind
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            timer.cancel()
            if process.returncode is None:
                kill_group(process.pid)
                process.wait()
        if overdue.is_set():
            raise ContenderError(name, f"did not end within {timeout:g} s")
        if process.returncode:
            raise ContenderError(name, _last_words(process.returncode, log), max(process.returncode, 1))
        # The kernel counts the starting process's own peak in: what is no more than that says nothing.
        peak = usage.ru_maxrss * 1024
        return Ended(seconds, out.read_text(), peak if peak > process_peak() else None, started)

    def _start(
        self, module: str, arguments: Sequence[str], log: Path, extra: Mapping[str, str], out: Path | None = None
    ) -> "subprocess.Popen[bytes]":
        # As an installed script starts it: nothing of the current folder is imported, nor shadows a library.
        code = f"import sys; sys.path.append({_ROOT!r}); from {module} import main; main()"
        with contextlib.ExitStack() as files:
            stderr = files.enter_context(log.open("wb"))
            stdout = files.enter_context(out.open("wb")) if out else subprocess.PIPE
            return subprocess.Popen(
                [sys.executable, "-P", "-c", code, *arguments],
                stdin=subprocess.DEVNULL if out else subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                env={**self._environment, **extra},
                start_new_session=True,  # a group of its own, to be killed with all that it starts
            )

    def _log(self) -> Path:
        self._count += 1
        return self._folder / f"process-{self._count}.log"


class Worker:
    """A contender's process that stays: one question, one answer."""

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log
        self._rest = b""

    def ask(self, question: str, timeout: float = TIMEOUT, **fields: Any) -> dict[str, Any]:
        """The answer to a question. Raises ContenderError where the process ends, refuses or takes too long."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"ask": question, **fields}).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):  # ValueError: it is dead already, and its pipes closed
            raise self._died() from None
        answer = json.loads(self._line(question, timeout))
        if "refused" in answer:
            self.kill()
            raise ContenderError(self.name, answer["refused"], answer["code"])
        return answer

    def kill(self) -> None:
        """End it and all that it started, at once."""
        if self._process.returncode is None:
            kill_group(self._process.pid)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _line(self, question: str, timeout: float) -> bytes:
        assert self._process.stdout is not None
        end = time.monotonic() + timeout
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.kill()
                raise ContenderError(self.name, f"gave no answer to “{question}” within {timeout:g} s")
            part = os.read(descriptor, 1 << 16)
            if not part:
                raise self._died()
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _died(self) -> ContenderError:
        end = time.monotonic() + _GRACE
        while self._process.returncode is None and time.monotonic() < end:
            if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                break
            time.sleep(0.01)
        self.kill()
        return ContenderError(self.name, _last_words(self._process.returncode, self._log))


def kill_group(pid: int) -> None:
    """Kill a process and its group, if they are there still."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _last_words(code: int, log: Path) -> str:
    """How a process ended: the last line on its stderr that says something, or its code or signal alone."""
    how = f"ended with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
    lines = _lines_from_end(log)
    last = next(lines, "")
    return f"{how}: {printable(last)}" if last else how


def _lines_from_end(log: Path) -> Iterator[str]:
    for line in reversed(log.read_text(errors="backslashreplace").splitlines()):
        if line.strip():
            yield line.strip()
