"""The C library's heap, from which memory comes on a CPU: what it keeps, and what it gives back."""

import contextlib
import ctypes

MUCH = 256 << 20  # bytes of free memory that are worth giving back
LARGEST_KEPT = 96 << 20  # bytes: a U-Net's largest pieces are kept, those of a VAE given back
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_ALL = 2**31 - 1


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
