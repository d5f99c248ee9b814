"""Where a run's time goes: the main thread's, by phase."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PHASES = ("imports", "weights", "text", "denoise", "vae", "png")


class Stopwatch:
    """Seconds spent in each phase, and how old the process was when certain things first happened, and how much memory
    it had held by then. A phase inside another counts for itself alone, so that their sum is a time.

    `settle` waits for a device that computes by itself: it is called before a time is taken, where times are to be the
    device's and not only the host's.
    """

    def __init__(self, settle: Callable[[], object] | None = None) -> None:
        self.settle = settle
        self.seconds: dict[str, float] = {}
        self.marks: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._inner = 0.0  # s that phases inside the present one took

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the block as `name`, one of PHASES."""
        started, outer, self._inner = time.perf_counter(), self._inner, 0.0
        try:
            yield
            if self.settle:
                self.settle()
        finally:
            whole = time.perf_counter() - started
            self.add(name, whole - self._inner)
            self._inner = outer + whole

    def add(self, name: str, seconds: float) -> None:
        """Count seconds as spent in phase `name`."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def mark(self, name: str) -> None:
        """Note the age of the process, s, and its peak of memory, unless that was done before under this name."""
        if name not in self.marks:
            if self.settle:
                self.settle()
            self.marks[name] = process_age()
            self.peaks[name] = process_peak()

    def report(self) -> dict[str, dict[str, float]]:
        """`phases` since the last report, in the order of PHASES, and all `marks`; seconds, to the millisecond. And in
        bytes `peaks`, the most memory that the process had held at each mark."""
        phases = {name: round(self.seconds[name], 3) for name in PHASES if name in self.seconds}
        self.seconds = {}
        marks = {name: round(age, 2) for name, age in self.marks.items()}
        return {"phases": phases, "marks": marks, "peaks": dict(self.peaks)}


def process_age() -> float:
    """Seconds since the kernel started this process, to a hundredth; 0 where it does not tell."""
    try:
        # The name in the second field may hold spaces and brackets.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def process_peak() -> int:
    """The most memory this process has held, in bytes (VmHWM); 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
