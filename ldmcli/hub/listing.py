"""Models by name: embedded, in weights/ and $LDM_MODELS, in the hub's cache. Reads headers only, without torch."""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldmcli.checkpoints.layout import INDEX
from ldmcli.checkpoints.source import EMBEDDED_NAME, embedded_model, open_model
from ldmcli.errors import LdmError
from ldmcli.hub.fetch import HubModel, cached_models, locate, locate_adapter, why_path

_WEIGHTS = ".safetensors"
_MAX_ENTRIES = 1000  # looked at in one folder


@dataclasses.dataclass(frozen=True)
class ListedModel:
    """A model as it is named after --model; `family` where it can be run, else `error` says why not."""

    name: str
    origin: str  # "embedded", "folder" or "hub"
    path: Path
    bytes: int
    family: str = ""
    error: str = ""
    words: tuple[str, ...] = ()  # what it knows, where its folder has a list

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def find_model(name: str, *, half: bool) -> Path:
    """Where the model called `name` is on disk; one of the hub is fetched if need be, and a path to nothing is returned
    as it stands. Raises LdmError."""
    return find_here(name) or locate(name, half=half)


def find_adapter(name: str) -> Path:
    """Where the adapter called `name` is on disk: in $LDM_MODELS, or on the hub; a path to nothing is returned as it
    stands. Raises LdmError."""
    return find_here(name) or locate_adapter(name)


def find_here(name: str) -> Path | None:
    """What `name` means without the hub: a path, what is called so in $LDM_MODELS, or the embedded model."""
    path = Path(os.path.expanduser(name))
    own = _own_folder()
    inside = (own / name, own / f"{name}{_WEIGHTS}") if own and name and not path.is_absolute() else ()
    found = next((candidate for candidate in (path, *inside) if os.path.lexists(candidate)), None)
    return embedded_model() if found is None and name == EMBEDDED_NAME else found


def models_at_hand() -> Iterator[ListedModel]:
    """Each model once: the embedded one, weights/ beside the program and here, $LDM_MODELS, the hub's cache."""
    seen: set[str] = set()
    for model in itertools.chain(_in_folders(), _in_cache()):
        real = os.path.realpath(model.path)
        if real not in seen:
            seen.add(real)
            yield model


def _in_folders() -> Iterator[ListedModel]:
    """The embedded model, and what is in weights/ and $LDM_MODELS: folders with an index, and weight files."""
    with contextlib.suppress(LdmError):
        embedded = embedded_model()
        named = find_here(EMBEDDED_NAME) == embedded  # and nothing else here has its name
        yield _described(EMBEDDED_NAME if named else _typed(embedded), "embedded", embedded)
    package, own = Path(__file__).resolve().parent.parent, _own_folder()
    for folder in (Path("weights"), package.parent / "weights", package / "weights", *([own] if own else [])):
        for path in _entries(folder):
            if path.name.endswith(_WEIGHTS) or (path / INDEX).is_file():
                bare = folder == own and not os.path.lexists(path.name)
                yield _described(path.name if bare else _typed(path), "folder", path)


def _own_folder() -> Path | None:
    """The user's folder of models, if one is named."""
    named = os.environ.get("LDM_MODELS")
    return Path(os.path.expanduser(named)) if named else None


def _in_cache() -> Iterator[ListedModel]:
    """What is in the hub's cache: repositories in diffusers layout, and, of others, weight files that can be run."""
    for model in cached_models():
        repository, at, revision = model.name.partition("@")
        if (model.path / INDEX).is_file():
            hidden = not at and why_path(HubModel(repository))  # the name alone would be a path
            yield _described(f"{model.name}@main" if hidden else model.name, "hub", model.path, model.size)
            continue
        files = [path for path in _entries(model.path) if path.name.endswith(_WEIGHTS)]
        found = (_described(f"{repository}/{path.name}{at}{revision}", "hub", path) for path in files)
        yield from (file for file in found if file.family)


def _described(name: str, origin: str, path: Path, size: int | None = None) -> ListedModel:
    found = ListedModel(name, origin, path, _size(path) if size is None else size)
    try:
        model = open_model(path)
        return dataclasses.replace(found, family=model.config.family, words=model.word_list.names)
    except LdmError as error:
        return dataclasses.replace(found, error=str(error))


def _typed(path: Path) -> str:
    """The shortest way to type `path` from here."""
    with contextlib.suppress(ValueError):
        return str(path.absolute().relative_to(Path.cwd()))
    return str(path)


def _entries(folder: Path) -> list[Path]:
    """What is in `folder`, sorted; nothing where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in itertools.islice(entries, _MAX_ENTRIES))
    except OSError:
        return []


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a model's folder and its parts' folders, each counted once."""
    files = [path] if not path.is_dir() else [*_entries(path), *itertools.chain(*map(_entries, _entries(path)))]
    sizes = {os.path.realpath(file): file.stat().st_size for file in files if file.is_file()}
    return sum(sizes.values())
