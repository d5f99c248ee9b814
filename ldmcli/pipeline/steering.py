"""The networks that steer a model by pictures, read when they are first asked for."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ldmcli.speed.offload import Stage

if TYPE_CHECKING:
    from ldmcli.checkpoints.control_source import ControlSource
    from ldmcli.pipeline.controlling import Network

_KEPT = 4  # networks, from batch to batch


class Networks:
    """Networks by what requests call them: `find` gives a name's file, looked at, and `read` what it holds, at the
    stage's home."""

    def __init__(
        self,
        find: "Callable[[str], ControlSource]",
        read: "Callable[[ControlSource], Network]",
        stage: Stage,
        dtype: torch.dtype,
    ) -> None:
        self._find, self._read, self._stage, self._dtype = find, read, stage, dtype
        self._kept: dict[str, tuple[ControlSource, Network]] = {}  # the last used last

    def named(self, name: str) -> "Network":
        """The network, which is kept while its file is the same; the one not used for longest is given up for it.
        Raises as `open_control` and `load_control` do."""
        source = self._find(name)
        if name in self._kept and self._kept[name][0] is not source:
            self._stage.forget(self._kept.pop(name)[1])
        kept = self._kept.pop(name, None)
        if kept is None:
            while len(self._kept) >= _KEPT:
                self._stage.forget(self._kept.pop(next(iter(self._kept)))[1])
            with torch.inference_mode(False):  # weights of that mode cannot be converted outside it
                kept = source, self._read(source).to(self._dtype)
                self._stage.add(kept[1])
        self._kept[name] = kept
        return kept[1]

    def convert(self, dtype: torch.dtype) -> None:
        """Compute in another number type from now on."""
        self._dtype = dtype
        for _, network in self._kept.values():
            network.to(dtype)
