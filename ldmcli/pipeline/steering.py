"""The networks that steer a model by pictures, read when they are first asked for."""

import dataclasses
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ldmcli.speed.offload import Stage

if TYPE_CHECKING:
    from ldmcli.conditioning.image_encoder import ImageEncoder
    from ldmcli.networks.ip_adapter import IPAdapter
    from ldmcli.pipeline.controlling import Network
    from ldmcli.speed.policy import Runtime

_KEPT = 4  # networks of a kind, from batch to batch
_Source = TypeVar("_Source")
_Network = TypeVar("_Network", bound=nn.Module)


class Networks(Generic[_Source, _Network]):
    """Networks by what requests call them: `find` says where one is on disk, and `read` gives that at the stage's
    home."""

    def __init__(
        self, find: Callable[[str], _Source], read: Callable[[_Source], _Network], stage: Stage, dtype: torch.dtype
    ) -> None:
        self._find, self._read, self._stage, self._dtype = find, read, stage, dtype
        self._kept: dict[str, tuple[_Source, _Network]] = {}  # the last used last

    def named(self, name: str) -> _Network:
        """The network, which is kept while its files stay as they are; the one not used for longest is given up for it.
        Raises LdmError."""
        source = self._find(name)
        known, network = self._kept.pop(name, (None, None))
        if network is not None and known is not source:
            self._stage.forget(network)
            network = None
        if network is None:
            while len(self._kept) >= _KEPT:
                self._stage.forget(self._kept.pop(next(iter(self._kept)))[1])
            with torch.inference_mode(False):  # weights of that mode cannot be converted outside it
                network = self._read(source).to(self._dtype)
                self._stage.add(network)
        self._kept[name] = source, network
        return network

    def convert(self, dtype: torch.dtype) -> None:
        """Compute in another number type from now on."""
        self._dtype = dtype
        for _, network in self._kept.values():
            network.to(dtype)


@dataclasses.dataclass(frozen=True)
class Steerers:
    """All of them: control networks, and IP-Adapters with what they read. `encoder_of` says which image encoder an
    adapter has; `features` are what encoders said of pictures, each with its encoder, so that each is read once."""

    controls: "Networks[Any, Network]"
    adapters: "Networks[Any, IPAdapter]"
    encoders: "Networks[Any, ImageEncoder]"
    encoder_of: Callable[[str], str]
    features: dict[tuple[str, ...], "tuple[weakref.ref[ImageEncoder], Tensor]"] = dataclasses.field(
        default_factory=dict
    )

    def convert(self, runtime: "Runtime") -> None:
        """Compute in the number type of another runtime from now on."""
        self.controls.convert(runtime.dtype)
        self.adapters.convert(runtime.dtype)
        self.encoders.convert(encoder_dtype(runtime))
        self.features.clear()


def encoder_dtype(runtime: "Runtime") -> torch.dtype:
    """The number type of image encoders: that of text encoders, or float32 where all else is."""
    return runtime.dtype if runtime.dtype == torch.float32 else runtime.text_dtype
