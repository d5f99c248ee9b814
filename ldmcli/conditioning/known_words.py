"""What a model knows, where its folder has a list, and which words of a prompt it does not. Imports nothing heavy."""

import difflib
import functools
import re
from collections.abc import Iterable, Sequence

from ldmcli.errors import printable

_WORD = re.compile(r"[^\W\d_]+|[\u2600-\U0010ffff]")  # letters, or one pictograph
_COMMON = frozenset(("the", "and", "or", "of", "on", "in", "at", "to", "by", "for", "with"))  # nobody asks to see them
SHOWN_UNKNOWN, _EXAMPLES = 5, 8  # in a hint, at most


class WordList:
    """Names of what a model draws, a line each. Those up to the first empty line serve as examples; every word of the
    others is known too."""

    def __init__(self, text: str) -> None:
        paragraphs = re.split(r"\n\s*\n", text.strip(), maxsplit=1)
        self.names = tuple(line.strip() for line in text.splitlines() if line.strip())
        self._examples = tuple(line.strip() for line in paragraphs[0].splitlines())

    @functools.cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(word for name in self.names for word in words_of(name))

    def unknown(self, text: str, known: Iterable[str] = ()) -> list[str]:
        """The words of a text that are not in the list, nor among those of `known`, each once, in small letters; none
        where there is no list. Numbers and single letters are no words."""
        if not self.names:
            return []
        also = self._known | _COMMON | {word for each in known for word in words_of(each)}
        return [word for word in words_of(text) if word not in also]

    def hint(self, model: str, unknown: Sequence[str], prompts: int = 1) -> str:
        """A sentence on words that a model does not know, of so many prompts, with some names that it does: those that
        are spelled like them first."""
        shown = ", ".join(f"“{printable(word, 40)}”" for word in unknown[:SHOWN_UNKNOWN])
        shown += " and more" if len(unknown) > SHOWN_UNKNOWN else ""
        near = [difflib.get_close_matches(word, self._examples, 1, 0.7) for word in unknown[:SHOWN_UNKNOWN]]
        alike = [name for names in near for name in names]
        some = self._examples[:: max(1, len(self._examples) // _EXAMPLES)]
        names = ", ".join(printable(name, 40) for name in list(dict.fromkeys([*alike, *some]))[:_EXAMPLES])
        where = f" in {prompts} prompts" if prompts > 1 else ""
        return f"{printable(model)} does not know {shown}{where}; it knows {names} and more (see ldm models -v)"


def words_of(text: str) -> list[str]:
    """The words of a text, each once, in small letters, and pictographs."""
    return [word for word in dict.fromkeys(_WORD.findall(text.casefold())) if len(word) > 1 or not word.isascii()]
