"""Latent diffusion from the terminal: a lean, fast text-to-image sampler; and from Python.

`Session`, `GenerationRequest`, `LoRA`, `ModelSpec` and `RuntimeSpec` are imported when they are first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldmcli.session import Session as Session
    from ldmcli.spec import GenerationRequest as GenerationRequest
    from ldmcli.spec import LoRA as LoRA
    from ldmcli.spec import ModelSpec as ModelSpec
    from ldmcli.spec import RuntimeSpec as RuntimeSpec

__version__ = "0.1.0"
__all__ = ["GenerationRequest", "LoRA", "ModelSpec", "RuntimeSpec", "Session", "__version__"]

_WHERE = {
    "Session": "ldmcli.session",
    "GenerationRequest": "ldmcli.spec",
    "LoRA": "ldmcli.spec",
    "ModelSpec": "ldmcli.spec",
    "RuntimeSpec": "ldmcli.spec",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
