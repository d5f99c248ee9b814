"""Frozen dataclasses that are made at once. `dataclasses` compiles six functions for each class, a third of a
millisecond: for those that every command imports, half as long as it takes to import click."""

import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

if TYPE_CHECKING:
    import inspect

_T = TypeVar("_T")


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def frozen(cls: type[_T]) -> type[_T]:
    """`dataclasses.dataclass(frozen=True)`, by functions that all such classes share."""
    dataclasses.dataclass(init=False, repr=False, eq=False)(cls)
    # Without class variables, which `dataclasses` keeps among them and takes no values of.
    cls.__dataclass_fields__ = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore
    for name, shared in _SHARED.items():
        setattr(cls, name, shared)
    return cls


def _init(self: Any, *given: Any, **named: Any) -> None:
    cls, fields = type(self), self.__dataclass_fields__
    values = dict(zip(fields, given, strict=False))
    if len(given) > len(fields):
        raise TypeError(f"{cls.__name__} has {len(fields)} fields, and {len(given)} values are given")
    for name in named:
        if name not in fields or name in values:
            raise TypeError(
                f"{cls.__name__} {'has no field' if name not in fields else 'is given two values of'} {name}"
            )
    values |= named
    for name, field in fields.items():
        if name in values:
            value = values[name]
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            raise TypeError(f"{cls.__name__} lacks {name}")
        self.__dict__[name] = value  # in the order of the fields
    if hasattr(self, "__post_init__"):
        self.__post_init__()


def _repr(self: Any) -> str:
    fields = (field.name for field in dataclasses.fields(self) if field.repr)
    return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in fields)})"


def _compared(self: Any) -> tuple[Any, ...]:
    return tuple([getattr(self, name) for name, field in self.__dataclass_fields__.items() if field.compare])


def _eq(self: Any, other: object) -> bool:
    return _compared(self) == _compared(other) if type(self) is type(other) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_compared(self))


def _setattr(self: Any, name: str, _value: Any) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _delattr(self: Any, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")


class _Signature:
    """What `inspect` and `help` show of how a class is called."""

    def __get__(self, _: object, cls: Any) -> "inspect.Signature":
        from inspect import Parameter, Signature

        def default(field: "dataclasses.Field[Any]") -> Any:
            if field.default is not dataclasses.MISSING:
                return field.default
            return Parameter.empty if field.default_factory is dataclasses.MISSING else field.default_factory

        kind, fields = Parameter.POSITIONAL_OR_KEYWORD, dataclasses.fields(cls)
        return Signature([Parameter(f.name, kind, default=default(f), annotation=f.type) for f in fields])


_SHARED = {
    "__init__": _init, "__repr__": _repr, "__eq__": _eq, "__hash__": _hash, "__setattr__": _setattr,
    "__delattr__": _delattr, "__signature__": _Signature(),
}  # fmt: skip
