"""A U-Net through torch.compile: faster steps, after minutes of compiling at first. Numbers differ by rounding.

What was compiled is kept in the user's cache, where the next process finds it; tracing takes a while in each.
"""

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ldmcli.disk.cache import cache_folder, make_private
from ldmcli.errors import printable
from ldmcli.speed.memory import is_out_of_memory
from ldmcli.speed.startup import whole_torch

BACKEND = "inductor"
# Its mode "max-autotune-no-cudagraphs", for this program's own graph goes around a step; no list of choices is printed.
GPU_OPTIONS: dict[str, Any] = {
    "max_autotune": True,
    "coordinate_descent_tuning": True,
    "autotune_num_choices_displayed": 0,
}
SHAPES = 64  # of inputs that are compiled for; with more, torch goes on without for the new ones
_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_log = logging.getLogger(__name__)


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`function`, or a module's calls, as torch.compile makes it when it is called: for each shape and number type of
    inputs and weights anew. Where it cannot be compiled, the log says so once and it is computed as before."""
    current: Callable[..., Any] | None = None

    def call(*args: Any, **settings: Any) -> Any:
        nonlocal current
        try:
            if current is None:
                _log.info("compiling the U-Net, which takes minutes the first time")
                current = _compiled(function, device)
            return current(*args, **settings)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if current is function or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
                raise
            causes = list(_causes(error))
            if memory := next(filter(is_out_of_memory, causes), None):
                raise memory from None
            # torch appends hints to what went wrong.
            reason = printable(str(causes[-1]).strip().partition("\n")[0], 200)
        current = function
        _log.warning("the U-Net could not be compiled (%s); going on without --compile", reason)
        return function(*args, **settings)

    return call


def _compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    whole_torch()
    keep_on_disk()
    if not os.environ.get("TORCH_LOGS"):
        logging.getLogger("torch").setLevel(logging.ERROR)  # it warns of what a user can do nothing about
    from torch._dynamo import config

    config.recompile_limit = max(SHAPES, config.recompile_limit)
    options = GPU_OPTIONS if BACKEND == "inductor" and device.type == "cuda" else None
    return torch.compile(function, dynamic=False, backend=BACKEND, options=options)


def keep_on_disk() -> None:
    """Have torch keep what it compiles in this program's cache, unless the environment names a place. Where that folder
    cannot be made, or is not the user's alone, torch has one of its own among the temporary files."""
    base = cache_folder()
    if os.environ.get(_FOLDER) or base is None:
        return
    folder = base / "compile"
    try:
        make_private(folder)  # code is run from there
    except OSError as error:
        _log.debug("cache: %s goes unused: %s", printable(str(folder)), printable(str(error)))
        return
    os.environ[_FOLDER] = str(folder)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that led to it, the first of all last."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
