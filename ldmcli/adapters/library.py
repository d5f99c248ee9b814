"""Adapters by what users call them: a file or folder, a name in the folder of LoRAs, a repository of the hub. Each is
opened once while its file stays the same."""

import dataclasses
import difflib
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ldmcli.adapters.adapter import ENDINGS, Adapter, open_adapter
from ldmcli.checkpoints.files import open_weights
from ldmcli.checkpoints.layout import ADAPTER_FILES
from ldmcli.disk.opening import missing, shown, without_home
from ldmcli.errors import LdmError, MissingInputError, UsageError, printable
from ldmcli.remarks import warn_once
from ldmcli.spec import LoRA

_log = logging.getLogger(__name__)
_KEPT = 64  # opened adapters
_MAX_FILES = 20_000  # looked at in the folder


class Library:
    """The adapters in `folder`, if there is one, and beyond: `locate` gives the path of what is called so elsewhere."""

    def __init__(self, folder: str | None, locate: Callable[[str], Path], *, allow_pickle: bool = False) -> None:
        self._folder = Path(os.path.expanduser(folder)) if folder else None
        self._locate, self._allow_pickle = locate, allow_pickle
        self._lock = threading.RLock()
        self._opened: dict[Path, Adapter] = {}
        self._located: dict[str, Path] = {}  # elsewhere: the hub is asked once
        self._paths: dict[str, list[Path]] | None = None  # in the folder, by stem and by path without ending
        self._aliases: dict[str, list[Path]] | None = None  # by what the metadata calls them

    def found(self, lora: LoRA) -> LoRA:
        """The LoRA with its path and hash, and by a short name. Raises UsageError for a name that no file in the folder
        has, MissingInputError for a path to nothing, and what `open_adapter` raises."""
        with self._lock:
            path, typed = self._place(lora)
            adapter = self._open(path)
        if lora.sha256 and lora.sha256 != adapter.sha256:
            warn_once(_log, f"the LoRA {printable(lora.name)} is not the one the picture was made with; it will differ")
        name = lora.name if lora.in_prompt else _bare(Path(typed).name)
        return dataclasses.replace(lora, name=name, path=without_home(typed), sha256=adapter.sha256)

    def adapter(self, lora: LoRA) -> Adapter:
        """The adapter, opened. Raises as `found` does."""
        with self._lock:
            return self._open(self._place(lora)[0])

    def names(self) -> list[str]:
        """What prompts call the adapters in the folder. Raises MissingInputError."""
        return sorted({_bare(path.name) for path in self._walk()}) if self._folder else []

    def _open(self, path: Path) -> Adapter:
        known = self._opened.get(path)
        if known is None or any(file.changed for file in known.files):
            while len(self._opened) >= _KEPT:
                del self._opened[next(iter(self._opened))]
            known = self._opened[path] = open_adapter(path, allow_pickle=self._allow_pickle)
        return known

    def _place(self, lora: LoRA) -> tuple[Path, str]:
        """Where a LoRA is, and what to type for it."""
        typed = lora.path or lora.name
        path = Path(os.path.expanduser(typed))
        if os.path.lexists(path) and (lora.path or not lora.in_prompt):
            return path, typed
        if self._folder and (inside := self._in_folder(lora)):
            return inside, str(inside)
        if lora.in_prompt and not lora.path:
            raise self._unknown(lora)
        if typed not in self._located:
            path = self._locate(typed)
            if not os.path.lexists(path):
                raise self._missing(lora, path)
            self._located[typed] = path
        return self._located[typed], typed

    def _in_folder(self, lora: LoRA) -> Path | None:
        """The LoRA in the folder: by name, and where its hash is known and another's is there, by that."""
        found = None
        for fresh in (False, True):
            if fresh or self._paths is None:
                self._paths, self._aliases = self._listed(), None
            found = self._named(_bare(lora.name))
            if found and os.path.lexists(found):
                break
        if lora.sha256 and not (found and self._open(found).sha256 == lora.sha256):
            return self._by_hash(lora.sha256) or found
        return found

    def _named(self, name: str) -> Path | None:
        """What is called so: a file's name without its ending, or, if that is one alone, what its metadata says."""
        paths = (self._paths or {}).get(name, [])
        if len(paths) > 1:
            listed = ", ".join(map(shown, paths[:3]))
            raise UsageError(f"several LoRAs are called {printable(name)} ({listed}); name one by its folder too.")
        if paths:
            return paths[0]
        if self._aliases is None:
            self._aliases = {}
            for path in self._files():
                if alias := _alias(path):
                    self._aliases.setdefault(alias, []).append(path)
        alike = self._aliases.get(name, [])
        return alike[0] if len(alike) == 1 else None

    def _by_hash(self, sha256: str) -> Path | None:
        _log.info("looking for the LoRA with the hash %s in %s", sha256[:12], shown(self._folder or Path()))
        for path in self._files():
            try:
                if self._open(path).sha256 == sha256:
                    return path
            except LdmError as error:
                _log.debug("%s", error)
        return None

    def _listed(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for path in self._walk():
            assert self._folder is not None
            inside = path.relative_to(self._folder).as_posix()
            for name in {_bare(path.name), _bare(inside)}:
                found.setdefault(name, []).append(path)
        return found

    def _files(self) -> Iterable[Path]:
        return dict.fromkeys(path for paths in (self._paths or {}).values() for path in paths)

    def _walk(self) -> Iterator[Path]:
        """The adapters in the folder and below: files, and folders of PEFT or diffusers. Raises MissingInputError."""
        assert self._folder is not None
        if not os.path.isdir(self._folder):
            raise MissingInputError(f"--lora-dir {shown(self._folder)} is no folder; name the one with your LoRAs.")
        endings = ENDINGS if self._allow_pickle else ENDINGS[:1]
        left = _MAX_FILES
        for at, folders, names in os.walk(self._folder):
            folders.sort()
            if Path(at) != self._folder and any(name in names for name in ADAPTER_FILES):
                yield Path(at)
                folders.clear()
                continue
            yield from (Path(at, name) for name in sorted(names)[:left] if name.endswith(endings))
            left -= len(names)
            if left <= 0:
                _log.warning("%s has more than %d files; the rest is not looked at", shown(self._folder), _MAX_FILES)
                return

    def _missing(self, lora: LoRA, path: Path) -> LdmError:
        """The error for a LoRA that is not there."""
        if not lora.sha256:
            if self._folder and _bare(lora.name) == lora.name and "/" not in lora.name:
                return self._unknown(lora)
            return missing(path)
        where = f"nor in {shown(self._folder)}" if self._folder else "and no --lora-dir is given to look in"
        return MissingInputError(
            f"the LoRA {printable(lora.name)} ({lora.sha256[:12]}) is not at {printable(lora.path)} {where}; name it "
            "with --lora, or its folder with --lora-dir."
        )

    def _unknown(self, lora: LoRA) -> UsageError:
        tag = f"“<lora:{printable(lora.name, 60)}>” in a prompt" if lora.in_prompt else f"--lora {printable(lora.name)}"
        if self._folder is None:
            return UsageError(f"{tag} names a LoRA, and there is no folder to look in; give --lora-dir DIR.")
        several = (self._aliases or {}).get(lora.name, [])
        known = [*(self._paths or {}), *(self._aliases or {})]
        near = [_bare(path.name) for path in several] or difflib.get_close_matches(lora.name[:200], known, 3, 0.5)
        advice = (
            f"did you mean {' or '.join(printable(name, 100) for name in near[:3])}?" if near else "check the name."
        )
        return UsageError(f"{tag} names no LoRA in {shown(self._folder)}; {advice}")


def _bare(name: str) -> str:
    """A file's name without the ending of a weight file."""
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


def _alias(path: Path) -> str:
    """What an adapter's metadata calls it; "" where it says nothing, or is none."""
    if not path.name.endswith(ENDINGS[0]):
        return ""
    try:
        return open_weights(path).metadata.get("ss_output_name", "")
    except LdmError:
        return ""
