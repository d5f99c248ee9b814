"""torch's libraries, half a gigabyte to link, are loaded by a thread while Python does other things; and no garbage is
looked for until what a command needs is there."""

import contextlib
import gc
import importlib
import importlib.machinery
import os
import sys
import threading
from pathlib import Path

_linking = threading.Event()
# Libraries of what is imported meanwhile, where they are not part of the interpreter.
_MEANWHILE = (
    "_bisect", "_blake2", "_bz2", "_contextvars", "_datetime", "_hashlib", "_heapq", "_json", "_lzma", "_opcode",
    "_queue", "_random", "_sha512", "_struct", "_typing", "_uuid", "math", "unicodedata", "zlib",
)  # fmt: skip


def link_ahead() -> None:
    """Begin to load torch's libraries, and collect no garbage until `settle_down`: imports and what is read from files
    make hundreds of thousands of objects, all to stay, and looking through them again and again is a tenth of the time.
    Does nothing where torch is imported already or missing."""
    folder = torch_folder()
    if folder is None or _linking.is_set():
        return
    _linking.set()
    gc.disable()
    # To load a library, or look one up, is to wait for those on their way.
    for name in _MEANWHILE:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    from ldmcli.speed.cpu.heap import keep_freed_memory

    keep_freed_memory()
    threading.Thread(target=_link, args=(folder / "lib",), name="link torch", daemon=True).start()


def is_linking() -> bool:
    """Whether torch is on its way, or there."""
    return _linking.is_set()


def settle_down() -> None:
    """What is there now stays; from now on garbage is collected, and not looked for among that."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def torch_folder() -> Path | None:
    """Where torch is installed; None where it is imported already, or missing."""
    spec = None if "torch" in sys.modules else importlib.machinery.PathFinder.find_spec("torch")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _link(folder: Path) -> None:
    """Load torch's libraries, which importing it would: torch finds them in place, and says what is wrong if not."""
    import ctypes

    with contextlib.suppress(AttributeError, OSError, TypeError):  # another system
        dlopen = ctypes.CDLL(None).dlopen  # called so, it leaves Python to the other threads, as CDLL itself does not
        dlopen.restype, dlopen.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int]
        # The first has what the others expect to find among the process's global names.
        dlopen(os.fsencode(folder / "libtorch_global_deps.so"), os.RTLD_NOW | os.RTLD_GLOBAL)
        dlopen(os.fsencode(folder / "libtorch_python.so"), os.RTLD_NOW)
