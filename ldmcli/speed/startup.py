"""A quick start: torch's import is most of a short run, and half of it is for what drawing never does.

`quicken` is for the command line's own processes, before torch is imported; a program that uses ldmcli as a library
gets torch as it is. Parts of torch that its own `__init__` imports only to have them there (exporters, decompositions,
quantization, optimizers, data loaders, the Python half of the meta device) are imported when something first asks for
what is in them, as `importlib.util.LazyLoader` would. Theirs is not used: any look at an attribute, which inspection of
all modules takes, would import them after all.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import re
import sys
import threading
import types
from collections.abc import Sequence
from pathlib import Path

from ldmcli.speed.linking import link_ahead, torch_folder

_log = logging.getLogger(__name__)

# The releases of torch for which it was checked that `import torch` needs nothing of these; others are imported whole.
CHECKED_TORCH = ("2.14.",)
DEFERRED = frozenset((
    "torch._meta_registrations",
    "torch.ao",
    "torch.distributed._meta_registrations",
    "torch.distributions",
    "torch.export",
    "torch.fx.passes",
    "torch.masked",
    "torch.nn.intrinsic",
    "torch.nn.qat",
    "torch.nn.quantizable",
    "torch.nn.quantized",
    "torch.optim",
    "torch.profiler",
    "torch.quantization",
    "torch.testing",
    "torch.utils.data",
    "torchgen.model",
    "unittest.mock",  # with asyncio
))  # fmt: skip


def quicken() -> None:
    """Make the next `import torch` of this process quick. Does nothing where torch is imported already, missing, or of
    another release than those checked."""
    folder = torch_folder()
    if folder is None or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    link_ahead()
    with contextlib.suppress(ImportError):
        import numpy  # noqa: F401  meanwhile, for torch will
    if _version(folder).startswith(CHECKED_TORCH):
        sys.meta_path.insert(0, _Finder())
    else:
        _log.debug("torch is none of the releases that start quickly: %s", CHECKED_TORCH)


def whole_torch() -> None:
    """Import what was deferred: compilers and counters of operations need the meta device's Python half."""
    for name in sorted(DEFERRED & sys.modules.keys()):
        module = sys.modules[name]
        if isinstance(module, _Deferred):
            _load(module)


def _version(folder: Path) -> str:
    """torch's version, read without importing it."""
    found = None
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = re.search(r"^__version__\b[^=]*=\s*['\"](.*?)['\"]", (folder / "version.py").read_text(), re.M)
    return found[1] if found else ""


def may_have_gpu() -> bool:
    """Whether a driver for GPUs of NVIDIA's is there: on Linux, under Windows, on Jetson."""
    return any(os.path.exists(f"/dev/{name}") for name in ("nvidiactl", "nvidia0", "dxg", "nvhost-gpu", "nvgpu"))


class _Deferred(types.ModuleType):
    """A module that is imported when something is looked up in it that is not there yet."""

    def __getattr__(self, name: str) -> object:
        pending = self.__spec__ is not None and isinstance(self.__spec__.loader, _Loader)
        # Names of this form are what Python itself and `inspect` look for in every module.
        if not pending or (name.startswith("__") and name != "__all__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        _load(self)
        return getattr(self, name)

    def __dir__(self) -> list[str]:
        _load(self)
        return list(super().__dir__())


_loading = threading.RLock()


def _load(module: _Deferred) -> None:
    """Import it now, into this same module object. No method: a module may have functions of any name."""
    with _loading:
        spec = module.__spec__
        if spec is None or not isinstance(spec.loader, _Loader):
            return  # it is
        module.__loader__ = spec.loader = spec.loader.real
        spec.loader.exec_module(module)


class _Loader(importlib.abc.Loader):
    """In place of a module's `real` loader: makes it, and leaves it empty."""

    def __init__(self, real: importlib.abc.Loader) -> None:
        self.real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> _Deferred:
        return _Deferred(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Later."""


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of DEFERRED, and has them loaded by _Loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "cuda.bindings" and not may_have_gpu():
            raise ModuleNotFoundError("there is no GPU that it could be for", name=name)  # torch goes on without
        if name not in DEFERRED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Loader(spec.loader)
        return spec
