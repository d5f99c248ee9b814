"""Which emoji the model learns, on which backgrounds, and the words for them.

Each emoji has an everyday name, its Unicode name and, where several are easily confused (hearts by colour, faces by
mood), the name of its kind. For each emoji one background is held out for ever: no stage sees that pair, so that
evaluate.py can ask whether the model composes or only remembers.
"""

import dataclasses
import unicodedata
from collections.abc import Iterator

from presets import Preset

HEARTS = {
    "red heart": "❤", "orange heart": "🧡", "yellow heart": "💛", "green heart": "💚", "blue heart": "💙",
    "purple heart": "💜", "black heart": "🖤", "white heart": "🤍",
}  # fmt: skip

FACES = {
    "happy face": "😊", "laughing face": "😂", "crying face": "😭", "angry face": "😡", "surprised face": "😮",
    "sleeping face": "😴", "cool face": "😎", "loving face": "😍", "winking face": "😉", "sad face": "🙁",
}  # fmt: skip

THINGS = {
    "red apple": "🍎", "orange": "🍊", "pear": "🍐", "banana": "🍌", "lemon": "🍋", "watermelon": "🍉",
    "strawberry": "🍓", "cherries": "🍒", "grapes": "🍇", "pineapple": "🍍", "avocado": "🥑", "carrot": "🥕",
    "mushroom": "🍄", "pumpkin": "🎃", "pizza": "🍕", "hamburger": "🍔", "donut": "🍩", "birthday cake": "🎂",
    "ice cream": "🍦", "tiger": "🐯", "rabbit": "🐰", "whale": "🐳", "cat": "🐱", "dog": "🐶", "bear": "🐻",
    "panda": "🐼", "frog": "🐸", "pig": "🐷", "monkey": "🐵", "lion": "🦁", "fox": "🦊", "penguin": "🐧", "owl": "🦉",
    "unicorn": "🦄", "elephant": "🐘", "fish": "🐠", "octopus": "🐙", "crab": "🦀", "turtle": "🐢", "bee": "🐝",
    "butterfly": "🦋", "ladybug": "🐞", "house": "🏠", "car": "🚗", "rocket": "🚀", "airplane": "✈", "sailboat": "⛵",
    "bus": "🚌", "soccer ball": "⚽", "basketball": "🏀", "balloon": "🎈", "gift": "🎁", "light bulb": "💡",
    "crown": "👑", "umbrella": "☂", "bell": "🔔", "key": "🔑", "tree": "🌳", "cactus": "🌵", "rose": "🌹",
    "sunflower": "🌻", "fire": "🔥", "rainbow": "🌈", "cloud": "☁", "sun": "☀", "moon": "🌙", "star": "⭐",
    "snowman": "⛄", "ghost": "👻", "robot": "🤖",
}  # fmt: skip

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (200, 40, 48),
    "orange": (240, 140, 40),
    "yellow": (250, 225, 90),
    "green": (60, 160, 80),
    "blue": (50, 100, 220),
    "purple": (130, 70, 180),
    "pink": (250, 170, 200),
    "gray": (128, 128, 128),
    "white": (250, 250, 250),
    "black": (16, 16, 16),
}
BACKGROUND_NAMES = tuple(BACKGROUNDS)

_WITHOUT_ARTICLE = {"cherries", "grapes"}
_SPOKEN_WITH_A_CONSONANT = {"unicorn"}
# Blocks of pictographs, for the preset that takes every emoji: weather, food, animals, things, transport, faces
_BLOCKS = ((0x1F300, 0x1F5FF), (0x1F600, 0x1F64F), (0x1F680, 0x1F6FF), (0x1F900, 0x1F9FF), (0x1FA70, 0x1FAFF))


@dataclasses.dataclass(frozen=True)
class Emoji:
    name: str  # in everyday words
    character: str
    kind: str | None = None  # "heart", "face": what it shares with others

    @property
    def unicode_name(self) -> str:
        return unicodedata.name(self.character).lower()


def article(words: str) -> str:
    """The words with "a" or "an" before them, or as they are."""
    first = words.split()[0]
    if first in _WITHOUT_ARTICLE:
        return words
    vowel = first[0] in "aeiou" and first not in _SPOKEN_WITH_A_CONSONANT
    return f"{'an' if vowel else 'a'} {words}"


def _listed() -> Iterator[Emoji]:
    yield from (Emoji(name, character) for name, character in THINGS.items())
    yield from (Emoji(name, character, "heart") for name, character in HEARTS.items())
    yield from (Emoji(name, character, "face") for name, character in FACES.items())


def _others() -> Iterator[Emoji]:
    """All further pictographs by their Unicode names, but those that would share a name with a listed one; skin tones
    and the halves of flags are no pictures."""
    known, names = {emoji.character for emoji in _listed()}, {emoji.name for emoji in _listed()}
    for first, last in _BLOCKS:
        for character in map(chr, range(first, last + 1)):
            name = unicodedata.name(character, "").lower()
            if (
                name
                and character not in known
                and name not in names
                and "modifier" not in name
                and "regional" not in name
            ):
                yield Emoji(name, character, "face" if name.endswith(" face") else None)


def emoji_of(preset: Preset) -> tuple[Emoji, ...]:
    """The emoji of a preset, in a fixed order. Some of the `gpu` preset's may be missing from a font: see data.py."""
    return (*_listed(), *_others()) if preset.every_emoji else tuple(_listed())


def held_out_background(object_index: int) -> int:
    """The index of the background on which this emoji is never shown in training."""
    return (7 * object_index + 3) % len(BACKGROUNDS)


def _forms(name: str, colour: str) -> list[tuple[str, float]]:
    ground = f"{article(colour)} background"
    return [
        (f"{article(name)} on {ground}", 0.40),
        (f"{name} on {ground}", 0.12),
        (f"{name}, {colour} background", 0.12),
        (f"{article(name)} on {colour}", 0.12),
        (article(name), 0.12),
        (name, 0.12),
    ]


class Captions:
    """The texts that fit each pair of an emoji and a background."""

    def __init__(self, emoji: tuple[Emoji, ...]) -> None:
        self.emoji = emoji

    def __call__(self, object_index: int, background_index: int) -> list[tuple[str, float]]:
        """All captions of one image with their probabilities. A few name only the background or the emoji's colour,
        so that these words alone mean something, in a negative prompt for example."""
        emoji, background = self.emoji[object_index], BACKGROUND_NAMES[background_index]
        spellings = ("gray", "grey") if background == "gray" else (background,)
        names = {emoji.name: 0.6}
        names[emoji.unicode_name] = names.get(emoji.unicode_name, 0.0) + 0.25
        names[emoji.kind or emoji.name] = names.get(emoji.kind or emoji.name, 0.0) + 0.1
        found: dict[str, float] = {}
        for colour in spellings:
            for name, share in names.items():
                for text, weight in _forms(name, colour):
                    found[text] = found.get(text, 0.0) + weight * share / len(spellings)
            found[f"{article(colour)} background"] = 0.02 / len(spellings)
        first = emoji.name.split()[0]
        if first in BACKGROUNDS and first != emoji.name:
            found[first] = 0.03
        return list(found.items())

    def fullest(self, object_index: int, background_index: int) -> str:
        """ "a red apple on a blue background"."""
        return _forms(self.emoji[object_index].name, BACKGROUND_NAMES[background_index])[0][0]

    def every(self) -> list[str]:
        """Every caption there is, sorted, held-out pairs included; the first is the empty one."""
        pairs = [(o, b) for o in range(len(self.emoji)) for b in range(len(BACKGROUNDS))]
        return ["", *sorted({text for pair in pairs for text, _ in self(*pair)})]

    def word_list(self) -> str:
        """What the captions name, a line each: the emoji, their other names, and what other words there are."""
        names = [emoji.name for emoji in self.emoji]
        others = {name for emoji in self.emoji for name in (emoji.unicode_name, emoji.kind) if name} - set(names)
        said = set(" ".join([*names, *others]).split())
        words = {word.strip(",") for caption in self.every() for word in caption.split()} - said
        return "\n\n".join("\n".join(part) for part in (names, sorted(others), sorted(words))) + "\n"
