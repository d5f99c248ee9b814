"""The networks that steer a model by pictures, read when they are first asked for."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ldmcli.speed.offload import Stage

if TYPE_CHECKING:
    from ldmcli.pipeline.controlling import Network

_KEPT = 4  # networks, from batch to batch


class Networks:
    """Networks by what requests call them; `read` gives one at the stage's home."""

    def __init__(self, read: "Callable[[str], Network]", stage: Stage, dtype: torch.dtype) -> None:
        self._read, self._stage, self._dtype = read, stage, dtype
        self._kept: dict[str, Network] = {}  # the last used last

    def named(self, name: str) -> "Network":
        """The network, which is kept; the one not used for longest is given up for it. Raises as `load_control`
        does."""
        found = self._kept.pop(name, None)
        if found is None:
            while len(self._kept) >= _KEPT:
                self._stage.forget(self._kept.pop(next(iter(self._kept))))
            with torch.inference_mode(False):  # weights of that mode cannot be converted outside it
                found = self._read(name).to(self._dtype)
                self._stage.add(found)
        self._kept[name] = found
        return found

    def convert(self, dtype: torch.dtype) -> None:
        """Compute in another number type from now on."""
        self._dtype = dtype
        for network in self._kept.values():
            network.to(dtype)
