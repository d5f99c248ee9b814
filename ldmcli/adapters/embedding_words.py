"""The embeddings that prompts may name: a request's own, those that come with LoRAs, and those in a folder."""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from ldmcli.adapters.adapter import Adapter
from ldmcli.adapters.embeddings import Embedding, bundled_embeddings
from ldmcli.conditioning.words import Word, Words, folded
from ldmcli.config import TextEncoderConfig
from ldmcli.disk.hashes import FileHashes
from ldmcli.disk.opening import bad_file, shown
from ldmcli.errors import BadDataError, MissingInputError, UsageError, printable
from ldmcli.images.png_text import carries_embedding

_PICTURE = ".png"
_ENDINGS = (".safetensors", ".pt", ".bin", _PICTURE)  # of files in a folder; of the same name, the first counts
_MAX_FILES = 100_000  # looked at in a folder


class EmbeddingWord(Word):
    """A word with its embedding. `name` is what names that again, a file or a name of the hub; "" where it comes with
    a LoRA."""

    def __init__(self, text: str, find: Callable[[], Embedding], name: str = "", picture: Path | None = None) -> None:
        super().__init__(text, find)
        self.name = name
        self._picture = picture
        self._sha256 = ""

    @functools.cached_property
    def exists(self) -> bool:
        """Whether it is one: pictures that lie among embeddings, most of them previews, carry one or not."""
        return self._picture is None or carries_embedding(self._picture)

    def sha256(self, hashes: FileHashes) -> str:
        """The SHA-256 of its file when that was first asked for, since its vectors too are read once."""
        self._sha256 = self._sha256 or hashes.sha256(self.embedding.path)
        return self._sha256

    @property
    def embedding(self) -> Embedding:
        """Raises LdmError where it is damaged or not for the model."""
        return cast(Embedding, self.vectors)


class EmbeddingWords:
    """The embeddings for a model with these text encoders, and by which words prompts name them."""

    def __init__(
        self,
        encoders: Sequence[TextEncoderConfig],
        family: str,
        open_named: Callable[[str], Embedding],
        *,
        folder: Path | None = None,
    ) -> None:
        """`open_named` opens a file or a name of the hub. Lists the folder, and opens nothing. Raises MissingInputError
        where that cannot be listed."""
        self._encoders, self._family, self._open = encoders, family, open_named
        self._of_folder = dict(self._in_folder(folder)) if folder else {}
        self._of_adapters: dict[int, tuple[Adapter, dict[str, EmbeddingWord]]] = {}  # by the adapter's id
        self._named: dict[str, EmbeddingWord] = {}

    def words(self, names: Sequence[str], adapters: Sequence[Adapter] = ()) -> Words:
        """All words there are for a request that names these embeddings and uses these adapters. What it names counts
        before what comes with an adapter, a later before an earlier one's, and these before the folder's. Raises as
        `named` does, and BadDataError where an adapter's are damaged."""
        found = dict(self._of_folder)
        for adapter in adapters:
            if id(adapter) not in self._of_adapters:
                self._of_adapters[id(adapter)] = adapter, self._bundled(adapter)
            found |= self._of_adapters[id(adapter)][1]
        return found | self.named(names)

    def _bundled(self, adapter: Adapter) -> dict[str, EmbeddingWord]:
        return {
            folded(embedding.word): EmbeddingWord(embedding.word, functools.partial(self._checked, embedding))
            for embedding in embeddings_of(adapter)
        }

    def named(self, names: Sequence[str]) -> dict[str, EmbeddingWord]:
        """The words of embeddings that are named, FILE or FILE:WORD each. Raises LdmError where one is not there or not
        for the model, and UsageError where two have the same word."""
        found: dict[str, EmbeddingWord] = {}
        for name in names:
            word = self._named.get(name) or self._named.setdefault(name, self._name(name))
            other = found.setdefault(folded(word.text), word)
            if other.name != word.name:
                both = f"{printable(other.name)} and {printable(word.name)}"
                raise UsageError(f"two embeddings have the word “{printable(word.text)}”, {both}; give FILE:WORD.")
        return found

    def _name(self, name: str) -> EmbeddingWord:
        file, text = split_name(name)
        embedding = self._checked(self._open(file))
        text = embedding.word if text is None else text.strip()
        if not folded(text) or not _is_text(text):
            raise UsageError(f"{shown(embedding.path)} has no word that a prompt can hold; give FILE:WORD.")
        return EmbeddingWord(text, lambda: embedding, file)

    def _checked(self, embedding: Embedding) -> Embedding:
        embedding.check(self._encoders, self._family)
        return embedding

    def _in_folder(self, folder: Path) -> Iterator[tuple[str, EmbeddingWord]]:
        """The words of a folder: its files' names, and those of its folders' files."""
        alike: dict[str, list[str]] = {}
        for path in embedding_files(folder):
            key = folded(_stem(path))
            if key and _is_text(key):
                alike.setdefault(key, []).append(path)
        for key, paths in alike.items():
            best = min(map(_rank, paths))
            paths = [path for path in paths if _rank(path) == best]
            picture = Path(paths[0]) if _ENDINGS[best] == _PICTURE else None
            yield key, EmbeddingWord(_stem(paths[0]), functools.partial(self._only, paths), paths[0], picture)

    def _only(self, paths: Sequence[str]) -> Embedding:
        if len(paths) > 1:
            what = f"and {printable(paths[1])} are embeddings of the same word"
            raise bad_file(Path(paths[0]), what, "rename one, or name one of them with --embedding")
        return self._checked(self._open(paths[0]))


def split_name(name: str) -> tuple[str, str | None]:
    """FILE or FILE:WORD as file and word, None where it gives none. The file is the longest that is there."""
    colons = [at for at, sign in enumerate(name) if sign == ":" and at]
    ends = [len(name), *reversed(colons)]
    end = next((end for end in ends if os.path.lexists(os.path.expanduser(name[:end]))), max(colons, default=len(name)))
    return name[:end], name[end + 1 :] if end < len(name) else None


def embedding_files(folder: Path) -> list[str]:
    """The files in a folder and its folders that may be embeddings, by their endings, sorted; as texts, for there may
    be thousands. Raises LdmError where there is no such folder, or far too much in it."""
    if not os.path.isdir(folder):
        if os.path.lexists(folder):
            raise BadDataError(f"{shown(folder)} is no folder; name the one that embeddings are in.")
        raise MissingInputError(f"{shown(folder)} does not exist; name the folder that embeddings are in.")
    found: list[str] = []
    seen = 0
    for at, _, names in os.walk(folder):
        seen += len(names)
        if seen > _MAX_FILES:
            raise BadDataError(f"{shown(folder)} holds more than {_MAX_FILES} files; name a smaller folder.")
        found += [os.path.join(at, name) for name in names if name.lower().endswith(_ENDINGS)]
    return sorted(found)


def embeddings_of(adapter: Adapter) -> list[Embedding]:
    """The embeddings that come with an adapter. Raises BadDataError where one is damaged."""
    files = {change.file.path: change.file for change in adapter.changes.values()} if adapter.bundled else {}
    return [embedding for file in files.values() for embedding in bundled_embeddings(file)]


def found_again(recorded: Mapping[str, str], folder: Path | None, sha256: Callable[[Path], str]) -> Path | None:
    """The file of an embedding that a picture was drawn with: where it was then, or in a folder by its word or its
    hash. The same file counts before another of the same name; None where there is neither. Raises LdmError."""
    there = Path(os.path.expanduser(recorded["path"]))
    files = [path for path in map(Path, embedding_files(folder) if folder else ()) if not _is_preview(path)]
    named = [path for path in files if folded(path.stem) == folded(recorded["word"])]
    likely = [*([there] if os.path.isfile(there) else []), *named]
    same = (path for path in (*likely, *files) if sha256(path) == recorded["sha256"])
    return next(same, None) or next(iter(likely), None)


def _is_preview(path: Path) -> bool:
    return path.suffix.lower() == _PICTURE and not carries_embedding(path)


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _rank(path: str) -> int:
    return _ENDINGS.index(os.path.splitext(path)[1].lower())


def _is_text(text: str) -> bool:
    """Whether a prompt can hold it: names of files may be no Unicode text."""
    return "\0" not in text and (text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text))
