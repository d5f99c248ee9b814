"""How many threads to compute with on a CPU."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldmcli.config import UNetConfig


_SMALL = 256  # widest level (channels) of a U-Net whose layers are too short to share
_CPUS = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def choose_threads(asked: int | None, unet: "UNetConfig", *, pictures: int = 1, cores: int | None = None) -> int:
    """How many threads to compute with: as many as `asked`; else one for each of the `cores`, all there are if None,
    but no more than OMP_NUM_THREADS says.

    A small network, by its `unet`, gets no more than the `pictures` that are drawn at once: more threads would wait for
    each other about as long as they save, and on a busy machine many times as long.
    """
    if asked is not None:
        return asked
    cores = available_cores() if cores is None else cores
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if given.isascii() and given.isdigit() and int(given):
        cores = min(cores, int(given))
    return min(cores, pictures) if is_small(unet) else cores


def is_small(unet: "UNetConfig") -> bool:
    """Whether the network's layers are too short to share: it gains by batches and by processes, not by threads."""
    return max(unet.block_channels) <= _SMALL


def yield_cores() -> None:
    """Have threads that wait for each other give their core away soon, unless the environment says otherwise. Call it
    before torch's libraries are loaded.

    GNU's OpenMP spins at a barrier for milliseconds, for a core that another process has: four `ldm batch` on two cores
    took 15 times their share of time, and with this none. Alone nothing is lost.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def available_cores() -> int:
    """The cores this process may use: those of its CPU set, two hardware threads of a core counted once, and no more
    than its control groups' share of time."""
    allowed = os.sched_getaffinity(0)
    cores = len({_siblings(cpu) for cpu in allowed})
    share = cgroup_share()
    return cores if share is None else max(1, min(cores, round(share)))


def cgroup_share(root: Path = _CGROUPS, groups: Path = _OWN_GROUPS) -> float | None:
    """How many CPUs' time the control groups of this process allow, by the strictest of them; None for no limit."""
    shares = []
    for line in _read(groups).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:  # version 2: one hierarchy
            shares += [_quota(*_read(folder / "cpu.max").split()[:2]) for folder in _upwards(root, path)]
        elif "cpu" in controllers.split(","):
            for folder in _upwards(root / controllers, path) + _upwards(root / "cpu", path):
                shares.append(_quota(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")))
    return min((share for share in shares if share is not None), default=None)


def _upwards(root: Path, path: str) -> list[Path]:
    """The folder of a group and those of all that it is in. A container sees its own group as the root."""
    below = Path(path.strip().lstrip("/"))
    return [root / below, *(root / parent for parent in below.parents)]


def _quota(quota: str = "", period: str = "") -> float | None:
    """Time per period; None for “max”, -1, or what is no number."""
    try:
        share = float(quota) / float(period)
    except (ValueError, ZeroDivisionError):
        return None
    return share if share > 0 else None


def _siblings(cpu: int) -> str:
    """What the hardware threads of one core have in common; a CPU's own number where the kernel does not tell."""
    return _read(_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").strip() or str(cpu)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
