"""How modules are made fast: parts of them are replaced on their parent, by others with the same parameters."""

from collections.abc import Callable
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def replaced(module: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """`module` with each of its parts, and last itself, replaced by what `make` gives for it; None leaves a part.

    A part that is in several places is replaced by one and the same. Returns the root, which may be a new module.
    """
    return _visited(module, make, {})


def _visited(
    part: nn.Module, make: Callable[[nn.Module], nn.Module | None], made: dict[nn.Module, nn.Module]
) -> nn.Module:
    """What stands for `part`; `made` holds what stands for those that were visited. No closure: one that calls itself
    would keep it, and with it all plain weights, until the collector runs."""
    if part not in made:
        for name, child in list(part._modules.items()):
            if child is not None and (new := _visited(child, make, made)) is not child:
                setattr(part, name, new)
        made[part] = make(part) or part
    return made[part]


def recast(kind: type[M], module: nn.Module) -> M:
    """A module of `kind`, a subclass of the module's own class, that holds what `module` holds: the same parameters
    under the same names, the same parts, none of them copied. What the subclass adds begins as its class says."""
    new = kind.__new__(kind)
    vars(new).update({name: value.copy() if isinstance(value, dict) else value for name, value in vars(module).items()})
    return new
