"""The C library's heap, from which memory comes on a CPU: what it keeps, and what it gives back."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

MUCH = 256 << 20  # bytes of free memory that are worth giving back
LARGEST_KEPT = 96 << 20  # bytes: a U-Net's largest pieces are kept, those of a VAE given back
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_ALL = 2**31 - 1
_TUNABLES = "GLIBC_TUNABLES"
_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask_for_large_pages() -> None:
    """Begin this process again with a C library that asks the kernel for pages of 2 MB: gigabytes of weights are
    cleared in larger pieces and found with fewer look-ups. To be called before anything is done.

    A new process's first step of Stable Diffusion 1.x in bfloat16 is done a tenth sooner; beginning again takes 0.05 s.
    Does nothing where the environment has tunables of its own, the kernel gives such pages always or never, or the C
    library is not glibc 2.35 or newer, which reads this as it starts.
    """
    try:
        _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        recent = tuple(map(int, version.split("."))) >= (2, 35)
        asked = recent and "[madvise]" in _LARGE_PAGES.read_text()
    except (OSError, ValueError):
        return
    if asked and _TUNABLES not in os.environ and sys.executable:
        os.environ[_TUNABLES] = "glibc.malloc.hugetlb=1"
        with contextlib.suppress(OSError):
            os.execv(sys.executable, sys.orig_argv)


def keep_freed_memory() -> None:
    """Let this process keep what is freed for what is asked for next.

    A step of a U-Net asks for gigabytes, in pieces of some megabytes, and frees them again. The C library would give
    each back to the kernel and have it cleared anew: of a step of Stable Diffusion 1.x on two cores, 0.8 of 28 seconds
    of their time; now 0.1, for some hundred megabytes more. Does nothing with another C library than glibc.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, _ALL)


def give_back_free_memory(least: int = MUCH) -> None:
    """Give memory that was freed back to the system, if it is `least` bytes or more: a VAE asks for pieces larger than
    those that are kept. Does nothing with another C library than glibc."""
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = _MallInfo
        if libc.mallinfo2().fordblks >= least:
            libc.malloc_trim(0)


class _MallInfo(ctypes.Structure):
    """What mallinfo2(3) tells; `fordblks` are the bytes that are free."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )
