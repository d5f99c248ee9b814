"""Frozen dataclasses of this program behave as the standard library's."""

import copy
import dataclasses
import functools
import inspect
import pickle
from typing import Any, ClassVar

import pytest

from ldmcli.frozen import frozen


class _Fields:
    kind: ClassVar[str] = "of the class"
    name: str
    size: int = 3
    tags: tuple[str, ...] = dataclasses.field(default_factory=tuple)
    read: Any = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(self.size)

    @functools.cached_property
    def twice(self) -> int:
        return 2 * self.size


def copied(name: str) -> type[Any]:
    return type(
        name, (), {key: value for key, value in vars(_Fields).items() if key not in ("__dict__", "__weakref__")}
    )


Ours, Theirs = frozen(copied("Ours")), dataclasses.dataclass(frozen=True)(copied("Theirs"))


@pytest.mark.parametrize("kind", [Ours, Theirs])
def test_an_instance_is_its_fields(kind: Any) -> None:
    one = kind("a", tags=("b",))
    assert (one.name, one.size, one.tags, one.read, one.twice) == ("a", 3, ("b",), None, 6)
    assert repr(one) == f"{kind.__name__}(name='a', size=3, tags=('b',))"
    same = kind(tags=("b",), name="a", read=len)  # which is not compared, nor is what is kept of a property
    assert one == same
    assert hash(one) == hash(same)
    assert one != kind("a", 4, ("b",))
    assert one != (Theirs if kind is Ours else Ours)("a", tags=("b",))
    assert dataclasses.replace(one, size=4) == kind("a", 4, ("b",))
    assert dataclasses.asdict(one) == {"name": "a", "size": 3, "tags": ("b",), "read": None}
    assert list(vars(kind(size=1, name="a"))) == ["name", "size", "tags", "read"]
    assert copy.deepcopy(one) == copy.copy(one) == one
    assert str(inspect.signature(kind)).startswith("(name: str, size: int = 3, tags: tuple[str, ...] = <")


@pytest.mark.parametrize("kind", [Ours, Theirs])
def test_what_is_no_instance_is_refused(kind: Any) -> None:
    for given, named in (((), {}), (("a", 1, (), None, 5), {}), (("a",), {"name": "b"}), (("a",), {"nam": "b"})):
        with pytest.raises(TypeError):
            kind(*given, **named)
    with pytest.raises(ValueError, match="-1"):
        kind("a", -1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        kind("a").size = 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        del kind("a").size


def test_requests_can_be_pickled() -> None:
    from ldmcli import GenerationRequest, LoRA

    asked = GenerationRequest("a", loras=(LoRA("b"),))
    assert pickle.loads(pickle.dumps(asked)) == asked
