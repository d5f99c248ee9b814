"""Prompts that are drawn by lot, in the notation of Dynamic Prompts, kohya's scripts and others. Imports nothing heavy.

    {red|green} · {0.2::red|green} · {2$$red|green|blue} · {1-2$$ and $$red|green|blue} · __colours__

One of several; by weights; two of them, or one to two, with ", " or what is given between; a line of colours.txt in the
folder of wildcards. All of it nests. A backslash before `{`, `}`, `|` or `__` makes it text.
"""

import dataclasses
import hashlib
import random
import re
from pathlib import Path

from ldmcli.disk.opening import bad_file, missing, open_regular
from ldmcli.errors import UsageError, printable
from ldmcli.spec import GenerationRequest

_TOKEN = re.compile(r"\\(?:__|[{}|])|[{}|]|__(?!\s)((?:(?!__)[^{}|\n]){1,200})(?<!\s)__")
_COUNT = re.compile(r"\s*(\d{1,4})?(-)?(\d{1,4})?\$\$(?:([^$]*)\$\$)?")
_WEIGHT = re.compile(r"\s*(\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})::")
_UNSUPPORTED = re.compile(r"\$\{|\{\s*(?:[eE]\$\$|[~@])")
_NAME = re.compile(r"[\w\-. ]+(?:/[\w\-. ]+)*")
_COMMENT = re.compile(r"(?:^|\s)#.*")
_CURE = ("", "name a text file with a choice a line")
_DEEPEST, _LONGEST, _MOST_BYTES, _MOST_PARTS = 50, 10, 1 << 24, 1 << 16


@dataclasses.dataclass(frozen=True)
class _Choice:
    """`low` to `high` of the options, each some parts with a weight; `joint` stands between."""

    options: "list[tuple[float, list[str | _Choice]]]"
    low: int = 1
    high: int = 1
    joint: str = ", "
    of_file: bool = False


class DynamicPrompts:
    """Draws prompts. `folder` has the wildcards' files; `hashes` are those of the ones that were read, by name."""

    def __init__(self, folder: Path | None) -> None:
        self.hashes: dict[str, str] = {}
        self._folder = folder
        self._wildcards: dict[str, _Choice] = {}

    def drawn(self, request: GenerationRequest) -> GenerationRequest:
        """The request with prompts that its seed draws; itself where they leave nothing open. Raises as `draw`."""
        prompt = self.draw(request.prompt, request.seed)
        negative = self.draw(request.negative_prompt, request.seed, "negative prompt")
        if (prompt, negative) == (request.prompt, request.negative_prompt):
            return request
        return dataclasses.replace(request, prompt=prompt, negative_prompt=negative)

    def draw(self, prompt: str, seed: int, what: str = "prompt") -> str:
        """What the seed draws, the same everywhere; another for each `what`. Raises LdmError where the prompt cannot be
        meant, or a wildcard that it holds has no sound file, be that drawn or not."""
        if found := _UNSUPPORTED.search(prompt):
            raise UsageError(
                f"“{printable(found[0])}” in a prompt is no part of --dynamic-prompts, which knows {{a|b}}, {{2$$a|b}} "
                "and __name__."
            )
        if not _TOKEN.search(prompt):
            return prompt
        parts: list[str] = []
        _draw(self._parse(prompt, ()), random.Random(f"{what} {seed}"), parts)
        return "".join(parts)

    def _parse(self, text: str, inside: tuple[str, ...]) -> "list[str | _Choice]":
        """The parts of a prompt, or of a line of the last of the wildcards `inside`."""
        groups: list[list[list[str | _Choice]]] = [[[]]]  # open braces, the options in each, the parts of each
        place = 0
        for found in _TOKEN.finditer(text):
            parts, token = groups[-1][-1], found[0]
            parts.append(text[place : found.start()])
            place = found.end()
            if found[1]:
                parts.append(self._wildcard(found[1], inside))
            elif token == "{":
                groups.append([[]])
            elif token == "}" and len(groups) > 1:
                options = groups.pop()
                groups[-1][-1].append(_choice(options))
            elif token == "|" and len(groups) > 1:
                groups[-1].append([])
            else:
                parts.append(token.removeprefix("\\"))
            if len(groups) > _DEEPEST:
                raise UsageError(f"a prompt has more than {_DEEPEST} braces within each other.")
        if len(groups) > 1:
            raise UsageError(
                f"a brace in “{printable(text, 60)}” is not closed; add }}, or write \\{{ for the sign itself."
            )
        return [*groups[0][0], text[place:]]

    def _wildcard(self, name: str, inside: tuple[str, ...]) -> _Choice:
        if name in inside or len(inside) > _LONGEST:
            raise UsageError(
                f"the wildcard __{printable(name)}__ leads to itself, or over more than {_LONGEST} others."
            )
        if name not in self._wildcards:
            lines = [self._parse(line, (*inside, name)) for line in self._lines(name)]
            self._wildcards[name] = dataclasses.replace(_choice(lines), of_file=True)
        return self._wildcards[name]

    def _lines(self, name: str) -> list[str]:
        if self._folder is None:
            raise UsageError(f"__{printable(name)}__ in a prompt is a wildcard; give --wildcard-dir, or write \\__.")
        if not _NAME.fullmatch(name) or ".." in name:
            raise UsageError(f"the wildcard __{printable(name)}__ is no name of a file in --wildcard-dir.")
        path = self._folder / f"{name}.txt"
        if not path.exists():
            raise missing(path)
        with open_regular(path, _CURE) as file:
            data = file.read(_MOST_BYTES + 1)
        try:
            lines = [_COMMENT.sub("", line).strip() for line in data.decode("utf-8-sig").splitlines()]
        except UnicodeDecodeError as error:
            raise bad_file(path, f"is not UTF-8 text ({error})", _CURE[1]) from None
        lines = list(filter(None, lines))
        if not lines or len(data) > _MOST_BYTES:
            raise bad_file(path, f"is over {_MOST_BYTES >> 20} MiB" if lines else "has no lines", _CURE[1])
        self.hashes[name] = hashlib.sha256(data).hexdigest()
        return lines


def _choice(options: "list[list[str | _Choice]]") -> _Choice:
    """The choice between these, whose first may begin with a number, and each with a weight."""
    low, high, joint = 1, 1, ", "
    found, first = _cut(_COUNT, options[0])
    if found:
        low = int(found[1] or 1)
        high = int(found[3]) if found[3] else len(options) if found[2] else low
        joint = joint if found[4] is None else found[4]
    cut = [_cut(_WEIGHT, parts) for parts in (first, *options[1:])]
    weighted = [(float(found[1]) if found else 1.0, parts) for found, parts in cut]
    if low > high or not any(weight for weight, _ in weighted):
        raise UsageError(
            "braces in a prompt choose nothing: their numbers are the wrong way round, or all weights are 0."
        )
    return _Choice(weighted, low, high, joint)


def _cut(
    pattern: "re.Pattern[str]", parts: "list[str | _Choice]"
) -> "tuple[re.Match[str] | None, list[str | _Choice]]":
    """What the parts begin with, and the parts without it."""
    text = parts[0] if parts else None
    found = pattern.match(text) if isinstance(text, str) else None
    return (found, [text[found.end() :], *parts[1:]]) if found and isinstance(text, str) else (None, parts)


def _draw(parts: "list[str | _Choice]", lots: random.Random, into: list[str]) -> None:
    for part in parts:
        if isinstance(part, str):
            into.append(part)
            continue
        options = part.options
        inner = [one for one in options[0][1] if one] if len(options) == 1 else []
        if part.high > 1 and len(inner) == 1 and isinstance(inner[0], _Choice) and inner[0].of_file:
            options = inner[0].options  # several lines of one file
        left = list(options)
        for i in range(min(lots.randint(part.low, part.high), len(left))):
            weights = [weight for weight, _ in left]
            if not any(weights):
                break
            (chosen,) = lots.choices(range(len(left)), weights)
            into.extend([part.joint] if i else [])
            _draw(left.pop(chosen)[1], lots, into)
            if len(into) > _MOST_PARTS:
                raise UsageError("a prompt draws too much: its wildcards name one another too often.")
