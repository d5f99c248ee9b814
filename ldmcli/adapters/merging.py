"""Adapters merged into the weights of loaded networks, and taken out again without a trace.

Weights are changed in place, whatever speed has made of the layers. What is changed is computed from a copy of the base
in float32 and cast once; taking out is copying back, bit for bit.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldmcli.adapters.adapter import Adapter, Use
from ldmcli.adapters.change import Change
from ldmcli.adapters.deltas import Factors, new_bias, new_weight
from ldmcli.adapters.placing import Modules
from ldmcli.adapters.spellings import Place
from ldmcli.checkpoints.files import WeightFile, read_tensors
from ldmcli.disk.opening import shown
from ldmcli.errors import BadDataError

_KNOWN = 64  # adapters whose places are remembered


class Merger:
    """The networks of one model, given by part, and copies of what adapters have changed in them; `family` is the
    model's, for errors. `uses` are the adapters that are merged now."""

    def __init__(self, networks: Mapping[str, nn.Module], family: str) -> None:
        self.uses: tuple[Use, ...] = ()
        self._modules = Modules(networks, family)
        self._placed: dict[int, tuple[Adapter, dict[Place, Change]]] = {}  # by the adapter's id
        self._base: dict[Place, dict[str, Tensor]] = {}  # copies of parameters as they were

    @torch.inference_mode()
    def merge(self, uses: Sequence[Use]) -> None:
        """Make the networks' weights the base with these adapters, in this order; without any, the base.

        A strength of 0 changes nothing. Where an adapter does not fit, all weights are the base's: raises BadDataError,
        and what reading its file raises. Modules of an adapter that the model lacks are a warning, once.
        """
        if tuple(uses) == self.uses:
            return
        try:
            read = [(use, _read(self._places(use.adapter), use)) for use in uses]
            places = {place: None for _, factors in read for place in factors}  # in order, each once
            for place in [place for place in self._base if place not in places]:
                self._restore(place)
            for place in places:
                self._write(place, [(use, *factors[place]) for use, factors in read if place in factors])
        except BaseException:
            self.restore()
            raise
        self.uses = tuple(uses)

    @torch.inference_mode()
    def restore(self) -> None:
        """Put the base back, bit for bit."""
        self.uses = ()
        for place in list(self._base):
            self._restore(place)

    def _restore(self, place: Place) -> None:
        parameters = self._modules.parameters(place)
        for name, copy in self._base.pop(place).items():
            parameters[name].copy_(copy)

    def _places(self, adapter: Adapter) -> dict[Place, Change]:
        if id(adapter) not in self._placed:
            while len(self._placed) >= _KNOWN:
                del self._placed[next(iter(self._placed))]
            self._placed[id(adapter)] = adapter, self._modules.placed(adapter)
        return self._placed[id(adapter)][1]

    def _write(self, place: Place, merges: Sequence[tuple[Use, str, Factors]]) -> None:
        """Change the parameters of one module."""
        parameters = self._modules.parameters(place)
        copies = self._base.setdefault(place, {})
        own = {name: copies.get(name, parameter) for name, parameter in parameters.items()}
        values = {name: tensor.to(torch.float32, copy=True) for name, tensor in own.items()}  # to be written into
        changed: dict[str, Tensor] = {}
        for use, kind, stored in merges:
            factors = {name: tensor.to(values["weight"].device, torch.float32) for name, tensor in stored.items()}
            changed |= self._changed(place, use, kind, values | changed, factors)
        for name, parameter in parameters.items():
            if name in changed:
                _check_range(changed[name], parameter.dtype, place, [use for use, _, _ in merges])
                copies.setdefault(name, parameter.clone())
                parameter.copy_(changed[name])
            elif name in copies:
                parameter.copy_(copies.pop(name))

    def _changed(
        self, place: Place, use: Use, kind: str, values: Mapping[str, Tensor], factors: Factors
    ) -> dict[str, Tensor]:
        """Those of a module's parameters that an adapter changes, as it makes them. Raises BadDataError."""
        strength = use.strength(place)
        try:
            weight = new_weight(kind, values["weight"], factors, strength)
            bias = new_bias(values.get("bias"), factors, strength)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            why = f" ({error})" if isinstance(error, ValueError) else ""
            shape = list(values["weight"].shape)
            raise self._modules.misfit(use.adapter, place, shape, kind, factors, why) from None
        return {name: new for name, new in (("weight", weight), ("bias", bias)) if new is not None}


def _read(changes: Mapping[Place, Change], use: Use) -> dict[Place, tuple[str, Factors]]:
    """Kind and factors, as they are stored, of the changes whose strength is not 0."""
    chosen = {place: change for place, change in changes.items() if use.strength(place)}
    wanted: dict[Path, tuple[WeightFile, list[str]]] = {}
    for change in chosen.values():
        wanted.setdefault(change.file.path, (change.file, []))[1].extend(change.keys.values())
    read = {path: dict(read_tensors(file, keys, "cpu", None)) for path, (file, keys) in wanted.items()}
    found: dict[Place, tuple[str, Factors]] = {}
    for place, change in chosen.items():
        factors = {name: read[change.file.path][key] for name, key in change.keys.items()}
        configured = {} if change.scale is None else {"scale": torch.tensor(change.scale)}
        found[place] = change.kind.name, factors | configured
    return found


def _check_range(value: Tensor, dtype: torch.dtype, place: Place, uses: Sequence[Use]) -> None:
    """Raise BadDataError where `dtype` cannot hold the merged numbers."""
    low, high = torch.aminmax(value)
    largest = max(-float(low), float(high))
    if not largest <= torch.finfo(dtype).max:  # nor NaN
        names = ", ".join(shown(use.adapter.path) for use in uses)
        what = f"makes numbers of {largest:.4g} in {place}, more than {str(dtype).removeprefix('torch.')} can hold"
        raise BadDataError(f"{names} {what}; use a smaller weight or --dtype fp32.")
