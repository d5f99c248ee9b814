"""The contenders' warm processes: alive together where memory allows, else one at a time."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ldmcli.bench.contenders import Contender
from ldmcli.bench.processes import Processes, Worker
from ldmcli.bench.task import Job

_log = logging.getLogger(__name__)
_OVERHEAD = 1.5 * 2**30  # bytes that a process holds beside its weights: libraries, activations
_SHARE = 0.8  # of the memory there is that may be taken


class Crew:
    """One worker for each job, started when it is first asked for. While `together` they stay until the end."""

    def __init__(self, processes: Processes) -> None:
        self.together = True
        self._processes = processes
        self._workers: dict[str, Worker] = {}

    def worker(self, contender: Contender, job: Job) -> tuple[Worker, bool]:
        """The worker for a job, and whether it is new, so that it needs a warm-up."""
        if job.name in self._workers:
            return self._workers[job.name], False
        arguments = (job.to_json(),) if contender.is_ours else ("serve", job.to_json())
        worker = self._processes.worker(job.name, contender.module, *arguments, extra=dict(contender.environment))
        self._workers[job.name] = worker
        return worker, True

    def release(self, name: str, *, dead: bool = False) -> None:
        """The worker is not needed for now; it goes where only one fits into memory, or it is dead."""
        if (dead or not self.together) and name in self._workers:
            self._workers.pop(name).kill()


def fits_together(weights: Iterable[int], available: int) -> bool:
    """Whether processes with so many bytes of weights can be alive at once in so many bytes of memory."""
    return sum(size + _OVERHEAD for size in weights) <= _SHARE * available


def available_memory() -> int:
    """Bytes of memory that are free now, page cache included, and that this process's control group allows."""
    free = []
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) * 1024)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = _stat(group / "memory.stat").get("inactive_file", 0)
        free.append(limit - used + cached)
    except (OSError, ValueError):  # no such group, or "max"
        pass
    return min(free, default=0)


def _stat(path: Path) -> dict[str, Any]:
    return {name: int(value) for name, value in (line.split() for line in path.read_text().splitlines())}
