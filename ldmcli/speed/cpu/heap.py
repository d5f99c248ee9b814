"""Where memory comes from on a CPU: the C library's heap, its ways, and a head start on filling it."""

import contextlib
import ctypes
import threading

MUCH = 256 << 20  # bytes of free memory that are worth giving back
LARGEST_KEPT = 96 << 20  # bytes: a U-Net's largest pieces are kept, those of a VAE given back
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8  # of mallopt(3)
_USUAL_MMAPS = 65536
_ALL = 2**31 - 1
_PART = 16 << 20  # bytes: 10 ms of a kernel's work, which is as long as `free` may have to wait


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


class FilledHeap:
    """`size` bytes that `threads` threads get from the kernel in the background, for what asks for memory after `free`.

    A kernel clears memory when it is first touched, which takes far longer than to write numbers there: of 4 GB of
    weights, three seconds of a core in the end. They are spent here while the main thread imports torch and other cores
    have nothing to do. With another C library than glibc nothing is done.
    """

    def __init__(self, size: int, threads: int) -> None:
        keep_freed_memory()
        self._enough = threading.Event()
        self._lock, self._next, self._size = threading.Lock(), 0, size
        self._block: int | None = None
        self._threads: list[threading.Thread] = []
        with contextlib.suppress(AttributeError, OSError):
            self._libc = ctypes.CDLL(None)
            self._libc.malloc.restype, self._libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
            self._libc.free.argtypes = [ctypes.c_void_p]
            self._libc.mallopt(_ARENA_MAX, 1)  # else each thread would have a heap of its own, and keep it
            self._libc.mallopt(_MMAP_MAX, 0)  # in one piece and in the heap: weights are of any size
            self._block = self._libc.malloc(size)
            self._libc.mallopt(_MMAP_MAX, _USUAL_MMAPS)
        if self._block:
            self._threads = [threading.Thread(target=self._fill, name="fill heap", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _fill(self) -> None:
        while not self._enough.is_set():
            with self._lock:
                start, self._next = self._next, min(self._next + _PART, self._size)
                end = self._next
            if start == end:
                return
            assert self._block
            ctypes.memset(self._block + start, 0, end - start)

    def free(self) -> int:
        """End, and leave what there is to whoever asks next; so many bytes are ready."""
        self._enough.set()
        for thread in self._threads:
            thread.join()
        if self._block:
            self._libc.free(self._block)
        filled, self._block, self._next = self._next, None, 0
        return filled
