"""Which of a model's modules an adapter changes: looked up, checked for fit, and nothing dropped in silence."""

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ldmcli.adapters.adapter import Adapter
from ldmcli.adapters.change import Change
from ldmcli.adapters.facts import base_family
from ldmcli.adapters.kinds import SCALARS, split
from ldmcli.adapters.spellings import Place, module_table
from ldmcli.disk.opening import bad_file, shown
from ldmcli.errors import BadDataError, printable
from ldmcli.speed.weights import plain_parameters

_log = logging.getLogger(__name__)
_MAX_NAME = 200  # letters of a module's name, in any spelling
_SHOWN = 3  # names of what does not fit


class Modules:
    """The modules of one model, whose networks are given by part, and where adapters name them; `family` is the
    model's, for errors."""

    def __init__(self, networks: Mapping[str, nn.Module], family: str) -> None:
        self._networks = networks
        self._family = family
        self._table = module_table(networks)

    def parameters(self, place: Place) -> dict[str, Tensor]:
        """A module's own weight, and its bias where it has one, to be written in place."""
        return plain_parameters(self._networks[place.part], place.name)

    def placed(self, adapter: Adapter) -> dict[Place, Change]:
        """The adapter's changes by module. What has no place in this model is a warning.

        Raises BadDataError where no module is the model's, one is changed twice, or one in an unknown way.
        """
        found: dict[Place, Change] = {}
        strays: list[str] = []
        for name, change in adapter.changes.items():
            place = self._table.get(name)
            if place is None:
                strays.append(name)
            elif place in found:
                raise bad_file(adapter.path, f"changes {place} twice", "ask its author for a sound file")
            else:
                found[place] = change
        if not found:
            what = f"none of the {len(strays)} modules it changes is in this {self._family} model ({_first(strays)})"
            raise bad_file(adapter.path, f"{_made_for(adapter)}: {what}", "use one that was made for it")
        for key in adapter.others:
            self._refuse_unknown(adapter, key)
        strays += adapter.others
        if strays:
            told = "%s: %d of its %d modules and other keys have no place in this model and are left out (%s)"
            _log.warning(told, shown(adapter.path), len(strays), len(strays) + len(found), _first(strays))
        return found

    def _refuse_unknown(self, adapter: Adapter, key: str) -> None:
        """Raise BadDataError where a key that is part of no change is of one of the model's modules; lone scalars are
        not: they change nothing."""
        is_scalar = (split(key) or ("", ""))[1] in SCALARS
        ends = [at for at, mark in enumerate(key[:_MAX_NAME]) if mark == "."]
        if not is_scalar and any(key[:end] in self._table for end in ends):
            what = f"changes a module in a way that this version does not know (“{key[:200]}”)"
            raise bad_file(adapter.path, what, "use a LoRA of another kind")

    def misfit(
        self, adapter: Adapter, place: Place, shape: list[int], kind: str, factors: Mapping[str, Tensor], why: str
    ) -> BadDataError:
        """The error for factors of a kind that do not fit a module, whose weight has this shape, or one another."""
        has = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in factors.items() if tensor.ndim)
        told = f"the weight of {place} is {shape}, the {kind} has {has}{why}"
        what = f"{_made_for(adapter)} and does not fit this {self._family} model: {told}"
        return bad_file(adapter.path, what, "use one that was made for it")


def _made_for(adapter: Adapter) -> str:
    family = base_family(adapter)
    return f"is for {family}" if family else "is for a model of another kind"


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(printable(name, 100) for name in names[:_SHOWN]) + more
