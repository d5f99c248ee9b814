"""What a model's classes are called, where a list lies beside it. Imports nothing heavy."""

import dataclasses
import difflib
import io
from collections.abc import Iterator

from ldmcli.conditions import Label
from ldmcli.errors import UsageError, printable
from ldmcli.spec import GenerationRequest


class ClassNames:
    """Names of classes, those of a number a line, with commas between: `goldfish, Carassius auratus`."""

    def __init__(self, text: str) -> None:
        self.names = tuple(
            line.strip() for line in io.StringIO(text, newline=None)
        )  # str.splitlines has other ends too

    def numbered(self, request: GenerationRequest) -> GenerationRequest:
        """The request with classes' numbers in place of their names; itself where no name is listed. Raises as
        `number`."""
        named = (request.label, *(box[0] for box in request.layout or ()))
        if not self.names or not any(isinstance(name, str) for name in named):
            return request
        layout = request.layout and tuple((self.number(box[0]), *box[1:]) for box in request.layout)
        label = None if request.label is None else self.number(request.label)
        return dataclasses.replace(request, label=label, layout=layout)

    def number(self, label: Label) -> int:
        """The number of a class by one of its names, letter case aside. Raises UsageError where none, or more than one,
        is called so."""
        if isinstance(label, int):
            return label
        wanted = label.casefold()
        found = [i for i, line in enumerate(self.names) if wanted in _called(line)]
        if len(found) == 1:
            return found[0]
        shown = printable(label, 100)
        if found:
            raise UsageError(f"“{shown}” is the name of classes {', '.join(map(str, found[:10]))}; give the number.")
        every = [name for line in self.names for name in _called(line)]
        near = difflib.get_close_matches(wanted, every, 3, 0.7)
        meant = f"did you mean {' or '.join(printable(name, 60) for name in near)}?" if near else "give its number."
        raise UsageError(f"the model has no class called “{shown}”; {meant}")


def _called(line: str) -> Iterator[str]:
    yield line.casefold()
    if "," in line:
        yield from (name.strip().casefold() for name in line.split(","))
